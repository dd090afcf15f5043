"""Which proxies other nodes run, as those tell who ask the controller for tables: ``dask serve proxy``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .status import ProxyStatus

__all__ = ["SILENT_AFTER", "Elsewhere"]

#: Seconds of silence after which a node is forgotten; each asks for news every two.
SILENT_AFTER = 8.0


class Elsewhere:
    """The proxies of other nodes.

    Parameters
    ----------
    changed : callable
        Called without arguments when `rows` has changed.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._nodes: dict[str, list[ProxyStatus]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def rows(self) -> list[ProxyStatus]:
        """All processes of other nodes."""
        return [row for rows in self._nodes.values() for row in rows]

    def heard(self, name: str, rows: list[ProxyStatus]) -> None:
        """Take note of what a node told; one that has no proxies any more leaves."""
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
        if rows:
            loop = asyncio.get_running_loop()
            self._timers[name] = loop.call_later(SILENT_AFTER, self.heard, name, [])
        if rows != self._nodes.get(name, []):
            self._nodes[name] = rows
            if not rows:
                del self._nodes[name]
            self._changed()

    def close(self) -> None:
        """Forget all."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._nodes.clear()
