"""Tells the controller how many requests wait at the routers of one event loop, where deployments scale by that.

Nothing is done while nothing waits: the first request that has to wait starts a timer, which samples until none does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..policy.load import SAMPLE, Levels

if TYPE_CHECKING:
    from .router import Router

__all__ = ["Backlogs"]


class Backlogs:
    """Samples what waits at some routers, on their loop.

    Parameters
    ----------
    routers : mapping
        The routers by deployment id, as they come and go.
    loop : asyncio.AbstractEventLoop
    tell : callable
        Takes each report: ``source`` (the same for all of them), ``number`` (growing) and ``queued`` (by deployment id;
        what is not in it is zero).
    """

    def __init__(
        self, routers: Mapping[str, Router], loop: asyncio.AbstractEventLoop, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._routers = routers
        self._loop = loop
        self._tell = tell
        self._source = uuid.uuid4().hex
        self._number = 0
        self._levels = Levels()
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Requests wait at a router whose deployment scales by that."""
        if self._timer is None:
            # A request that comes to a busy replica usually waits shorter than this.
            self._timer = self._loop.call_later(SAMPLE, self._sample)

    def _sample(self) -> None:
        self._timer = None
        queued = {id: router.queued for id, router in self._routers.items() if router.scales}
        report = self._levels.sample(queued, monotonic())
        if report is not None:
            self._send(report)
        if not self._levels.quiet:
            self.wake()

    def _send(self, queued: dict[str, float]) -> None:
        self._number += 1
        self._tell({"source": self._source, "number": self._number, "queued": queued})

    def close(self) -> None:
        """Tell that nothing waits any more, and nothing after that."""
        if self._timer is not None:
            self._timer.cancel()
        if self._levels.told:
            self._send({})
