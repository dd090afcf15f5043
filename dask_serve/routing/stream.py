"""A streamed answer on the caller's side: filled on the router's loop, emptied by whoever iterates.

No lock is taken for an item. The router appends and then looks for somebody to wake; a consumer says how to be woken
and then looks once more for what has come: whichever side comes second sees the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..wire.frames import Buffer
from ..wire.messages import Chunk, Reply
from .outcome import Outcome, PythonCall

__all__ = ["StreamState"]


class StreamState(PythonCall):
    """A request whose answer is a stream.

    Attributes
    ----------
    entries : deque of (int, sequence of bytes-like)
        What has come and was not consumed, serialised (`wire.chunks`).
    outcome : Outcome or None
        Set once nothing follows behind ``entries``. Read it before looking whether there are any.
    """

    __slots__ = ("_wake", "entries")

    stream: ClassVar[bool] = True

    def __init__(self, method: str, parts: Sequence[Buffer], request_id: str) -> None:
        super().__init__(method, parts, request_id)
        self.entries: deque[tuple[int, Sequence[Buffer]]] = deque()
        self.status = "pending"
        self.outcome = self.home = self.request = self.keep = None
        self.thread = 0
        self._wake: Callable[[], None] | None = None

    # ------------------------------------------------------------------ on the router's loop

    def on_chunk(self, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        if self.timer is not None:
            # The deadline is for the first item.
            self.timer.cancel()
            self.timer = None
        # The caller may have seen items already.
        self.retries = 0
        start = 0
        for count in chunk.items:
            stop = start + (1 if count < 0 else count)
            self.entries.append((count, parts[start:stop]))
            start = stop
        if self._wake is not None:
            self._wake()

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        self.settle("finished", Outcome(parts=()))

    def settle(self, status: str, outcome: Outcome) -> bool:
        """Nothing follows; False when that was known already."""
        if self.outcome is not None:
            return False
        self.status = status
        self.outcome = outcome
        self.parts = ()
        self._let_go()
        if self._wake is not None:
            self._wake()
        return True

    def widen(self, nbytes: int) -> None:
        """Tell the replica what was consumed."""
        if self.outcome is None and self.target is not None:
            self.target[1].link.widen(self.number, nbytes)

    # ------------------------------------------------------------------ by the consumer

    def done(self) -> bool:
        """Nothing will come any more; what came may still be there."""
        return self.outcome is not None

    @property
    def idle(self) -> bool:
        """There is nothing to do but wait."""
        return self.outcome is None and not self.entries

    def wait_in_thread(self, timeout: float | None) -> bool:
        """Block until there is something, at most ``timeout`` seconds; False when they have passed."""
        gate = threading.Lock()
        gate.acquire()
        self._wake = _Once(gate.release)
        return not self.idle or gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))

    def waiter(self) -> asyncio.Future[None]:
        """Return a future of the running loop that ends when there is something."""
        loop = self.home if self.is_at_home() else None
        if loop is None:
            loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def set_result() -> None:
            if not future.done():
                future.set_result(None)

        self._wake = set_result if loop is self.home else _Once(lambda: loop.call_soon_threadsafe(set_result))
        if not self.idle:
            set_result()
        return future


class _Once:
    """Wakes a consumer elsewhere: one wake-up, however much comes before it has run."""

    __slots__ = ("_done", "_wake")

    def __init__(self, wake: Callable[[], Any]) -> None:
        self._wake = wake
        self._done = False

    def __call__(self) -> None:
        if not self._done:
            self._done = True
            # Its loop may be closed.
            with contextlib.suppress(RuntimeError):
                self._wake()
