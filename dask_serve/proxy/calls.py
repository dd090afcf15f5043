"""A request on its way to a replica, and what has come of its answer."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from .. import exceptions
from ..exceptions import BackPressureError, ReplicaLostError, RequestCancelledError, RequestError
from ..routing.calls import Outgoing
from ..wire.frames import Buffer
from ..wire.messages import Chunk, Failure, HttpHead, Reply
from .errors import Refusal

__all__ = ["FollowedCall", "HttpCall"]


class HttpCall(Outgoing):
    """A request on its way, and what has come of its answer."""

    __slots__ = ("_loop", "chunks", "ended", "error", "head", "retry_after", "status", "waiter", "whole")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__("__call__", parts, request_id, head)
        self._loop = loop
        self.status = 0
        self.head: list[tuple[bytes, bytes]] = []
        self.chunks: deque[Buffer] = deque()
        #: The answer's body has come; after `ended` nothing follows, else background tasks still run in the replica.
        self.whole = False
        self.ended = False
        #: What went wrong.
        self.error: Refusal | None = None
        #: Seconds after which trying again makes sense, where it was refused.
        self.retry_after = 1
        self.waiter: asyncio.Future[None] = loop.create_future()

    async def more(self, timeout: float | None) -> None:
        """Wait until another part of the answer has come."""
        if not self.chunks and not self.whole and not self.ended:
            self.waiter = self._loop.create_future()
            await asyncio.wait_for(self.waiter, timeout)

    def _wake(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        if not self.status:
            self.status = reply.status
            self.head = reply.headers
        self.chunks.extend(parts)
        self.ended = True
        self._wake()

    def on_chunk(self, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        if chunk.status:
            self.status = chunk.status
            self.head = chunk.headers
            # A part of the answer may be with the client already.
            self.retries = 0
            # The deadline is for the first byte.
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
        elif not parts:
            self.whole = True
        self.chunks.extend(parts)
        self._wake()

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        if failure.error:
            kind = getattr(exceptions, failure.error, RequestError)
            if kind is RequestCancelledError:
                # Not by the client, whose cancellation is answered on this side.
                text = "the replica gave the request up: it was stopped, or its code raised CancelledError"
                self._end(ReplicaLostError.status, ReplicaLostError.__name__, text)
            else:
                if failure.retry_after is not None:
                    self.retry_after = _whole_seconds(failure.retry_after)
                self._end(kind.status, failure.error, failure.message)
        else:
            # The traceback is in the replica's log, under the request's id; no client sees it.
            self._end(500, "InternalServerError", "the deployment raised an exception")

    def fail(self, error: RequestError) -> None:
        if isinstance(error, BackPressureError):
            self.retry_after = _whole_seconds(error.retry_after_s)
        self._end(error.status, type(error).__name__, str(error))

    def _end(self, status: int, name: str, text: str) -> None:
        self.error = (status, name, text)
        self.ended = True
        self._wake()


def _whole_seconds(seconds: float) -> int:
    """Return what `Retry-After` says: from a second to an hour, whatever user code has raised."""
    return math.ceil(min(seconds, 3600.0)) if seconds > 1 else 1


class FollowedCall(HttpCall):
    """A request of which more follows: the rest of its body, or the messages of a WebSocket.

    Attributes
    ----------
    accepted : bool
        A replica has it for good: it cannot be sent elsewhere any more.
    room : int
        Bytes that the replica still takes.
    """

    follows = True

    __slots__ = ("_by", "_room_waiter", "accepted", "room")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__(parts, request_id, head, loop)
        # What follows is not kept.
        self.retries = 0
        self.accepted = False
        self.room = 0
        #: Who accepted it: a WebSocket goes to another replica when it was not opened yet.
        self._by: Any = None
        self._room_waiter: asyncio.Future[None] | None = None

    def on_window(self, nbytes: int) -> None:
        self.accepted = True
        # How long it takes is its client's doing.
        self.sent = -abs(self.sent)
        self.parts = ()
        if self._by is not self.target:
            self._by = self.target
            self.room = 0
        self.room += nbytes
        if self._room_waiter is not None and not self._room_waiter.done():
            self._room_waiter.set_result(None)

    async def room_for_more(self) -> None:
        """Wait until the replica takes something."""
        while self.room <= 0:
            self._room_waiter = self._loop.create_future()
            await self._room_waiter
