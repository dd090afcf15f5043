"""Event loops of our own threads, uvloop's where it is installed; and the one that runs here."""

from __future__ import annotations

import asyncio
import contextvars

try:
    from uvloop import new_event_loop as _new_event_loop
except ImportError:  # pragma: no cover - uvloop does not exist everywhere
    from asyncio import new_event_loop as _new_event_loop  # type: ignore[assignment]

__all__ = ["new_event_loop", "running_loop"]


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
