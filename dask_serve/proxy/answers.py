"""Whole answers in one write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from ..wire.frames import Buffer

__all__ = ["respond", "write_whole"]

#: Headers that say how the body is framed, or what becomes of the connection.
_SPECIAL = frozenset({b"connection", b"transfer-encoding"})
#: Bodies below this are copied behind their head.
_JOIN_BELOW = 64 * 1024


async def respond(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> None:
    """Send a whole answer as ASGI does, where `write_whole` cannot."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(body)})


def write_whole(cycle: Any, status: int, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> bool:
    """Write a whole answer at once, and return whether that was possible; uvicorn's ``send`` makes two writes."""
    length = b""
    usual = cycle.scope["method"] != "HEAD" and not (
        cycle.disconnected or cycle.response_started or cycle.flow.write_paused
    )
    out: list[Buffer] = [STATUS_LINE[status]]
    for name, value in (*cycle.default_headers, *headers):
        out += (name, b": ", value, b"\r\n")
        if name == b"content-length":
            length = value
        elif name in _SPECIAL:
            usual = False
    if not usual or length != b"%d" % len(body):
        return False
    out.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    if len(body) < _JOIN_BELOW:
        out.append(body)
        cycle.transport.write(b"".join(out))
    else:
        cycle.transport.write(b"".join(out))
        cycle.transport.write(body)
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
