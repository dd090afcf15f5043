"""Generators of user code, poured into an outflow, and closed when the request is answered.

Leaving a generator to the garbage collector would run its ``finally`` some time later, on whatever thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..batching import BatchedMethod
from ..context import request_context
from ..exceptions import PayloadError
from ..wire.messages import Kind
from .execution import Answer, Execution
from .failures import answer_for
from .fetching import fetch_all
from .outflow import ItemFlow, Outflow
from .results import is_stream

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["TURN", "forget_deadline", "pour", "serve_stream"]

#: Seconds that a generator may keep its loop, or a thread that others wait for.
TURN = 0.001

_DONE, _FULL, _OTHERS = range(3)


async def serve_stream(user: UserCode, execution: Execution) -> None:
    """Answer a call from Python with what a generator yields; never raises."""
    try:
        await _stream(user, execution)
        answer = Answer(Kind.END)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller gets an answer
        answer = answer_for(execution, error)
    user.send(execution, answer)


async def _stream(user: UserCode, execution: Execution) -> None:
    call = execution.call
    user.enter(execution)
    function, is_async = user.methods.find(call.method)
    args, kwargs = user.arguments(execution, await fetch_all(execution) if call.attachments else ())
    make = partial(function, *args, **kwargs)
    if is_async:
        value = await make()
    elif _only_makes_a_generator(function):
        value = make()
    else:

        def run() -> Any:
            user.enter(execution, blocking=True)
            return make()

        value = await user.in_pool(run)
    if not is_stream(value):
        raise PayloadError(
            f"method {call.method!r} of replica {user.id} was called with stream=True and did not return a generator "
            f"but a {type(value).__name__}; call it without stream=True"
        )
    flow = ItemFlow(user, execution, user.tell)
    await pour(user, execution, value, flow, flow.put)


def _only_makes_a_generator(function: Callable[..., Any]) -> bool:
    if isinstance(function, BatchedMethod):
        return function.streams
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call)


async def pour(user: UserCode, execution: Execution, source: Any, flow: Outflow, put: Callable[[Any], None]) -> None:
    """Put all that a generator yields, no more than a window ahead of the caller; then it is closed (on the user loop).

    An asynchronous generator is run here, a plain one on the pool, where it belongs as any ``def`` does.
    """
    execution.blocking = not hasattr(type(source), "__anext__")
    if not execution.blocking:
        await _pour(execution, source, flow, put)
    else:
        await _Blocking(user, execution, source, flow, put).pour()


async def _pour(execution: Execution, source: AsyncIterator[Any], flow: Outflow, put: Callable[[Any], None]) -> None:
    first = True
    began = monotonic()
    try:
        async for item in source:
            put(item)
            if first:
                first = False
                forget_deadline()
                # It leaves before the generator goes on.
                await asyncio.sleep(0)
            elif flow.full or monotonic() - began > TURN:
                await flow.pause()
                began = monotonic()
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


def forget_deadline() -> None:
    """The deadline is for the first part of the answer: calls that the generator makes later have none of it."""
    context = request_context.get()
    if context is not None and context.deadline is not None:
        context.deadline = None


class _Blocking:
    """A plain generator, on one thread of the pool after the other, one at a time.

    It keeps its thread as long as there is room and nobody else waits for a thread; while there is no room it has none.
    """

    def __init__(
        self,
        user: UserCode,
        execution: Execution,
        generator: Iterator[Any],
        flow: Outflow,
        put: Callable[[Any], None],
    ) -> None:
        self._user = user
        self._execution = execution
        self._generator = generator
        self._flow = flow
        self._put = put
        self._pool = user.pool
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._context = contextvars.copy_context()
        self._closing = False
        self._first = True

    async def pour(self) -> None:
        self._flow.tell = self._user.tell_at_once
        self._resume()
        cancelled: asyncio.CancelledError | None = None
        while not self._done.done():
            try:
                await asyncio.shield(self._done)
            except asyncio.CancelledError as error:
                cancelled = error
                self._closing = True
                if self._pool.stopped:
                    self._close()
                    raise
                # While it waits for room it has no thread, and needs one to be closed on.
                self._flow.unpark()
        outcome = cancelled or self._done.result()
        if outcome is not None:
            raise outcome

    # ------------------------------------------------------------------ on the pool

    def _resume(self) -> None:
        self._pool.submit(self._run)

    def _run(self) -> None:
        outcome: BaseException | None = None
        try:
            # Once it is parked or submitted it may run on another thread, so that nothing is touched after that.
            while (state := self._context.run(self._turn)) != _DONE:
                if state == _OTHERS:
                    self._resume()
                    return
                if self._flow.park(self._resume):
                    return
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            outcome = error
            try:
                self._close()
            except BaseException as other:  # noqa: BLE001
                outcome = other
        # Once the loop is closed nobody waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell, outcome)

    def _turn(self) -> int:
        generator, put, flow, pool = self._generator, self._put, self._flow, self._pool
        execution = self._execution
        end = monotonic() + TURN
        while True:
            if execution.cancelled or self._closing or pool.stopped:
                raise asyncio.CancelledError
            try:
                item = next(generator)
            except StopIteration:
                return _DONE
            put(item)
            if self._first:
                self._first = False
                forget_deadline()
            if flow.full:
                return _FULL
            if pool.is_awaited and monotonic() >= end:
                return _OTHERS

    def _close(self) -> None:
        close = getattr(self._generator, "close", None)
        if close is not None:
            # It runs: the thread that runs it closes it after the present step.
            with suppress(RuntimeError, ValueError):
                self._context.run(close)

    def _tell(self, outcome: BaseException | None) -> None:
        if not self._done.done():
            self._done.set_result(outcome)
