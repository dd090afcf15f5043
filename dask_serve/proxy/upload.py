"""A request's body that did not come whole with its head, on its way to the replica.

It moves as user code reads it: beside the replica's window lies here what uvicorn has read from the socket, and uvicorn
stops to read when that is more than it may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any

from starlette.types import Receive

from ..routing.router import Router
from ..wire.frames import Buffer
from ..wire.messages import LEAST, HttpHead
from .calls import FollowedCall
from .errors import Refusal
from .protocol import ProxyProtocol

__all__ = ["FIRST", "UploadCall", "begin", "too_large"]

#: Bytes of a body that go with the call itself. A body that declares no more is collected, and may be sent again when
#: its replica is lost.
FIRST = 64 * 1024
#: A body of which so many bytes at most are to come is read to its end when nobody wants it; with more to come, or an
#: unknown rest, the connection is closed.
_DROP = 1 << 20


async def begin(cycle: Any, receive: Receive, limit: int) -> tuple[bytes | None, bool, Refusal | None]:
    """Read the beginning of a body, or all of a small one.

    Returns
    -------
    body : bytes or None
        None: the client went away.
    more : bool
        There is more of it.
    refusal : Refusal or None
        The body is larger than ``limit`` bytes.
    """
    length = _length(cycle.scope["headers"])
    if length is not None and length > limit:
        return b"", True, too_large(limit)
    if length is None or length > FIRST or cycle.waiting_for_100_continue:
        if cycle.disconnected:
            return None, False, None
        body = bytes(cycle.body[:FIRST])
        del cycle.body[:FIRST]
        return body, True, None
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None, False, None
        pieces.append(message["body"])
        if not message["more_body"]:
            return b"".join(pieces), False, None


def too_large(limit: int) -> Refusal:
    """Say that a body is too large."""
    return 413, "BodyTooLarge", f"the body is larger than {limit} bytes (body_limit)"


def refuse_rest(connection: ProxyProtocol, received: int = 0) -> None:
    """Before an answer is given: see to it that the client, which still sends, gets it."""
    # uvicorn's own: while a body is incomplete no other request can have come behind it.
    cycle: Any = connection.cycle
    if cycle is None or not cycle.more_body or cycle.disconnected:
        return
    length = _length(cycle.scope["headers"])
    if length is not None and length - received - len(cycle.body) <= _DROP and not cycle.waiting_for_100_continue:
        # uvicorn reads and drops what belongs to an answered request.
        return
    cycle.keep_alive = False
    cycle.transport = _Lingering(connection)


def _length(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return None


class _Lingering:
    """Stands for the transport of a connection that its client still writes to."""

    def __init__(self, connection: ProxyProtocol) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        # After what uvicorn does at the end of an answer.
        self._connection.loop.call_soon(self._linger)

    def _linger(self) -> None:
        if not self.is_closing():
            self._connection._linger()


class UploadCall(FollowedCall):
    """A request whose body follows."""

    __slots__ = ("_moved", "_received", "_router", "_sent", "_task", "_timeout")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__(parts, request_id, head, loop)
        #: All is sent.
        self._sent = False
        self._received = sum(len(part) for part in parts)
        #: When a part of the body moved last.
        self._moved = 0.0
        self._timeout = 0.0
        self._router: Router | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, router: Router, receive: Receive, limit: int) -> None:
        """Begin to carry the body, once the call was submitted."""
        self._router = router
        if not self.ended:
            self._task = self._loop.create_task(self._carry(receive, limit))

    def stop(self, connection: ProxyProtocol) -> None:
        """An answer is there, or nobody waits for one: nobody reads what is left of the body."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        if not self._sent:
            if not self.ended and self.accepted:
                self.target[1].link.end_body(self.number, False)
            refuse_rest(connection, self._received)

    async def more(self, timeout: float | None) -> None:
        while True:
            try:
                return await super().more(timeout)
            except asyncio.TimeoutError:
                # Silence is none while the body moves.
                if timeout is None or monotonic() - self._moved >= timeout:
                    raise

    def on_window(self, nbytes: int) -> None:
        self._moved = monotonic()
        # From here on the deadline counts from the last piece of the body: the time that it takes is its client's own.
        if not self.accepted and self.timer is not None and self.deadline is not None:
            self.timer.cancel()
            self._timeout = self.deadline - self.since
            self.timer = self._loop.call_later(self._timeout, self._on_deadline)
        super().on_window(nbytes)

    def _on_deadline(self) -> None:
        left = self._moved + self._timeout - monotonic()
        if left > 0:
            self.timer = self._loop.call_later(left, self._on_deadline)
        elif self._router is not None:
            self._router._on_deadline(self)

    async def _carry(self, receive: Receive, limit: int) -> None:
        while True:
            await self.room_for_more()
            message = await receive()
            if message["type"] == "http.disconnect":
                # The connection's own callback cancels the request.
                return
            body = message["body"]
            self._received += len(body)
            if self._received > limit:
                assert self._router is not None
                self._router.cancel(self)
                self.error = too_large(limit)
                return
            await self._send(body)
            if not message["more_body"]:
                self._sent = True
                self.target[1].link.end_body(self.number, True)
                return

    async def _send(self, body: bytes) -> None:
        left = memoryview(body)
        while left:
            await self.room_for_more()
            piece, left = left[: self.room], left[self.room :]
            self.room -= max(LEAST, len(piece))
            self._moved = monotonic()
            self.target[1].link.send_body(self.number, piece)
