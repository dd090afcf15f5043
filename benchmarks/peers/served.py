"""A peer that is a server with a command of its own: started on a free port of this machine only, and stopped."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.request import Request, urlopen

__all__ = ["Served", "served"]

#: Seconds until it must answer, and until it must have ended.
START, END = 60.0, 10.0


class Served:
    """The running server."""

    def __init__(self, description: str, pid: int, url: str) -> None:
        self._description = description
        self._pid = pid
        self._url = url

    def describe(self) -> str:
        """Tell version and settings."""
        return self._description

    def processes(self) -> dict[str, int]:
        """Return the process that was started; those that it starts itself are "others"."""
        return {"server": self._pid}

    def json(self) -> str:
        """Return where JSON is answered."""
        return self._url

    #: The server is started with one of them.
    model = batches = json


@contextmanager
def served(description: str, command: Callable[[int], Sequence[str]], path: str) -> Iterator[Served]:
    """Run the command for a port until the end of the block.

    Raises
    ------
    RuntimeError
        It does not answer in time, or has ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}{path}"
    process = subprocess.Popen(command(port))
    try:
        wait_for_answer(url, process)
        yield Served(description, process.pid, url)
    finally:
        # As with Ctrl-C.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    """Ask until the answer is what it must be."""
    deadline = time.monotonic() + START
    headers = {"content-type": "application/json"}
    why: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(Request(url, b'{"input": 1}', headers), timeout=5) as answer:
                if b"1" in answer.read():
                    return
        except OSError as error:
            why = error
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer within {START:g} s (exit code {process.poll()}): {why}")
