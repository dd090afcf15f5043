"""The processes that are measured, each with its CPU time."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
DEADLINE = 30.0


def spawn(*arguments: str, stdout: int = subprocess.DEVNULL, **options: object) -> subprocess.Popen[str]:
    """Start a Python process that finds this repository's packages and ends with a plain SIGTERM.

    Whoever pipes its output reads it: a process that prints more than a pipe holds waits for that.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=stdout,
        text=True,
        start_new_session=True,
        **options,
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that `spawn` started."""
    process.terminate()
    try:
        process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@dataclass(frozen=True)
class Cluster:
    """One scheduler and its worker processes, without nannies, so that their pids are known."""

    address: str
    scheduler: psutil.Process
    #: Named "one", "two", ... on the cluster.
    workers: list[psutil.Process]

    @property
    def worker(self) -> psutil.Process:
        """The first worker, or the only one."""
        return self.workers[0]

    def proxies(self) -> list[psutil.Process]:
        """Return the HTTP proxies, children of the scheduler."""
        children = self.scheduler.children(recursive=True)
        return [child for child in children if "dask_serve.proxy" in child.cmdline()]

    def http(self) -> dict[str, psutil.Process]:
        """Return who takes part in a request over HTTP, by the name in the table."""
        numbered = {f"proxy {number}".removesuffix(" 0"): proxy for number, proxy in enumerate(self.proxies())}
        return {"worker": self.worker, "scheduler": self.scheduler, **numbered}


#: Names of workers, for ``workers=`` of deployments.
NAMES = ("one", "two")


@contextmanager
def cluster(workers: int = 1, threads: int = 4) -> Iterator[Cluster]:
    """Start a scheduler and one or two workers by Dask's own commands; no dashboard."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "scheduler.json"
        dask = ["-m", "dask"]
        common = ["--host", "127.0.0.1", "--no-dashboard"]
        quiet = {"stderr": subprocess.DEVNULL, "cwd": folder}
        scheduler = spawn(
            *dask, "scheduler", *common, "--port", "0", "--scheduler-file", str(file), "--no-show", **quiet
        )
        stack.callback(stop, scheduler)
        address = wait_for_address(file, scheduler)
        common += ["--no-nanny", "--nthreads", str(threads), "--memory-limit", "0"]
        pids = []
        for name in NAMES[:workers]:
            worker = spawn(*dask, "worker", address, *common, "--name", name, **quiet)
            stack.callback(stop, worker)
            pids.append(worker.pid)
        yield Cluster(address, psutil.Process(scheduler.pid), [psutil.Process(pid) for pid in pids])


def wait_for_address(file: Path, process: subprocess.Popen[str]) -> str:
    """Return the address that a scheduler writes into its file."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return str(json.loads(file.read_text())["address"])
        except (FileNotFoundError, ValueError):
            time.sleep(0.05)
    raise RuntimeError(f"the scheduler did not start within {DEADLINE:g} s (exit code {process.poll()})")


@contextmanager
def bare_uvicorn(name: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start the server without dask_serve on an application of `web`; its address and process."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        port = listener.getsockname()[1]
        descriptor = listener.fileno()
        command = ["-m", "benchmarks.bare_uvicorn", str(descriptor), name]
        process = spawn(*command, stdout=subprocess.PIPE, pass_fds=[descriptor])
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"uvicorn did not start (exit code {process.poll()})")
        yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    finally:
        stop(process)


class Clock:
    """CPU seconds that processes spend while it runs.

    Parameters
    ----------
    processes : dict of str to psutil.Process
        What to watch, by the name in the table. Children that end meanwhile count as "load".
    """

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.processes = processes
        self.begun = self.read()

    def read(self) -> dict[str, float]:
        """Return CPU seconds so far."""
        spent = {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {**spent, "load": children.ru_utime + children.ru_stime}

    def per_request(self, requests: int) -> dict[str, float]:
        """Return CPU microseconds a request since the clock was made."""
        now = self.read()
        spent = {name: 1e6 * (now[name] - self.begun[name]) / max(requests, 1) for name in now}
        return {name: value for name, value in spent.items() if value > 0 or name != "load"}
