"""What the benchmarks measure with."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

from helpers import wait_until

#: More than a pipe holds.
SIZE = 300_000
GENERATOR = f"""
import signal
from benchmarks.load import Load, report

async def main():
    signal.signal(signal.SIGTERM, lambda *_: None)
    return Load(1, 1.0, 0.1, 0, {SIZE} * "x")

report(main)
"""


def held(pipe: int) -> int:
    """Return the bytes that wait in a pipe."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_a_report_is_whole_where_its_write_is_interrupted():
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", GENERATOR]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        wait_until(lambda: held(descriptor) >= 65_536 or process.poll() is not None)
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert len(json.loads(out)["why"]) == SIZE
