"""What the replicas of one worker have counted, those included that are gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..measures.counts import ReplicaCounts

__all__ = ["KEPT", "Ledger"]

#: Seconds that a replica that has ended is told by itself: Prometheus must have looked once more at least.
KEPT = 600.0


class Ledger:
    """Counts by deployment and replica. Sums by deployment only grow. Any thread may read.

    Parameters
    ----------
    clock : callable
        Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas: dict[str, tuple[str, ReplicaCounts]] = {}
        #: Replicas that have ended, and when.
        self._ended: dict[str, float] = {}
        #: Sums of those that ended long ago. To Prometheus they would be requests that came just now.
        self._older: dict[str, ReplicaCounts] = {}

    def open(self, deployment: str, replica: str) -> ReplicaCounts:
        """Return the counts of a new replica."""
        counts = ReplicaCounts()
        with self._lock:
            self._replicas[replica] = deployment, counts
        return counts

    def close(self, replica: str) -> None:
        """A replica has ended; what it counted stays."""
        with self._lock:
            if replica in self._replicas:
                self._ended[replica] = self._clock()

    def _forget(self) -> None:
        now = self._clock()
        for replica in [replica for replica, ended in self._ended.items() if now - ended > KEPT]:
            del self._ended[replica]
            deployment, counts = self._replicas.pop(replica)
            self._older.setdefault(deployment, ReplicaCounts()).merge(counts)

    def by_replica(self) -> list[tuple[str, str, ReplicaCounts]]:
        """Return deployment, replica and counts of each that is there, or has ended lately."""
        with self._lock:
            self._forget()
            return [(deployment, replica, counts) for replica, (deployment, counts) in self._replicas.items()]

    def by_deployment(self) -> dict[str, ReplicaCounts]:
        """Return the sums over all that ever were."""
        sums: dict[str, ReplicaCounts] = {}
        with self._lock:
            self._forget()
            for deployment, counts in [*self._replicas.values(), *self._older.items()]:
                sums.setdefault(deployment, ReplicaCounts()).merge(counts)
        return sums
