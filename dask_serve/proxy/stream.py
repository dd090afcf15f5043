"""A streamed answer on its way to the client: passed on within its window, and cut off where it fails."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.types import Send

from ..wire.messages import LEAST, WINDOW_STEP
from .calls import HttpCall
from .protocol import ProxyProtocol

__all__ = ["cut_off", "pass_on"]

#: Seconds that a streamed answer may be silent.
STREAM_IDLE = 60.0
#: Seconds that a client may take to read what was sent before its connection is cut off.
LINGER = 5.0


async def pass_on(call: HttpCall, send: Send) -> None:
    """Send the chunks as they come, until the body is whole or has failed."""
    consumed = 0
    while True:
        while call.chunks:
            chunk = bytes(call.chunks.popleft())
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            consumed += max(LEAST, len(chunk))
            if consumed >= WINDOW_STEP and not call.ended:
                call.target[1].link.widen(call.number, consumed)
                consumed = 0
        if call.whole or call.ended:
            return
        try:
            await call.more(STREAM_IDLE)
        except asyncio.TimeoutError:
            call.error = (504, "RequestTimeoutError", f"nothing came for {STREAM_IDLE:g} s")
            return


async def cut_off(connection: ProxyProtocol) -> None:
    """Close a connection without the end of the answer, once what was sent is read."""
    if connection.transport.is_closing():
        return
    closed = connection.loop.create_future()
    connection.on_disconnect = partial(closed.set_result, None)
    connection.transport.close()
    try:
        await asyncio.wait_for(closed, LINGER)
    except asyncio.TimeoutError:
        connection.on_disconnect = None
        connection.transport.abort()
        await asyncio.sleep(0)
