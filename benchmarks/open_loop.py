"""An open-loop generator, its own process: requests come when they come, however many are not answered yet.

``-m benchmarks.open_loop URL RATE SECONDS [TIMEOUT_S] [LEAVING] [PATIENCE_S]`` prints a `Report` as JSON. Arrivals are
Poisson's.
Each request has a kept connection to itself while it is under way; ``LEAVING`` is the share of clients that close
theirs when they have no answer after ``PATIENCE_S``. SIGTERM ends it before its time: nothing new is asked.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .asking import Asking, request_to
from .load import report, run

#: Seconds at the start that do not count.
WARM_UP = 1.0


@dataclass
class Report:
    """What was answered, by HTTP status, with the seconds that it took.

    0: the client left; -1: the connection broke.
    """

    counts: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    took: float = 0.0
    #: When each was asked, on the clock that all processes of a machine share; in the order of ``seconds``.
    begun: dict[int, list[float]] = field(default_factory=dict)


def command(url: str, *numbers: float) -> list[str]:
    """Return the command of this generator."""
    return [sys.executable, "-m", __name__, url, *map(str, numbers)]


def offer(url: str, rate: float, seconds: float, *more: float, body: str = "") -> Report:
    """Let requests come at a rate, in a process of their own."""
    found = json.loads(run(command(url, rate, seconds, *more), body))
    return Report(
        {int(status): count for status, count in found["counts"].items()},
        {int(status): sorted(taken) for status, taken in found["seconds"].items()},
        found["took"],
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Return what that share of sorted values does not exceed."""
    return values[min(int(share * len(values)), len(values) - 1)] if values else 0.0


class Client(Asking):
    """One kept connection, among those that are free while it has no request."""

    def __init__(self, free: list[Client]) -> None:
        super().__init__()
        self.free = free
        self.answer: asyncio.Future[int] | None = None

    def answered(self, status: int) -> None:
        """Tell who asked, and be free."""
        answer, self.answer = self.answer, None
        if answer is None:
            return
        if not answer.done():
            answer.set_result(status)
        self.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing comes any more."""
        if self in self.free:
            self.free.remove(self)
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed"))


async def generate(  # noqa: PLR0917
    url: str, rate: float, seconds: float, timeout: float, leaving: float, patience: float
) -> Report:
    """Send requests at a mean rate, and wait until all are answered."""
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    request = request_to(url, timeout)
    free: list[Client] = []
    counts: Counter[int] = Counter()
    taken: dict[int, list[float]] = {}
    moments: dict[int, list[float]] = {}
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)

    async def send() -> int:
        if free:
            client = free.pop()
        else:
            _, client = await loop.create_connection(lambda: Client(free), parts.hostname, parts.port)
        assert client.transport is not None
        client.answer = answer = loop.create_future()
        client.transport.write(request)
        try:
            return await asyncio.wait_for(answer, patience if random.random() < leaving else None)
        except asyncio.TimeoutError:
            client.answer = None
            client.transport.abort()
            return 0

    async def ask(counted: bool) -> None:
        begun = time.monotonic()
        try:
            status = await send()
        except OSError:
            status = -1
        if counted:
            counts[status] += 1
            taken.setdefault(status, []).append(time.monotonic() - begun)
            moments.setdefault(status, []).append(begun)

    begun = at = loop.time()
    tasks: set[asyncio.Task[None]] = set()
    while at < begun + WARM_UP + seconds and not ended.is_set():
        if (wait := at - loop.time()) > 0:
            await asyncio.sleep(wait)
        task = loop.create_task(ask(at > begun + WARM_UP))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        at += random.expovariate(rate)
    await asyncio.gather(*tasks)
    for client in free:
        if client.transport is not None:
            client.transport.abort()
    return Report(dict(counts), taken, seconds, moments)


def main() -> None:
    """Run as a process of its own."""
    url, *numbers = sys.argv[1:]
    rate, seconds, timeout, leaving, patience = [*map(float, numbers), 0.0, 0.0, 0.05][:5]
    report(lambda: generate(url, rate, seconds, timeout, leaving, patience))


if __name__ == "__main__":
    main()
