"""An open-loop generator, its own process: requests come when they come, however many are not answered yet.

``open_loop.py URL RATE SECONDS [TIMEOUT_S] [LEAVING] [PATIENCE_S]`` prints a `Report` as JSON. Arrivals are Poisson's.
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
from dataclasses import asdict, dataclass, field
from typing import cast
from urllib.parse import urlsplit

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


class Client(asyncio.Protocol):
    """One kept connection, with at most one request under way."""

    def __init__(self, free: list[Client]) -> None:
        self.free = free
        self.answer: asyncio.Future[int] | None = None
        self.buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be there."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Take an answer, which tells its length."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self.buffer) < end + 4 + length or self.answer is None:
            return
        self.buffer = b""
        answer, self.answer = self.answer, None
        if not answer.done():
            answer.set_result(int(head[9:12]))
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
    deadline = f"x-request-timeout-seconds: {timeout}\r\n" if timeout else ""
    request = f"GET {parts.path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n{deadline}\r\n".encode()
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
    try:
        import uvloop

        runner = uvloop.run
    except ImportError:
        runner = asyncio.run
    print(json.dumps(asdict(runner(generate(url, rate, seconds, timeout, leaving, patience)))))


if __name__ == "__main__":
    main()
