"""The controller as the dashboard sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .events import KEPT, KINDS, Event, Events
from .measures import Measures
from .status import ServeStatus

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Shown"]


class Shown:
    """What `dask_serve.dashboard.source.Source` asks for.

    Parameters
    ----------
    scheduler : Scheduler
    status : callable
        Returns what runs, with what the workers told last.
    measures : Measures
    events : Events
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        status: Callable[[], ServeStatus],
        measures: Measures,
        events: Events,
    ) -> None:
        self._scheduler = scheduler
        self._measures = measures
        self._events = events
        self.status = status
        #: Why there is no controller any more.
        self.ended = ""

    def names(self) -> dict[str, str]:
        """Return the names of all workers by address."""
        return {address: str(worker.name) for address, worker in self._scheduler.workers.items()}

    def heartbeats(self) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
        """Return a name of each worker's process, how many seconds ago it told, and its counts by deployment."""
        now = time.time()
        for source, told, counts in self._measures.heartbeats():
            yield source, max(now - told, 0.0), counts

    def events(self) -> list[Event]:
        """Return the decisions that are remembered, the oldest first."""
        return self._events.latest(KEPT)

    @staticmethod
    def line_of(kind: str) -> str:
        """Return to which line of the time line a kind of decision belongs."""
        return KINDS[kind]
