"""Asks the controller now and then, for all pages together, and remembers the last minutes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from .history import PACE, History, Tellers
from .snapshot import Snapshot, take
from .source import Source

__all__ = ["CLOSED", "OPEN", "Sampler"]

logger = logging.getLogger("dask_serve.dashboard")

#: Seconds between two samples while a page is open, and while none is.
OPEN, CLOSED = 0.5, 5.0


class Sampler:
    """Reads a controller into a history; pages that are open make it do so more often.

    Parameters
    ----------
    source : Source
        The controller.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.history = History()
        self._tellers = Tellers(self.history)
        self._timer: asyncio.TimerHandle | None = None
        # Steps of the wall clock would tear the plots.
        self._offset = time.time() - time.monotonic()
        #: When it was done last, by the monotonic clock; what is found the first time is taken for new.
        self._sampled = time.monotonic() - 2 * CLOSED
        self.snapshot: Snapshot
        #: Seconds that the youngest of all known counts may be old.
        self._lag = PACE

    def now(self) -> float:
        """Return the time, in seconds since 1970 as it was known at the start."""
        return self._offset + time.monotonic()

    def start(self) -> None:
        """Sample from now on."""
        self._tick()

    def close(self) -> None:
        """Sample no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> Snapshot:
        """Sample for a page that is open, unless that was done a moment ago; return what is so now."""
        if time.monotonic() - self._sampled > 0.8 * OPEN:
            self._sample()
        return self.snapshot

    @property
    def complete(self) -> int:
        """The last second of which all that happened is known, if all processes tell at their pace."""
        return int(self.now() - self._lag) - 1

    def proxy_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """A proxy told what it has counted; it does so every second in which that changed."""
        self._tellers.told(source, self.now(), counts)

    def replicas_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """A worker told what its replicas have counted, for the last time."""
        self._tellers.told(source, self.now(), counts, self._offset + self._sampled)

    def _tick(self) -> None:
        if time.monotonic() - self._sampled > 0.8 * CLOSED:
            try:
                self._sample()
            except Exception:
                logger.exception("the dashboard cannot read the controller; trying again in %g s", CLOSED)
        self._timer = asyncio.get_running_loop().call_later(CLOSED, self._tick)

    def _sample(self) -> None:
        before, self._sampled = self._offset + self._sampled, time.monotonic()
        now = self.now()
        oldest, number = PACE, 0
        for worker, age, counts in self.source.heartbeats():
            number += 1
            if age < 2 * CLOSED:
                oldest = max(oldest, age)
                self._tellers.told(worker, now - age, counts, before)
        # The oldest grows from heartbeat to heartbeat.
        self._lag = max(oldest, 0.9 * self._lag)
        snapshot = take(self.source.status(), self.source.names(), self.source.ended)
        for row in snapshot.batches:
            counts = {row["deployment"]: {"batches": row["batches"], "batched": row["calls"]}}
            self._tellers.told(f"{row['replica']} {row['method']}", now, counts, before)
        self._tellers.forget(number + len(snapshot.batches))
        self.history.note(now, snapshot.levels)
        self.snapshot = snapshot
