"""Event loops of our own threads, uvloop's where it is installed; the one that runs here; work for another one."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

try:
    from uvloop import new_event_loop as _new_event_loop
except ImportError:  # pragma: no cover - uvloop does not exist everywhere
    from asyncio import new_event_loop as _new_event_loop  # type: ignore[assignment]

__all__ = ["new_event_loop", "run_on", "running_loop"]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, uvloop's where it is installed.

    uvloop's keeps the context that it is made in, which is an empty one here: that of a request has a replica's model.
    """
    return contextvars.Context().run(_new_event_loop)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await a coroutine that has to run on ``loop``, from any loop."""
    if loop is asyncio.get_running_loop():
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))
