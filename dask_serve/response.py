"""The ref: what a call returns. A Dask future that costs Dask nothing until Dask asks for its key."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, NoReturn

from distributed import Client, Future

from .context import request_context
from .exceptions import NotRunningError, PayloadError, ReplicaLostError, RequestCancelledError, ServeError
from .routing.outcome import Outcome, Stored
from .routing.promotion import submit_task, value_of
from .routing.session import Session
from .routing.state import RefState
from .routing.store import Fetched
from .session.bridge import Mirror
from .session.unread import Discard
from .session.waiting import NOTHING, call_back, patiently, seconds_of, until_cancelled
from .wire import payloads
from .wire.frames import Buffer
from .wire.loops import run_on

__all__ = ["DeploymentResponse"]

logger = logging.getLogger("dask_serve.refs")

_UNREAD = object()

#: One ref is promoted at a time in a process; a finaliser never takes it.
_promotion = threading.RLock()


def _after_fork() -> None:
    global _promotion
    _promotion = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class _Returning(threading.local):
    """Whether the thread pickles the result of a method, in which a ref would be freed before the caller has it."""

    active = False

    @staticmethod
    def refuse() -> NoReturn:
        raise PayloadError(
            "is or holds a ref, which means nothing to the caller: return its value, as in `return await "
            "handle.remote(...)`, or in a `def` `return handle.remote(...).result()`"
        )


returning = _Returning()


class DeploymentResponse(Future):
    """A ref: the result of a call, which may be on its way.

    It is a `distributed.Future`: wait for it, gather it, pass it to ``client.submit``, to `dask.delayed`, to another
    handle. Nothing about it is known to the scheduler until its ``key`` is needed there; then it becomes a real task
    (it is *promoted*). Waiting, ``result``, ``await``, ``as_completed`` and passing it to another handle promote
    nothing.

    Dropping the last reference never cancels the call; it frees the result, and an error that nobody read is logged.
    Users get refs from `DeploymentHandle.remote` and do not make them.
    """

    def __init__(self, session: Session, state: RefState, blocking_loop: Callable[[], str | None]) -> None:
        # Not Future.__init__: it would tell the client of a key.
        self._session = session
        self._local = state
        self._inner: Future | None = None
        #: A call that has the ref as an argument fetches the stored value too: the value stays when the ref is
        #: promoted.
        self._shared = False
        self._decoded: Any = _UNREAD
        self._read = False
        self._cancel: Callable[[], None] | None = None
        self._blocked = blocking_loop
        self._id = (Future._uid, next(Future._counter))
        self._cleared = False

    # ------------------------------------------------------------------ what Dask asks

    @property
    def client(self) -> Any:
        """The Dask client behind the ref; in a worker it is the one of `get_client`, made at first use."""
        if self._inner is not None:
            return self._inner.client
        owner = self._session.owner
        return owner if isinstance(owner, Client) else owner._get_client()

    @property
    def _client(self) -> Any:
        return self.client

    @property
    def _generation(self) -> int:
        return int(self.client.generation)

    @property
    def key(self) -> Any:
        """The Dask key. Asking for it promotes the ref."""
        return self._promote().key

    @property
    def _state(self) -> Any:
        return self._local if self._inner is None else self._inner._state

    @property
    def request_id(self) -> str:
        """The request's id, as it stands in logs and errors."""
        return self._local.request_id

    def bind_client(self, client: Any) -> None:
        """Nothing to do: a ref belongs to the client of its handle."""

    def _bind_late(self) -> None:
        pass

    def _verify_initialized(self) -> None:
        pass

    # ------------------------------------------------------------------ results

    def result(self, timeout: float | str | None = None, *, timeout_s: float | None = None) -> Any:
        """Wait for the result and return it.

        Parameters
        ----------
        timeout : float or str, optional
            How long to wait, in seconds or as text that Dask parses ("500ms"). It never cancels the call.
            ``timeout_s`` is an alias.

        Returns
        -------
        object
            What the method returned; an awaitable of it when the client is asynchronous.

        Raises
        ------
        TimeoutError
            ``timeout`` has passed; the call goes on.
        RequestError
            The request failed: `ReplicaLostError`, `RequestTimeoutError`, `BackPressureError`, ...
        Exception
            What the method raised, with its remote traceback as the cause.
        """
        seconds = seconds_of(timeout if timeout_s is None else timeout_s)
        if self._session.is_asynchronous:
            return self._result_within(seconds)
        if self._decoded is not _UNREAD:
            return self._decoded
        self._refuse_to_block("result()")
        begun = time.monotonic()
        if not self._wait_in_thread(seconds):
            raise TimeoutError(f"no result of request {self.request_id} within {seconds:g} s; the call goes on")
        return self.take_in_thread(None if seconds is None else max(0.0, begun + seconds - time.monotonic()))

    def _wait_in_thread(self, seconds: float | None) -> bool:
        local = self._local
        if local.status != "pending":
            return True
        self._refuse_in_a_fork()
        request = request_context.get()
        ended = patiently(lambda left: local.wait_in_thread(left, request), seconds)
        if ended and request is not None and local.status == "pending":
            raise RequestCancelledError(f"request {request.request_id} was cancelled, which waited here")
        return ended

    def take_in_thread(self, seconds: float | None) -> Any:
        """Return the value of a call that has ended, fetched if it is elsewhere."""
        if self.is_elsewhere():
            fetching = self._session.on_engine(self.find_stored())
            try:
                with until_cancelled(fetching.cancel):
                    found = fetching.result(seconds)
            except concurrent.futures.TimeoutError:
                if fetching.done():  # it is the error of the call
                    raise
                fetching.cancel()
                raise TimeoutError(f"the result of request {self.request_id} was not fetched in time") from None
            self.decode(*found)
        return self.value()

    async def _result_within(self, seconds: float | None) -> Any:
        if self._local.status == "pending":
            self._refuse_in_a_fork()
            await self._local.wait(seconds)
        return await self._result()

    async def _result(self, raiseit: bool = True) -> Any:
        if self._local.status == "pending":
            self._refuse_in_a_fork()
            await self._local.wait()
        outcome = self._local.outcome
        assert outcome is not None
        if not raiseit and outcome.parts is None and outcome.stored is None:
            # The form in which `as_completed` wants errors.
            self._read = True
            error = outcome.exception()
            return type(error), error, None
        if self.is_elsewhere():
            self.decode(*await self.find_stored())
        return self._value(outcome)

    def is_elsewhere(self) -> bool:
        """The call has ended, and its value has to be fetched."""
        outcome = self._local.outcome
        return outcome is not None and outcome.stored is not None and self._decoded is _UNREAD

    async def find_stored(self) -> tuple[Sequence[Buffer] | None, Any]:
        """Fetch the value from the store that has it, or from Dask, which has it once the ref is promoted.

        Returns
        -------
        tuple
            For `decode`: its bytes, or None and itself.
        """
        outcome = self._local.outcome
        assert outcome is not None
        if outcome.stored is None:
            # Another thread or loop was faster, and took it over.
            return outcome.parts, None
        inner = self._inner
        if inner is None:
            try:
                fetched = await self._session.fetch(*outcome.stored[:3])
                self._take_over(outcome.stored, fetched)
                return fetched.parts, None
            except ReplicaLostError:
                parts = self._taken_over()
                if parts is not None:
                    return parts, None
                inner = self._inner
                if inner is None:
                    raise
        return None, await run_on(inner.client.loop.asyncio_loop, value_of(inner))

    def decode(self, parts: Sequence[Buffer] | None, value: Any) -> None:
        """Keep what `find_stored` has found. Not on the engine's loop: to unpickle may take long."""
        self._decoded = value if parts is None else payloads.loads(parts)

    def value(self) -> Any:
        """Return the value, which is here, or raise the exception."""
        outcome = self._local.outcome
        assert outcome is not None
        return self._value(outcome)

    def _take_over(self, stored: Stored, fetched: Fetched) -> None:
        """Where the store has little room left, the value is here from now on."""
        if not fetched.tight:
            return
        with _promotion:
            if self._inner is not None or self._shared or self._taken_over() is not None:
                return
            self._local.outcome = Outcome(parts=fetched.parts)
        self._session.release(stored.process, stored.name)

    def _taken_over(self) -> Sequence[Buffer] | None:
        """Return the serialised value if it is here, and was perhaps in a store before."""
        outcome = self._local.outcome
        return None if outcome is None else outcome.parts

    def _value(self, outcome: Outcome) -> Any:
        self._read = True
        if self._decoded is not _UNREAD:
            return self._decoded
        if outcome.parts is not None:
            self._decoded = value = payloads.loads(outcome.parts)
            return value
        error = outcome.exception()
        assert error is not None
        raise error

    def __await__(self) -> Generator[Any, None, Any]:
        state = self._local
        if state.status == "pending":
            self._refuse_in_a_fork()
            try:
                yield from state.waiter()
            except asyncio.CancelledError:
                # Whoever awaits a ref and is cancelled does not want the result any more.
                self.cancel()
                raise
        outcome = state.outcome
        if outcome is not None and (outcome.stored is None or self._decoded is not _UNREAD):
            return self._value(outcome)
        return (yield from self._result().__await__())

    def exception(self, timeout: float | str | None = None, *, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """Wait for the end of the call; return its exception, or None. An awaitable when the client is asynchronous."""
        seconds = seconds_of(timeout if timeout_s is None else timeout_s)
        if self._session.is_asynchronous:
            return self._exception(seconds)
        self._refuse_to_block("exception()")
        if not self._wait_in_thread(seconds):
            raise TimeoutError(f"request {self.request_id} did not end within {seconds:g} s; the call goes on")
        self._read = True
        return self._local.settled().exception()

    async def _exception(self, seconds: float | None = None) -> BaseException | None:
        await self._local.wait(seconds)
        self._read = True
        return self._local.settled().exception()

    def traceback(self, timeout: float | str | None = None, **kwargs: Any) -> Any:
        """Wait for the end of the call; return the traceback of its exception, or None.

        It is made from the text of the remote one: files, functions and lines are true, and local variables are not
        there. An awaitable when the client is asynchronous. Errors that user code did not raise have none.
        """
        if self._session.is_asynchronous:
            return self._traceback(seconds_of(timeout))
        self.exception(timeout)
        return self._remote_traceback()

    async def _traceback(self, seconds: float | None) -> TracebackType | None:
        await self._exception(seconds)
        return self._remote_traceback()

    def _remote_traceback(self) -> TracebackType | None:
        outcome = self._local.outcome
        return None if outcome is None or outcome.raised is None else payloads.load_traceback(outcome.raised[0])

    def _refuse_in_a_fork(self) -> None:
        if self._session.forked:
            raise NotRunningError(
                f"the call of request {self.request_id} belongs to the process that this one was forked from, and can "
                "be waited for only there"
            )

    def _refuse_to_block(self, what: str) -> None:
        if self._local.status == "pending" or self.is_elsewhere():
            why = "the event loop that carries the call" if self._local.is_at_home() else self._blocked()
            if why is not None:
                raise ServeError(f"{what} would block {why}; use `await ref` there")

    # ------------------------------------------------------------------ cancelling, callbacks

    def cancel(self, reason: str | None = None, msg: str | None = None, **kwargs: Any) -> Any:
        """Cancel the request wherever it is.

        At the router it is never sent, an ``async def`` gets
        `asyncio.CancelledError`, a ``def`` that runs finishes and its result is dropped. A settled ref is left
        alone.
        """
        if self._cancel is not None and self._local.status == "pending" and not self._session.forked:
            self._cancel()
        return NOTHING if self._session.is_asynchronous else None

    def cancelled(self) -> bool:
        """The request was cancelled."""
        return bool(self._local.status == "cancelled")

    def retry(self, **kwargs: Any) -> Any:
        """Not possible for a request.

        Raises
        ------
        ServeError
            Always; call the handle again.
        """
        raise ServeError("a request cannot be retried; call handle.remote(...) again")

    def add_done_callback(self, fn: Callable[[DeploymentResponse], Any]) -> None:
        """Call ``fn(ref)`` once the call has ended, in a thread of Dask's pool for callbacks."""
        self._local.on_done(functools.partial(call_back, fn, self))

    def as_concurrent_future(self) -> Mirror:
        """Return a `concurrent.futures.Future` that follows the ref.

        For `concurrent.futures.wait` and ``as_completed``, ``asyncio.wrap_future``, and libraries that know no Dask. It
        ends with the value or the exception of the ref; to cancel it cancels the request. Its callbacks run in the
        thread of Dask's pool for callbacks, which also fetches large values.

        Examples
        --------
        >>> from concurrent.futures import wait
        >>> done, waiting = wait([ref.as_concurrent_future() for ref in refs], timeout=1)  # doctest: +SKIP
        """
        return Mirror(self)

    # ------------------------------------------------------------------ promotion

    def _promote(self) -> Future:
        inner = self._inner
        if inner is None:
            # In a worker this may have to make a client first.
            client = self.client
            with _promotion:
                inner = self._inner
                if inner is None:
                    key = f"serve-{self._local.method.strip('_')}-{uuid.uuid4().hex}"
                    inner = self._inner = submit_task(client, self._session, self._local, key, self._shared)
                    self._read = True
                    if self._local.outcome is None:
                        client.loop.add_callback(_cancel_with, inner._state, weakref.ref(self))
        return inner

    def share(self) -> Future | None:
        """Keep the stored value even when the ref is promoted: a call is about to fetch it.

        Returns
        -------
        Future or None
            What to fetch instead where the ref is promoted already.
        """
        if self._inner is None:
            with _promotion:
                if self._inner is None:
                    self._shared = True
        return self._inner

    def __reduce__(self) -> tuple[Any, ...]:
        if returning.active:
            returning.refuse()
        return Future, (self.key,)

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self._id

    # ------------------------------------------------------------------ the end

    def release(self) -> None:
        """Let go of the result; it never cancels the call, and never promotes the ref."""
        if self._cleared:
            return
        self._cleared = True
        inner, self._inner = self._inner, None
        if inner is not None:
            # The task frees the value once it has taken it; if it never runs, or calls share the value, nobody does.
            if self._shared or inner.status == "pending":
                session = self._session
                session.later(session.leftovers.add, inner.key, self._local)
            return
        if self._session.forked:
            return
        # No lock is taken here: the garbage collector calls this anywhere, and may hold one. The outcome is looked at
        # before and after the flag is set: whichever side comes second sees the other.
        state = self._local
        if state.outcome is not None and state.outcome.parts is not None:
            return
        discard = Discard(self._session, self._read)
        if state.outcome is None:
            state.unwanted = discard
        if state.outcome is not None:
            discard(state.outcome)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - contextlib may be gone already
            self.release()
        # Not fully made, or the interpreter or a loop is going down.
        except (AttributeError, RuntimeError):
            pass

    def __repr__(self) -> str:
        promoted = "" if self._inner is None else f", key: {self._inner.key}"
        return f"<DeploymentResponse: {self._local.status}, {self._local.method}, request: {self.request_id}{promoted}>"

    def _repr_html_(self) -> str:
        import html

        return f"<code>{html.escape(repr(self))}</code>"

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return self is other


async def _cancel_with(task: Any, reference: weakref.ref[DeploymentResponse]) -> None:
    """Cancel a call with the task that its ref became, which is all that ``client.cancel([ref])`` knows of it.

    Runs on the client's loop.
    """
    await task.wait()
    ref = reference()
    # The end of the ref looks the same to Dask.
    if ref is not None and not ref._cleared and task.status == "cancelled":
        ref.cancel()
