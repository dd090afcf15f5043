"""`distributed.as_completed` in replicas: what it waits for ends with the request that waits.

It follows each future with a task of its own on the client's loop. That task has the future, so that Dask would compute
for a request that was cancelled to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from distributed import as_completed

from ..context import request_context
from ..exceptions import RequestCancelledError

try:
    from distributed.client import _wait
except ImportError:  # pragma: no cover - a private name of distributed
    _wait = None

__all__ = ["follow_requests"]

logger = logging.getLogger("dask_serve.replica")


def follow_requests() -> None:
    """Let it look at requests, in this process. Where there is none it does as ever."""
    if getattr(as_completed, "_follows_requests", False):
        return
    track = getattr(as_completed, "_track_future", None)
    if track is None or _wait is None:  # pragma: no cover - private names of distributed
        logger.warning("This version of distributed has another as_completed: cancelled requests do not end its tasks")
        return
    following = as_completed.__next__

    async def _track_future(self: Any, future: Any) -> None:
        if request_context.get() is None or await _until_wanted(self, future):
            await track(self, future)

    def __next__(self: Any) -> Any:  # noqa: N807
        try:
            return following(self)
        except StopIteration:
            request = request_context.get()
            if request is None or not request.refuses:
                raise
        raise RequestCancelledError(f"request {request.request_id} was cancelled, which waited for Dask here")

    as_completed._track_future = _track_future
    as_completed.__next__ = as_completed.next = __next__
    as_completed._follows_requests = True


async def _until_wanted(completed: Any, future: Any) -> bool:
    """Wait for a future; False when its request was cancelled before, and it was forgotten."""
    request = request_context.get()
    assert request is not None
    waiting = asyncio.ensure_future(_wait(future))
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits there
            loop.call_soon_threadsafe(waiting.cancel)

    request.note(waiting, cancel)
    try:
        # What Dask cancelled is done too, and handed out.
        await asyncio.wait([waiting])
    finally:
        request.forget(waiting)
    if not waiting.cancelled():
        waiting.exception()
    if not request.cancelled or future.done():
        return True
    with completed.lock:
        completed.futures.pop(future, None)
    async with completed.condition:
        completed.condition.notify_all()
    with completed.thread_condition:
        completed.thread_condition.notify_all()
    return False
