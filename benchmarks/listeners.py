"""Clients of server-sent events in a process of their own: ``listeners.py URL CLIENTS SECONDS``.

Each asks once, over a connection that is kept, and listens to the end; when all are done they begin again, until the
seconds have passed. It prints a line of JSON: how many answers, and the seconds that they took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import cast
from urllib.parse import urlsplit

EVENT, END = b"data: ", b"\r\n0\r\n\r\n"


class Listener(asyncio.Protocol):
    """Asks, and collects the answer."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.pieces: list[bytes] = []
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait until it is time to ask."""
        self.transport = cast("asyncio.Transport", transport)

    def ask(self) -> asyncio.Future[bytes]:
        """Ask; the answer is there when it is whole."""
        assert self.transport is not None
        self.pieces, self.done = [], asyncio.get_running_loop().create_future()
        self.transport.write(self.request)
        return self.done

    def data_received(self, data: bytes) -> None:
        """Collect; the end may come in two pieces."""
        self.pieces.append(data)
        if b"".join(self.pieces[-2:]).endswith(END):
            self.done.set_result(b"".join(self.pieces))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail where more was to come."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {exc}"))


async def listen(url: str, clients: int, seconds: float) -> tuple[int, int, float]:
    """Return how many answers and events came, and the seconds that they took."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    connected = [loop.create_connection(lambda: Listener(request), parts.hostname, parts.port) for _ in range(clients)]
    listeners = [listener for _, listener in await asyncio.gather(*connected)]
    answers = events = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        whole = await asyncio.gather(*[listener.ask() for listener in listeners])
        answers += len(whole)
        events += sum(answer.count(EVENT) for answer in whole)
    return answers, events, time.perf_counter() - begun


def main() -> None:
    """Run as a process of its own."""
    import uvloop

    url, clients, seconds = sys.argv[1:]
    print(json.dumps(uvloop.run(listen(url, int(clients), float(seconds)))))


if __name__ == "__main__":
    main()
