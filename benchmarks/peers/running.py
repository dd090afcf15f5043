"""A system in its process: started, asked, and stopped with everything that it has started."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import psutil

from ..processes import ROOT

#: Seconds until a system must run, and until it must have ended.
START, END = 180.0, 60.0


class Group:
    """Several processes that are one in the table, as `Clock` reads them."""

    def __init__(self, pids: list[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]

    def cpu_times(self) -> tuple[float, float]:
        """Return their CPU seconds so far; one that has ended has none."""
        user = system = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                user, system = user + times.user, system + times.system
        return user, system


class Running:
    """A system that can be asked.

    Attributes
    ----------
    description : str
        Its version and settings.
    groups : dict of str to Group
        Its processes by the name in the table.
    """

    def __init__(self, process: subprocess.Popen[str], module: str, errors: IO[str]) -> None:
        self._process = process
        self._module = module
        self._errors = errors
        first = self._read(START)
        self.description: str = first["describe"]
        known: dict[str, int] = first["processes"]
        others = {child.pid for child in psutil.Process(process.pid).children(recursive=True)} - {*known.values()}
        self.groups = {name: Group([pid]) for name, pid in known.items()} | {"others": Group(sorted(others))}

    def ask(self, case: str, patience: float = 60.0, **arguments: Any) -> Any:
        """Let it measure a case; ``patience`` is in seconds.

        Raises
        ------
        RuntimeError
            It ended, or did not answer in time.
        """
        assert self._process.stdin is not None
        print(json.dumps({"case": case, "arguments": arguments}), file=self._process.stdin, flush=True)
        return self._read(patience)

    def _read(self, patience: float) -> Any:
        # It writes a line at once, and none that was not asked for.
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise self._failure(f"no answer within {patience:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure(f"it ended (exit code {self._process.wait(END)})")
        return json.loads(line)

    def _failure(self, why: str) -> RuntimeError:
        self._errors.seek(0)
        return RuntimeError(f"{self._module}: {why}\n{self._errors.read()[-4000:]}")


@contextmanager
def running(module: str, python: str = sys.executable, variables: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run a system by its module in a process of its own; no process of it is left afterwards."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env={**os.environ, **(variables or {}), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield Running(process, module, errors)
        finally:
            end(process, module)


def end(process: subprocess.Popen[str], module: str) -> None:
    """Let a system end by itself, and kill what is left of it."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END)
    # Those that were told to end may need a moment more.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(alive, family)):
        time.sleep(0.1)
    left = [member for member in family if alive(member)]
    for member in left:
        print(f"{module} left process {member.pid} behind; it is killed", file=sys.stderr)
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(END)
    if process.stdout is not None:
        process.stdout.close()


def alive(process: psutil.Process) -> bool:
    """Tell whether it is that process, and more than an entry that its parent has not read."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
