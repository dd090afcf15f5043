"""Refs and Dask futures among the arguments of a call: waited for here, fetched by the replica from where they are."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

from distributed import Future

from ..exceptions import PayloadError, RequestCancelledError, RequestTimeoutError, ServeError
from ..response import Assigned, DeploymentResponse
from ..routing.session import Session
from ..routing.state import Outcome, RefState
from ..routing.stream import StreamState
from ..wire import payloads
from ..wire.frames import Buffer
from ..wire.messages import Attachment
from . import web

__all__ = ["Arguments", "culprit"]


class _Failed(Exception):
    """One of the arguments failed, or cannot be had: so does the call, which never runs."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Arguments:
    """The refs and futures of one call.

    They are left out of the pickle of the arguments. `wait_and_submit` waits on the loop whose router carries the call.
    """

    __slots__ = ("_session", "_state", "_task", "_timeout", "_values")

    def __init__(self, session: Session, state: RefState | StreamState, timeout: float | None) -> None:
        self._session = session
        self._state = state
        self._timeout = timeout
        self._values: list[Any] = []
        self._task: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def reducers(self) -> payloads.Reducers:
        """How the pickle leaves them out."""

        def stand_in(value: Any) -> tuple[Any, ...]:
            if isinstance(value, Assigned):
                value = value.ref
            # Where pickle stumbled, cloudpickle comes by once more.
            place = next((i for i, known in enumerate(self._values) if known is value), len(self._values))
            if place == len(self._values):
                self._values.append(value)
            return payloads.attached, (place,)

        return {DeploymentResponse: stand_in, Assigned: stand_in, Future: stand_in, **web.reducers()}

    # ------------------------------------------------------------------ on the loop that carries the call

    def start(self, submit: Callable[[float | None], None]) -> None:
        """Begin to wait; ``submit`` is called with the seconds that are left once all are there."""
        self._state.keep = self._values
        if not self._state.done():
            self._task = asyncio.get_running_loop().create_task(self._wait_and_submit(submit))

    def cancel(self) -> bool:
        """Stop waiting; False when the call has left."""
        task, self._task = self._task, None
        if task is None:
            return False
        task.cancel()
        # Not by the task: cancelled before its first step, it takes none.
        self._state.fail(RequestCancelledError(f"request {self._state.request_id} was cancelled"))
        return True

    async def _wait_and_submit(self, submit: Callable[[float | None], None]) -> None:
        state = self._state
        begun = time.monotonic()
        try:
            await asyncio.wait_for(self._attach(), self._timeout)
        except _Failed as failed:
            state.settle("error", failed.outcome)
        except asyncio.TimeoutError:
            state.fail(
                RequestTimeoutError(
                    f"request {state.request_id} reached its deadline after {self._timeout:.3g} s, "
                    "waiting for a ref or a Dask future among its arguments"
                )
            )
        except asyncio.CancelledError:
            state.fail(RequestCancelledError(f"request {state.request_id} was cancelled"))
        except Exception as error:  # noqa: BLE001
            message = f"an argument of {state.method!r} could not be had: {error!r}"
            state.settle("error", Outcome(error=(ServeError.__name__, message)))
        else:
            submit(None if self._timeout is None else max(1e-3, self._timeout - (time.monotonic() - begun)))
        finally:
            self._task = None

    async def _attach(self) -> None:
        waiting = [asyncio.ensure_future(self._ready(value)) for value in self._values]
        try:
            ready = await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
        parts = list(self._state.parts)
        for _, inline in ready:
            parts.extend(inline)
        self._state.attachments = [attachment for attachment, _ in ready]
        self._state.parts = parts

    async def _ready(self, value: Any) -> tuple[Attachment, list[Buffer]]:
        """Wait for one value; return where the replica finds it, or the value."""
        if not isinstance(value, DeploymentResponse):
            return await self._dask_key(value), []
        value._read = True
        await value._local.wait()
        outcome = value._local.outcome
        assert outcome is not None
        if outcome.parts is not None:
            return Attachment(parts=len(outcome.parts)), list(outcome.parts)
        if outcome.stored is None:
            raise _Failed(outcome)
        promoted = value.share()
        if promoted is not None:
            return await self._dask_key(promoted), []
        stored = outcome.stored
        if value._session.address == self._session.address:
            return Attachment(stored.process, stored.door, stored.name), []
        # Another cluster's process lets only its own in: the value goes through here.
        parts = await value._session.fetch(stored.process, stored.door, stored.name)
        return Attachment(parts=len(parts)), list(parts)

    async def _dask_key(self, future: Future) -> Attachment:
        client = future.client
        if client is None:
            raise _Failed(_refusal(f"the Dask future {future.key} has no client here"))
        if client.scheduler is None or client.scheduler.address != self._session.address:
            where = "none" if client.scheduler is None else client.scheduler.address
            raise _Failed(
                _refusal(
                    f"the Dask future {future.key} belongs to another cluster ({where}) than the handle "
                    f"({self._session.address}); pass its result"
                )
            )
        loop = client.loop.asyncio_loop
        if loop is asyncio.get_running_loop():
            await future._state.wait()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(future._state.wait(), loop))
        if future.status != "finished":
            error = future._state.exception
            if not isinstance(error, Exception):
                error = ServeError(f"the Dask future {future.key} is {future.status}")
            raise _Failed(Outcome(raised=payloads.dump_exception(error)))
        return Attachment(key=future.key)


def _refusal(message: str) -> Outcome:
    return Outcome(error=(PayloadError.__name__, message))


def culprit(args: tuple[Any, ...], kwargs: dict[str, Any], reducers: payloads.Reducers) -> str:
    """Name the argument that cannot be pickled, the place in it, and what to send instead."""
    for name, value in [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]:
        if not _can_be_pickled(value, reducers):
            place, inner = _place(value, reducers)
            hint = next((hint for test, hint in _HINTS if test(inner)), "")
            return f"{name}{place} ({type(inner).__name__}{hint})"
    return "an argument"


def _place(value: Any, reducers: payloads.Reducers) -> tuple[str, Any]:
    """Find what cannot be pickled inside of containers."""
    items: Any = ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    for key, item in items:
        if not _can_be_pickled(item, reducers):
            place, inner = _place(item, reducers)
            return f"[{key!r}]{place}", inner
    return "", value


def _can_be_pickled(value: Any, reducers: payloads.Reducers) -> bool:
    try:
        payloads.dumps(value, reducers)
    except PayloadError:
        return False
    return True


_HINTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.iscoroutine, ": await it, and pass what it returns"),
    (inspect.isgenerator, ": pass a list of what it yields"),
    (inspect.isasyncgen, ": pass a list of what it yields"),
    (inspect.isawaitable, ": await it, and pass what it returns"),
)
