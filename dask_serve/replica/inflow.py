"""What a caller sends behind its call, on its way to user code: the rest of a body, or the messages of a WebSocket.

The door's thread puts, user code takes on its loop and tells what it took: the caller is never more than a window
ahead, and no more than that lies here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..context import request_context
from ..wire.frames import Buffer
from ..wire.messages import BODY_WINDOW, LEAST, WINDOW, Event, Kind, Window, encode, is_websocket

if TYPE_CHECKING:
    from .execution import Execution
    from .user import UserCode

__all__ = ["Inflow"]


class Inflow:
    """What follows one call. Making it, on the door's loop, accepts the call."""

    __slots__ = (
        "_cancelled",
        "_consumed",
        "_ended",
        "_execution",
        "_items",
        "_unopened",
        "_user",
        "_waiters",
        "_whole",
        "_window",
        "gone",
    )

    def __init__(self, user: UserCode, execution: Execution) -> None:
        self._user = user
        self._execution = execution
        self._items: deque[Any] = deque(execution.parts)
        execution.parts = ()
        #: The client of a WebSocket has left; what it said before may still be here.
        self.gone = False
        self._ended = False
        self._whole = False
        #: User code is being cancelled. Not before: it would see a client that left, and no cancellation.
        self._cancelled = False
        self._consumed = 0
        #: Who waits for something. Whoever takes it out has to wake it.
        self._waiters: deque[asyncio.Future[None]] = deque()
        #: Bytes of the window that the caller gets once user code reads: a client that waits for leave to send its body
        #: (``Expect: 100-continue``) has it from then on.
        self._unopened = 0
        head = execution.call.http
        self._window = WINDOW if head is not None and is_websocket(head) else BODY_WINDOW
        room = self._window - sum(max(LEAST, len(part)) for part in self._items)
        if head is not None and any(name == b"expect" for name, _ in head.headers):
            self._unopened, room = room, 0
        self._widen(room)

    # ------------------------------------------------------------------ on the door's thread

    def put(self, parts: Sequence[Buffer]) -> None:
        """Take a piece of the body."""
        self._items.extend(parts)
        self._tell()

    def put_event(self, event: Event, parts: Sequence[Buffer]) -> None:
        """Take a step of a WebSocket."""
        self._items.append((event, parts))
        self.gone = event.type == "disconnect"
        self._tell()

    def end(self, whole: bool) -> None:
        """Nothing follows: the body is whole, or the rest of it never comes."""
        self._whole = whole
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        while self._waiters:
            self._user.wake(self._waiters.popleft())

    def _widen(self, nbytes: int) -> None:
        execution = self._execution
        execution.connection.send(Kind.WINDOW, execution.request, encode(Window(nbytes)))

    # ------------------------------------------------------------------ on the user loop

    async def body(self) -> dict[str, Any]:
        """Return ASGI's next message: all that has come of the body, or the disconnect."""
        self._open()
        await self._wait()
        items = self._items
        # Before the items are taken: what ends the body comes behind them.
        ended = self._ended
        if self._cancelled or (ended and not items and not self._whole):
            return {"type": "http.disconnect"}
        pieces = [items.popleft() for _ in range(len(items))]
        body = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        if not ended:
            self._consume(sum(max(LEAST, len(piece)) for piece in pieces))
        self._renew_deadline()
        return {"type": "http.request", "body": body, "more_body": not (ended and self._whole)}

    async def event(self) -> tuple[Event, Sequence[Buffer]]:
        """Return the next step of a WebSocket; a cancelled one is disconnected."""
        await self._wait()
        if not self._items:
            return Event("disconnect", 1006), ()
        event, parts = self._items.popleft()
        self._consume(max(LEAST, sum(len(part) for part in parts)))
        return event, parts

    async def _wait(self) -> None:
        while not self._items and not self._ended and not self._cancelled:
            waiter = self._user.loop.create_future()
            self._waiters.append(waiter)
            # The door may have been here in between, and seen nobody.
            if self._items or self._ended:
                return
            await waiter

    def cancel(self) -> None:
        """The request was cancelled, and so is the task that serves it."""
        self._cancelled = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _open(self) -> None:
        if self._unopened:
            room, self._unopened = self._unopened, 0
            self._user.tell((None, partial(self._widen, room)))

    def _consume(self, nbytes: int) -> None:
        self._consumed += nbytes
        # The caller counts the same, so that it never waits for less than this.
        if self._consumed >= self._window // 4:
            consumed, self._consumed = self._consumed, 0
            self._user.tell((None, partial(self._widen, consumed)))

    def _renew_deadline(self) -> None:
        """The time that a body takes to come is its client's own: the deadline counts from its last piece."""
        execution = self._execution
        remaining = execution.call.remaining
        context = request_context.get()
        if remaining is not None and context is not None and context.deadline is not None:
            context.deadline = execution.deadline = monotonic() + remaining
