"""One end of a tunnel: opaque bytes over a connection that carries messages, both ways, against windows.

Dask's connections buffer whatever is written to them, so each side sends no more than a window of bytes that the other
one has not passed on yet. A message is a list of two: how many bytes were passed on since the last message, and bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from .frames import Buffer

__all__ = ["CHUNK", "HIGH_WATER", "LINGER", "Pump"]

logger = logging.getLogger("dask_serve.wire")

#: The most bytes of one message: what is handled between two turns of the loop.
CHUNK = 256 * 1024
#: From so many bytes on that wait to be sent their source is to stop; it goes on below a quarter.
HIGH_WATER = 512 * 1024
#: Seconds that a closed pump may take to send the rest.
LINGER = 5.0


class Pump:
    """Sends what it is fed, hands out what comes, and acknowledges what was consumed.

    Parameters
    ----------
    comm : distributed.comm.Comm
        The connection, the pump's own from now on.
    window : int
        Bytes that may be under way in each direction, the same on both sides.
    deliver : callable
        Takes received bytes. Whoever took them calls `consumed`.
    set_full : callable
        Told True when the source is to stop and False when it may go on.

    Attributes
    ----------
    queued : int
        Bytes that wait to be sent.
    """

    def __init__(
        self, comm: Any, window: int, deliver: Callable[[bytes], None], set_full: Callable[[bool], None]
    ) -> None:
        self.queued = 0
        # Messages are small, and those that a thread encodes would lose their order.
        comm.allow_offload = False
        self._comm = comm
        self._window = window
        self._deliver = deliver
        self._set_full = set_full
        self._loop = asyncio.get_running_loop()
        self._out: deque[Buffer] = deque()
        #: Bytes that may still be sent, that came and were not consumed, and that were consumed and not acknowledged.
        self._room = window
        self._unconsumed = 0
        self._owed = 0
        self._full = False
        self._closing = False
        self._aborted = False
        self._wake: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Pump until either side ends; the connection is closed then."""
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._write())]
        try:
            if not self._aborted:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.abort()
            ends = await asyncio.gather(*self._tasks, return_exceptions=True)
            self._comm.abort()
            self._out.clear()
            for end in ends:
                if isinstance(end, Exception) and not isinstance(end, OSError):
                    logger.warning("A tunnel ended: %r", end)

    def feed(self, data: Buffer) -> None:
        """Queue bytes, which must not change any more."""
        if self._closing or not data:
            return
        self._out.append(data)
        self.queued += len(data)
        if not self._full and self.queued > HIGH_WATER:
            self._full = True
            self._set_full(True)
        self._wake_up()

    def consumed(self, nbytes: int) -> None:
        """So many of the delivered bytes were passed on."""
        self._unconsumed -= nbytes
        self._owed += nbytes
        if self._owes:
            self._wake_up()

    def close(self) -> None:
        """End once everything is sent, at the latest after `LINGER` seconds; what comes is dropped."""
        if not self._closing:
            self._closing = True
            self._timer = self._loop.call_later(LINGER, self.abort)
            self._wake_up()

    def abort(self) -> None:
        """End at once."""
        self._closing = self._aborted = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------ inside

    @property
    def _owes(self) -> bool:
        return self._owed * 4 >= self._window

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _write(self) -> None:
        while True:
            data = self._take()
            if not data and not self._owes:
                if self._closing and not self._out:
                    await self._comm.close()
                    return
                self._wake = self._loop.create_future()
                await self._wake
                continue
            owed, self._owed = self._owed, 0
            await self._comm.write([owed, data])
            if self._full and self.queued * 4 < HIGH_WATER:
                self._full = False
                self._set_full(False)
            if len(data) == CHUNK:
                # Writing waits for nothing, so that other things on this loop would wait for all of it.
                await asyncio.sleep(0)

    def _take(self) -> bytes:
        """Take the next bytes to send, as many as may be."""
        limit = min(self._room, CHUNK)
        taken: list[Buffer] = []
        size = 0
        while self._out and size < limit:
            data = self._out.popleft()
            if len(data) > limit - size:
                view = memoryview(data)
                self._out.appendleft(view[limit - size :])
                data = view[: limit - size]
            taken.append(data)
            size += len(data)
        self._room -= size
        self.queued -= size
        return b"".join(taken)

    async def _read(self) -> None:
        since = 0
        while True:
            passed_on, data = await self._comm.read()
            self._room += passed_on
            if self._room > self._window:
                raise ValueError(f"the other side acknowledged {self._room - self._window} bytes too many")
            if passed_on:
                self._wake_up()
            if not data:
                continue
            self._unconsumed += len(data)
            if self._unconsumed > self._window:
                raise ValueError(f"the other side sent more than its window of {self._window} bytes")
            if self._closing:
                self.consumed(len(data))
            else:
                self._deliver(data)
            since += len(data)
            if since >= CHUNK:
                # Reading what is there already waits for nothing either.
                since = 0
                await asyncio.sleep(0)
