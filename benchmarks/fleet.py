"""A scheduler and workers that come, go, hang and are killed: Dask's own commands, each a process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

from .processes import DEADLINE, spawn, stop, wait_for_address

COMMON = ["--host", "127.0.0.1", "--no-dashboard"]


def until(met: Callable[[], Any], timeout: float = DEADLINE) -> Any:
    """Wait for a condition, and return what it found."""
    deadline = time.monotonic() + timeout
    while not (found := met()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not met within {timeout:g} s: {met}")
        time.sleep(0.01)
    return found


class Fleet:
    """Processes that all end with the block."""

    def __enter__(self) -> Fleet:
        self.folder = tempfile.TemporaryDirectory()
        self.place = Path(self.folder.name)
        self.started: list[subprocess.Popen[str]] = []
        self.schedulers: list[subprocess.Popen[str]] = []
        self.address = ""
        return self

    def __exit__(self, *exc: object) -> None:
        for process in reversed(self.started):
            # A scheduler that is killed keeps what it would come back with.
            (stop if process in self.schedulers else end)(process)
        self.folder.cleanup()

    def scheduler(self, *options: str) -> subprocess.Popen[str]:
        """Start the scheduler."""
        file = self.place / f"scheduler-{len(self.started)}.json"
        port = [] if "--port" in options else ["--port", "0"]
        process = self.start("scheduler", *COMMON, "--scheduler-file", str(file), "--no-show", *port, *options)
        self.schedulers.append(process)
        self.address = wait_for_address(file, process)
        return process

    def worker(self, *options: str) -> subprocess.Popen[str]:
        """Start a worker of two threads, under a nanny unless told otherwise."""
        return self.start("worker", self.address, *COMMON, "--nthreads", "2", "--memory-limit", "0", *options)

    def workers(self, client: Client, number: int, *options: str) -> None:
        """Start workers, and wait for them."""
        for _ in range(number):
            self.worker(*options)
        client.wait_for_workers(number, timeout=2 * DEADLINE)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start one of Dask's commands; what it says is in its log."""
        with self.log_of(len(self.started)).open("w") as log:
            self.started.append(spawn("-m", "dask", *command, stderr=log, cwd=self.place))
        return self.started[-1]

    def log_of(self, number: int) -> Path:
        """Return the log of a process."""
        return self.place / f"log-{number}"

    def said(self, process: subprocess.Popen[str], words: str) -> bool:
        """Return whether a process said something."""
        return words in self.log_of(self.started.index(process)).read_text()

    def above(self, pid: int) -> subprocess.Popen[str]:
        """Return the command that a worker belongs to: itself, or its nanny."""
        family = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
        return next(process for process in self.started if process.pid in family)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def hosts(client: Client) -> dict[str, int]:
    """Return the processes of workers, by address."""
    return dict(client.run(os.getpid))
