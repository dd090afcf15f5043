"""Threads that wait for refs, and the thread that calls back."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

from dask.utils import parse_timedelta
from distributed import Future, secede
from distributed.threadpoolexecutor import rejoin
from distributed.worker import thread_state

from ..context import request_context
from ..exceptions import ConfigError, RequestCancelledError

__all__ = ["NOTHING", "call_back", "in_dask_task", "patiently", "seceded", "seconds_of", "until_cancelled"]

logger = logging.getLogger("dask_serve.refs")


def seconds_of(timeout: float | str | None) -> float | None:
    """Parse a time to wait as Dask does; numbers are seconds, and those below 0 mean not to wait."""
    if timeout is None:
        return None
    if isinstance(timeout, (int, float)):
        return max(0.0, float(timeout))
    try:
        return max(0.0, float(parse_timedelta(timeout, "s")))
    except (KeyError, ValueError, TypeError):
        raise ConfigError(f'timeout={timeout!r} is not a time: give seconds, or text like "500ms"') from None


def in_dask_task() -> bool:
    """Tell whether this thread runs a Dask task."""
    return getattr(thread_state, "key", None) is not None


#: Seconds that a Dask task waits before it gives its thread back to its worker.
SECEDE_AFTER = 0.05


def patiently(wait: Callable[[float | None], bool], seconds: float | None) -> bool:
    """Call ``wait(seconds)``; a Dask task gives its thread back meanwhile, which what it waits for may need."""
    if not in_dask_task():
        return wait(seconds)
    if wait(SECEDE_AFTER if seconds is None else min(seconds, SECEDE_AFTER)):
        return True
    with seceded():
        return wait(None if seconds is None else max(0.0, seconds - SECEDE_AFTER))


@contextlib.contextmanager
def until_cancelled(*wakes: Callable[[], object]) -> Iterator[None]:
    """Let the cancellation of a request end a wait of one of its threads.

    Parameters
    ----------
    *wakes : callable
        What lets the thread go.

    Raises
    ------
    RequestCancelledError
        The request was cancelled meanwhile.
    """
    request = request_context.get()
    if request is None:
        yield
        return
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True
        for wake in wakes:
            wake()

    request.note(end, end)
    try:
        yield
    except CancelledError:
        if not ended:
            raise
    finally:
        request.forget(end)
    if ended:
        raise RequestCancelledError(f"request {request.request_id} was cancelled, which waited here")


@contextlib.contextmanager
def seceded() -> Iterator[None]:
    """Give the thread of this task back to its worker for a while."""
    try:
        secede()
    except Exception:  # noqa: BLE001
        # The task has done so itself, or runs in an executor that knows nothing of it.
        yield
        return
    try:
        yield
    finally:
        rejoin()


def call_back(fn: Callable[[Any], Any], ref: Any) -> None:
    """Call ``fn(ref)`` in the pool that Dask runs callbacks of futures in."""
    if Future._cb_executor is None or Future._cb_executor_pid != os.getpid():
        Future._cb_executor = ThreadPoolExecutor(1, thread_name_prefix="Dask-Callback-Thread")
        Future._cb_executor_pid = os.getpid()
    Future._cb_executor.submit(_run_callback, fn, ref)


def _run_callback(fn: Callable[[Any], Any], ref: Any) -> None:
    try:
        fn(ref)
    except BaseException:
        logger.exception("Error in callback %s of %s:", fn, ref)


class _Nothing:
    """Awaited, it is None; unlike a coroutine it does not mind not being awaited."""

    __slots__ = ()

    def __await__(self) -> Iterator[Any]:
        return iter(())


NOTHING = _Nothing()
