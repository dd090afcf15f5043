"""Load over HTTP/1.1 with kept connections: wrk where it is installed, else a bare asyncio client, its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .asking import BODY, Asking, request_to

#: wrk's script for requests with a body.
POST = Path(__file__).parent / "post.lua"
#: wrk counts an answer as failed after 2 seconds otherwise; a busy machine may take as long.
PATIENCE = ["--timeout", "10s"]
#: Seconds after which our own generator takes a request for lost, when it has sent its last one.
HUNG = 10.0
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Load:
    """What one run of the generator saw."""

    requests: int
    seconds: float
    median_s: float
    failed: int
    #: The generator's own words.
    why: str = ""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def generator() -> str:
    """Tell which generator is used here."""
    return "wrk" if shutil.which("wrk") else "benchmarks/load.py"


def drive(url: str, connections: int, seconds: float, body: str = "") -> Load:
    """Send requests as fast as they are answered, one at a time on each of ``connections``.

    GET, or POST with a body of JSON.

    Raises
    ------
    RuntimeError
        A request failed.
    """
    if wrk := shutil.which("wrk"):
        script = ["-s", str(POST)] if body else []
        command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", *PATIENCE, *script, url]
        load = parse_wrk(run(command, body))
    else:
        load = Load(**json.loads(run(own_command(url, connections, seconds), body)))
    if load.failed:
        raise RuntimeError(f"{load.failed} of {load.requests} requests to {url} failed: {load.why}")
    return load


def own_command(url: str, connections: int, seconds: float) -> list[str]:
    """Return the command of our own generator, which prints a `Load` as JSON; SIGINT ends it before its time."""
    return [sys.executable, "-m", __name__, url, str(connections), str(seconds)]


def environment(body: str = "") -> dict[str, str]:
    """Return the variables of a generator's process."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), BODY: body}


def run(command: list[str], body: str = "") -> str:
    """Run a generator and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment(body))
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")
    return done.stdout


def report(main: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Be a generator: print what the coroutine returns as JSON, whole.

    A write into a pipe that nobody reads yet can end early (uvloop's io_uring interrupts it), and an unbuffered
    standard output, with ``PYTHONUNBUFFERED``, drops the rest; a buffered file goes on.
    """
    try:
        import uvloop

        runner = uvloop.run
    except ImportError:
        runner = asyncio.run
    found = asdict(runner(main()))
    with open(sys.stdout.fileno(), "w", closefd=False) as out:
        out.write(json.dumps(found))


def parse_wrk(text: str) -> Load:
    """Read wrk's report."""
    total = re.search(r"(\d+) requests in ([\d.]+)(\w+)", text)
    median = re.search(r"50%\s+([\d.]+)(us|ms|s|m)", text)
    if total is None or median is None:
        raise RuntimeError(f"wrk said something else than expected: {text}")
    why = "; ".join(re.findall(r"(Non-2xx or 3xx responses: .*|Socket errors: .*)", text))
    failed = sum(map(int, re.findall(r"(?<= )\d+", why.replace("Non-2xx or 3xx", ""))))
    return Load(int(total[1]), float(total[2]) * UNITS[total[3]], float(median[1]) * UNITS[median[2]], failed, why)


class Connection(Asking):
    """One connection that asks again as soon as it is answered, until it is told to end."""

    def __init__(self, request: bytes, latencies: list[float], failures: list[str]) -> None:
        super().__init__()
        self.ended: asyncio.Future[None] | None = None
        self.request = request
        self.latencies = latencies
        self.failures = failures
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        super().connection_made(transport)
        self.ask()

    def ask(self) -> None:
        """Send the request."""
        assert self.transport is not None
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def answered(self, status: int) -> None:
        """Count it, and ask again."""
        if not 200 <= status < 300:
            self.failures.append(f"answer {status}")
        self.latencies.append(time.perf_counter() - self.sent)
        if self.ended is None:
            self.ask()
        elif not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Take a connection that the server closed as a failure."""
        if self.ended is None or not self.ended.done():
            self.failures.append(repr(exc or ConnectionError("closed")))
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    def end(self) -> asyncio.Future[None]:
        """Ask nothing any more; done when the last answer came."""
        assert self.transport is not None
        self.ended = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self.ended.set_result(None)
        return self.ended


async def ask(url: str, connections: int, seconds: float) -> Load:
    """Be the generator."""
    parts = urlsplit(url)
    request = request_to(url)
    latencies: list[float] = []
    failures: list[str] = []
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    protocols = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(
            lambda: Connection(request, latencies, failures), parts.hostname, parts.port
        )
        protocols.append(protocol)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, ended.set)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(ended.wait(), seconds)
    done, took = list(latencies), time.perf_counter() - begun
    _, hung = await asyncio.wait([protocol.end() for protocol in protocols], timeout=HUNG)
    failures += [f"no answer after {HUNG:g} s"] * len(hung)
    failed, why = len(failures), "; ".join(sorted(set(failures))[:3])
    for protocol in protocols:
        if protocol.transport is not None:
            protocol.transport.abort()
    return Load(len(done), took, statistics.median(done) if done else float("inf"), failed, why)


def main() -> None:
    """Run as a process of its own: ``-m benchmarks.load URL CONNECTIONS SECONDS`` prints a `Load` as JSON."""
    url, connections, seconds = sys.argv[1:]
    report(lambda: ask(url, int(connections), float(seconds)))


if __name__ == "__main__":
    main()
