"""The state of a ref: settled once, from any thread; waited for from any thread and any event loop.

Dask's own ``FutureState`` is bound to one loop: set from another thread it wakes nobody, and a second loop that waits
gets a RuntimeError. This one knows no loop. A waiting thread blocks on a lock, a waiting coroutine on a future of the
loop it runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..wire.frames import Buffer
from ..wire.messages import Chunk, Reply
from .outcome import Outcome, PythonCall, Stored

__all__ = ["RefState"]

logger = logging.getLogger("dask_serve.refs")


if sys.version_info >= (3, 11):
    _Timeout = TimeoutError
else:

    class _Timeout(asyncio.TimeoutError, TimeoutError):
        """Both classes of that name: Dask's users catch asyncio's."""


class RefState(PythonCall):
    """A request from Python, and what became of it.

    Its outcome is changed in one case only: a stored value is taken over by its ref.
    """

    __slots__ = (
        "_callbacks",
        "_lock",
        "_waiter",
        "unwanted",
    )

    # What Dask reads of a future's state.
    key: ClassVar[None] = None
    type: ClassVar[None] = None
    traceback: ClassVar[None] = None

    def __init__(self, method: str, parts: Sequence[Buffer], request_id: str) -> None:
        super().__init__(method, parts, request_id)
        self.status = "pending"
        self.outcome = self.home = self.request = self.keep = None
        self.thread = 0
        #: The ref is gone: nobody will read the outcome.
        self.unwanted: Callable[[Outcome], None] | None = None
        self._callbacks: list[Callable[[], None]] | None = []
        #: The first to wait on the home loop: the usual one, for whom no callback is made.
        self._waiter: asyncio.Future[None] | None = None
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ settling

    def settle(self, status: str, outcome: Outcome) -> bool:
        """Set the outcome, from any thread; False when it was set already. Callbacks run in this thread."""
        with self._lock:
            if self._callbacks is None:
                return False
            self.outcome = outcome
            self.status = status
            callbacks, self._callbacks = self._callbacks, None
            waiter = self._waiter
        if waiter is not None and self.home is not None:
            _wake(waiter, self.home, self.thread)
        self.parts = ()
        if self.request is not None or self.keep is not None:
            self._let_go()
        # The target stays: the answer to a cancelled request still comes, and is counted there.
        for callback in callbacks:
            try:
                callback()
            except Exception:
                # This may run on the router's loop, where it would break a connection that others share.
                logger.exception("A callback of request %s failed", self.request_id)
        if self.unwanted is not None:
            self.unwanted(outcome)
        return True

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once it is settled, in the thread that settles it (or at once). It must not block."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        callback()

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        if reply.stored:
            link = self.target[1].link
            self.settle("finished", Outcome(stored=Stored(link.process, link.door, reply.stored, reply.nbytes)))
        else:
            self.settle("finished", Outcome(parts))

    def on_chunk(self, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        raise NotImplementedError("calls from Python are answered whole")

    # ------------------------------------------------------------------ waiting

    def done(self) -> bool:
        """It is settled."""
        return self.status != "pending"

    def settled(self) -> Outcome:
        """Return the outcome, which is there."""
        assert self.outcome is not None
        return self.outcome

    @property
    def exception(self) -> BaseException | None:
        """The exception, as Dask reads it: a new object each time; of a cancelled request Dask's own."""
        if self.outcome is None:
            return None
        error = self.outcome.exception()
        if self.status == "cancelled":
            from distributed.client import FutureCancelledError

            return FutureCancelledError(self.request_id, str(error))  # type: ignore[no-any-return]
        return error

    def wait_in_thread(self, timeout: float | None, request: Any = None) -> bool:
        """Block until it is settled, at most ``timeout`` seconds; False when they have passed.

        Parameters
        ----------
        request : RequestContext, optional
            The request for which the thread waits: its cancellation ends the wait too (True).
        """
        if self.status != "pending":
            return True
        gate = threading.Lock()
        gate.acquire()
        open_gate: Callable[[], None] = gate.release
        if request is not None:
            open_gate = functools.partial(_open, gate)
            request.note(gate, open_gate)
        self.on_done(open_gate)
        arrived = False
        try:
            arrived = gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        finally:
            if request is not None:
                request.forget(gate)
            if self.status == "pending":
                self._forget(open_gate)
        return arrived

    def _forget(self, callback: Callable[[], None]) -> None:
        """Nobody waits any more: who asks again and again leaves nothing behind."""
        with self._lock:
            if self._callbacks is not None:
                with contextlib.suppress(ValueError):
                    self._callbacks.remove(callback)

    async def wait(self, timeout: float | None = None) -> None:
        """Wait on the running loop, whichever it is; at most ``timeout`` seconds.

        Raises
        ------
        TimeoutError
            They have passed.
        """
        if self.status == "pending":
            waiter = self.waiter()
            if timeout is None:
                await waiter
            else:
                try:
                    await asyncio.wait_for(waiter, timeout)
                except asyncio.TimeoutError:
                    raise _Timeout(f"request {self.request_id} did not end within {timeout:g} s") from None

    def waiter(self) -> asyncio.Future[None]:
        """Return a future of the running loop that ends when this is settled."""
        home, thread = self.home, threading.get_ident()
        if home is not None and self.thread == thread and home.is_running():
            future: asyncio.Future[None] = home.create_future()
            with self._lock:
                if self._waiter is None and self._callbacks is not None:
                    self._waiter = future
                    return future
            loop = home
        else:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
        self.on_done(lambda: _wake(future, loop, thread))
        return future


def _wake(future: asyncio.Future[None], loop: asyncio.AbstractEventLoop, thread: int) -> None:
    """End a future of the loop that runs in ``thread``, from any thread."""
    if threading.get_ident() == thread and loop.is_running():
        if not future.done():
            future.set_result(None)
    else:
        # The loop that waits may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))


def _open(gate: threading.Lock) -> None:
    """Let a thread go that waits; it may have been let go already."""
    with contextlib.suppress(RuntimeError):
        gate.release()
