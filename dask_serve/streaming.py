"""The stream: what a call with ``stream=True`` returns."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from .exceptions import NotRunningError, PayloadError, RequestCancelledError, ServeError
from .routing.session import Session
from .routing.stream import StreamState
from .session.assigned import Assigned
from .session.waiting import patiently
from .wire.chunks import thaw
from .wire.messages import WINDOW_STEP

__all__ = ["AssignedStream", "DeploymentResponseGenerator"]

#: What was found: something, nothing yet, nothing any more.
_ITEMS, _WAIT, _END = range(3)


class DeploymentResponseGenerator:
    """A stream: what a generator method of a deployment yields, as it yields it.

    Iterate with ``async for`` in any event loop, or with ``for``. The replica is at most 256 KiB ahead (an item counts
    as 1 KiB at least): whoever consumes slowly slows the generator down. What the generator raises arrives as
    itself, behind the items that it yielded before.

    A stream that is closed early, or dropped, closes its generator, which runs its ``finally``. Of several threads that
    iterate over one stream each gets other items.

    Users get streams from ``handle.options(stream=True).method.remote(...)`` and do not make them.
    """

    def __init__(self, session: Session, state: StreamState, blocking_loop: Callable[[], str | None]) -> None:
        self._session = session
        self._local = state
        self._cancel: Callable[[], None] | None = None
        self._blocked = blocking_loop
        #: Items of the present entry, the next one last, and what the entry counts.
        self._ready: list[Any] = []
        self._cost = 0
        #: Consumed, and not told yet.
        self._consumed = 0
        self._turn = threading.Lock()
        self._closed = self._cancelled = False

    @property
    def request_id(self) -> str:
        """The request's id, as it stands in logs and errors."""
        return self._local.request_id

    # ------------------------------------------------------------------ iterating

    def __iter__(self) -> DeploymentResponseGenerator:
        return self

    def __next__(self) -> Any:
        """Wait for the next item and return it.

        Raises
        ------
        StopIteration
            The generator has returned, or the stream was closed.
        RequestError
            The request failed: `ReplicaLostError`, `RequestCancelledError`, `RequestTimeoutError`, ...
        Exception
            What the generator raised, with its remote traceback as the cause.
        ServeError
            Waiting here would block an event loop; use ``async for``.
        """
        try:
            return self._ready.pop()
        except IndexError:
            return self._next()

    def _next(self) -> Any:
        self._refuse_to_block()
        with self._turn:
            while True:
                try:
                    return self._ready.pop()
                except IndexError:
                    found = self._advance()
                if found == _END:
                    raise StopIteration
                if found == _WAIT:
                    patiently(self._local.wait_in_thread, None)

    def _refuse_to_block(self) -> None:
        self._refuse_in_a_fork()
        why = "the event loop of the asynchronous client" if self._session.is_asynchronous else self._blocked()
        if why is None and self._local.is_at_home():
            why = "the event loop that carries the stream"
        if why is not None:
            raise ServeError(f"`for` over {self!r} would block {why}; use `async for` there")

    def _refuse_in_a_fork(self) -> None:
        if self._session.forked:
            raise NotRunningError(
                f"{self!r} belongs to the process that this one was forked from, and can be consumed only there"
            )

    def __aiter__(self) -> DeploymentResponseGenerator:
        return self

    async def __anext__(self) -> Any:
        """Wait for the next item and return it; cancelling the task that waits closes the stream.

        Raises what ``__next__`` raises, with StopAsyncIteration at the end.
        """
        try:
            return self._ready.pop()
        except IndexError:
            pass
        self._refuse_in_a_fork()
        if not self._turn.acquire(blocking=False):
            raise ValueError(f"{self!r} is already being iterated, by another task or thread")
        try:
            while True:
                found = self._advance()
                if found == _ITEMS:
                    return self._ready.pop()
                if found == _END:
                    raise StopAsyncIteration
                await self._local.waiter()
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._turn.release()

    def _advance(self) -> int:
        """Make the next entry's items ready; raise what the stream ended with."""
        if self._cancelled:
            raise RequestCancelledError(f"request {self.request_id} was cancelled")
        if self._closed:
            return _END
        self._report()
        state = self._local
        # In this order: items that came before the end are seen here.
        outcome = state.outcome
        try:
            count, parts = state.entries.popleft()
        except IndexError:
            if outcome is None:
                return _WAIT
            self._closed = True
            error = outcome.exception()
            if error is not None:
                raise error from error.__cause__
            return _END
        try:
            items, self._cost, rest = thaw(count, parts)
        except BaseException:
            self.close()
            raise
        if rest is not None:
            state.entries.appendleft((-1, rest))
        if len(items) == 1:
            # It is with the consumer in a moment: the generator may make another one meanwhile.
            self._report()
        items.reverse()
        self._ready = items
        return _ITEMS

    def _report(self) -> None:
        """An entry is consumed: let the generator go on, in steps."""
        self._consumed += self._cost
        self._cost = 0
        state = self._local
        if self._consumed < WINDOW_STEP or state.outcome is not None:
            return
        consumed, self._consumed = self._consumed, 0
        # A loop that is closed has ended its streams.
        with contextlib.suppress(RuntimeError):
            if state.home is None:
                self._session.engine()[0].put(state.widen, consumed)
            elif state.thread == threading.get_ident():
                state.widen(consumed)
            else:
                state.home.call_soon_threadsafe(state.widen, consumed)

    # ------------------------------------------------------------------ the end

    def cancel(self) -> None:
        """Cancel the request wherever it is; whoever iterates gets `RequestCancelledError`.

        An ``async def`` generator that waits gets `asyncio.CancelledError`, one that has yielded is closed, as is a
        ``def`` generator after its present step. A stream that has ended is left alone.
        """
        if not self._closed:
            self._cancelled = True
            self._stop()

    def cancelled(self) -> bool:
        """The request was cancelled."""
        return self._cancelled or self._local.status == "cancelled"

    def close(self) -> None:
        """End the stream early: nothing more comes out of it, and the generator runs its ``finally`` in the replica."""
        if not self._cancelled:
            self._closed = True
        self._stop()

    async def aclose(self) -> None:
        """Do what `close` does; it does not wait for the generator."""
        self.close()

    def _stop(self) -> None:
        self._ready = []
        if self._cancel is not None and not self._local.done():
            self._cancel()
        self._local.entries.clear()

    def __enter__(self) -> DeploymentResponseGenerator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> DeploymentResponseGenerator:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # No lock is taken, and no router is called from here: the garbage collector may run inside of it.
        try:
            state = self._local
            if self._cancel is None or state.outcome is not None:
                return
            if state.home is None:
                self._cancel()
            else:
                state.home.call_soon_threadsafe(self._cancel)
        # Not fully made, or the interpreter or a loop is going down.
        except (AttributeError, RuntimeError):
            pass

    # ------------------------------------------------------------------ what it is not

    def __await__(self) -> Generator[Any, None, Any]:
        self._misused("awaited")

    def result(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible for a stream.

        Raises
        ------
        PayloadError
            Always, which is a TypeError too; iterate.
        """
        self._misused("asked for its result()")

    def _misused(self, how: str) -> NoReturn:
        raise PayloadError(
            f"{self!r} is a stream and cannot be {how}; iterate over it with `async for` or `for`, or call the handle "
            "without stream=True"
        )

    def __reduce__(self) -> NoReturn:
        raise PayloadError(
            f"{self!r} is a stream and cannot be sent elsewhere; pass its items (`list(stream)`), or pass the handle "
            "and iterate in the deployment that is called"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed and not self._cancelled else self._local.status
        return f"<DeploymentResponseGenerator: {state}, {self._local.method}, request: {self.request_id}>"


class AssignedStream(Assigned):
    """What a handle with ``sync=False`` and ``stream=True`` returns: awaited, it is the stream."""

    __slots__ = ()

    def __iter__(self) -> NoReturn:
        raise PayloadError(
            "a handle with sync=False returns what has to be awaited for the stream: "
            "`async for item in await handle.options(stream=True).method.remote(...)`"
        )

    __aiter__ = __iter__
