"""What user code streams, on its way to the door: bounded by the caller's window, handed over without a lock."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..exceptions import PayloadError
from ..wire.chunks import FRAME, freeze, pack
from ..wire.frames import Buffer
from ..wire.messages import LEAST, WINDOW, Chunk, Kind, encode
from .results import dump_item

if TYPE_CHECKING:
    from .execution import Execution
    from .user import UserCode

__all__ = ["BodyFlow", "ItemFlow", "Outflow"]

#: Parts of this many bytes do not wait for the end of a tick.
_LARGE = 16 * 1024


class Outflow:
    """The parts of one streamed answer.

    User code's thread puts them, the door's thread takes all there are whenever it comes by: of a slow generator each
    leaves at once, of a fast one many leave together.

    Parameters
    ----------
    tell : callable
        Passes a mail on to the door: by the tick of the user loop, or at once from a thread of the pool.
    """

    __slots__ = ("_consumed", "_entries", "_execution", "_noted", "_parked", "_put", "_user", "tell")

    def __init__(self, user: UserCode, execution: Execution, tell: Callable[[Any], None]) -> None:
        self.tell = tell
        self._user = user
        self._execution = execution
        self._entries: deque[Any] = deque()
        #: The door has been told that there is something.
        self._noted = False
        #: Bytes, each counted by one thread only: put by user code, consumed by the caller.
        self._put = 0
        self._consumed = 0
        #: Who waits for room. Whoever takes it out has to wake it.
        self._parked: deque[Callable[[], None]] = deque()
        execution.outflow = self

    # ------------------------------------------------------------------ by user code's thread

    def _append(self, entry: Any, nbytes: int) -> None:
        self._entries.append(entry)
        self._put += nbytes
        if nbytes >= _LARGE:
            # The door writes it while user code goes on.
            self._noted = True
            self._user.tell_at_once((None, self.drain))
        elif not self._noted:
            self._noted = True
            self.tell((None, self.drain))

    @property
    def progress(self) -> int:
        """Grows with all that is put and consumed."""
        return self._put + self._consumed

    @property
    def full(self) -> bool:
        """A whole window is under way."""
        return self._put - self._consumed >= WINDOW

    def park(self, wake: Callable[[], None]) -> bool:
        """Have ``wake`` called once there is room, or the request is cancelled; False when it is so already."""
        self._parked.append(wake)
        if self.full and not self._execution.cancelled:
            return True
        try:
            self._parked.pop()
        except IndexError:
            # The door was here in between, and wakes it.
            return True
        return False

    async def pause(self) -> None:
        """Wait for room; with room, let the loop have a turn (on the user loop).

        Raises
        ------
        CancelledError
            The request was cancelled, and user code has not let itself be stopped by it.
        """
        if not self.full:
            await asyncio.sleep(0)
        while self.full and not self._execution.cancelled:
            waiter = self._user.loop.create_future()
            if self.park(partial(self._user.wake, waiter)):
                await waiter
        if self._execution.cancelled:
            raise asyncio.CancelledError

    # ------------------------------------------------------------------ on the door's thread

    def widen(self, nbytes: int) -> None:
        """The caller has consumed so many bytes."""
        self._consumed += nbytes
        if not self.full:
            self.unpark()

    def unpark(self) -> None:
        """Wake whoever waits for room. From any thread."""
        try:
            wake = self._parked.popleft()
        except IndexError:
            return
        wake()

    def drain(self) -> None:
        """Send what is there."""
        # Before it is taken: what comes in between tells the door once more than needed, never once too few.
        self._noted = False
        entries = self._entries
        if entries and not self._execution.core.closed:
            self._execution.started = True
            self._send([entries.popleft() for _ in range(len(entries))])

    def _send(self, entries: list[Any]) -> None:
        raise NotImplementedError

    def _send_chunk(self, chunk: Chunk, parts: list[Buffer]) -> None:
        execution = self._execution
        execution.connection.send(Kind.CHUNK, execution.request, encode(chunk), parts)


class ItemFlow(Outflow):
    """Python objects."""

    __slots__ = ()

    def put(self, item: Any) -> None:
        """Take an item as it is now."""
        try:
            entry, nbytes = freeze(item, dump_item)
        except PayloadError as error:
            raise PayloadError(
                f"an item that replica {self._user.id} yielded, a {type(item).__name__}, {error}"
            ) from error
        self._append(entry, nbytes)

    def _send(self, entries: list[Any]) -> None:
        for counts, parts in pack(entries):
            self._send_chunk(Chunk(items=counts), parts)


class BodyFlow(Outflow):
    """The answer to an HTTP request: its head, then bytes."""

    __slots__ = ()

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head, first of all."""
        if self._execution.timed:
            headers = [*headers, self._execution.timing()]
        self._append(Chunk(status, headers), 0)

    def put(self, body: bytes) -> None:
        """Take a piece of the body, which is not empty."""
        self._append(body, max(LEAST, len(body)))

    def end(self) -> None:
        """Tell that the body is whole, while the request runs on."""
        self._append(Chunk(), 0)

    def _send(self, entries: list[Any]) -> None:
        chunk, size = Chunk(), 0
        parts: list[Buffer] = []
        for entry in entries:
            if type(entry) is not Chunk:
                if parts and size + len(entry) > FRAME:
                    self._send_chunk(chunk, parts)
                    chunk, parts, size = Chunk(), [], 0
                parts.append(entry)
                size += len(entry)
                continue
            if parts or chunk.status:
                self._send_chunk(chunk, parts)
            chunk, parts, size = entry, [], 0
            if not entry.status:
                # A chunk without anything, which is the end.
                self._send_chunk(entry, parts)
        if parts or chunk.status:
            self._send_chunk(chunk, parts)
