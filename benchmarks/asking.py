"""One kept HTTP/1.1 connection of a generator, and what it asks."""

from __future__ import annotations

import asyncio
import os
from typing import cast
from urllib.parse import urlsplit

import httptools

__all__ = ["BODY", "Asking", "request_to"]

#: The variable that has the JSON of a POST; without it the request is a GET.
BODY = "BENCHMARK_BODY"


def request_to(url: str, timeout: float = 0.0) -> bytes:
    """Return the bytes of a request, with ``timeout`` seconds (0: any number) to its deadline."""
    parts = urlsplit(url)
    body = os.environ.get(BODY, "").encode()
    head = f"{'POST' if body else 'GET'} {parts.path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    if timeout:
        head += f"x-request-timeout-seconds: {timeout}\r\n"
    return f"{head}\r\n".encode() + body


class Asking(asyncio.Protocol):
    """Has at most one request under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be there."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Read an answer."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """It is whole."""
        self.answered(self._parser.get_status_code())

    def answered(self, status: int) -> None:
        """An answer came."""
        raise NotImplementedError
