"""The pages on clusters of this machine and from the shell: what is written there is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until
from pages import blocks
from slurm_site import free_port
from test_deaths import Processes

import dask_serve as serve

pytestmark = pytest.mark.slow
PACKAGE = Path(serve.__file__).parent


@pytest.mark.parametrize("number", range(len(blocks("clusters/local.md", "python"))))
def test_this_machine(tmp_path, number):
    (tmp_path / "main.py").write_text(blocks("clusters/local.md", "python")[number])
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def test_from_the_shell(tmp_path):
    page = "clusters/cli.md"
    ports = {"8786": str(free_port()), "8000": str(free_port())}

    def short(text: str) -> str:
        for written, free in ports.items():
            text = text.replace(written, free)
        return text

    scheduler, worker, ask = (short(text) for text in blocks(page, "bash"))
    (session,) = blocks(page, "python")
    processes = Processes(tmp_path)
    processes.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = {"cwd": processes.place, "env": processes.environment, "timeout": 60, "capture_output": True, "text": True}
    try:
        started = [processes.start("-c", f"import os; os.execvp('bash', ['bash', '-c', {scheduler!r}])")]
        file = processes.place / "service.json"
        wait_until(file.exists)
        started.append(processes.start("-c", f"import os; os.execvp('bash', ['bash', '-c', {worker!r}])"))
        (processes.place / "session.py").write_text(short(session))
        done = subprocess.run([sys.executable, "session.py"], check=False, **here)
        assert done.returncode == 0, done.stderr
        told = json.loads(file.read_text())
        assert told["url"] == f"http://127.0.0.1:{ports['8000']}"
        # The session has ended.
        asked = subprocess.run(["bash", "-c", ask], check=False, **here)
        assert json.loads(asked.stdout) == {"answer": 42}
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        assert not file.exists()
    finally:
        processes.end()
