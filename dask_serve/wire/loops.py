"""Event loops of our own threads: uvloop's where it is installed."""

from __future__ import annotations

try:
    from uvloop import new_event_loop
except ImportError:  # pragma: no cover - uvloop does not exist everywhere
    from asyncio import new_event_loop  # type: ignore[assignment]

__all__ = ["new_event_loop"]
