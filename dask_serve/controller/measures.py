"""What all replicas and proxies have counted, those included that are gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..measures.counts import HttpCounts, ReplicaCounts
from ..measures.totals import Totals
from ..replica.process import COUNTS, source_of

if TYPE_CHECKING:
    from distributed.scheduler import WorkerState

__all__ = ["Measures"]

#: Seconds in which a worker that has left may still tell what it counted at last.
LATE = 120.0


class Measures:
    """Counts of the cluster by deployment (``application/deployment``).

    They grow as long as the controller lives, whatever restarts meanwhile. What a process counted after it told last
    is lost only where it is killed: a replica's within a heartbeat of Dask's, a proxy's within a second.
    Nothing is added up until somebody asks.
    """

    def __init__(self) -> None:
        self._http: Totals[HttpCounts] = Totals(HttpCounts)
        self._replicas: Totals[ReplicaCounts] = Totals(ReplicaCounts)
        self._workers: dict[str, WorkerState] = {}
        #: Exported counts that came since somebody asked, by source.
        self._proxies: dict[str, Mapping[str, Any]] = {}
        self._last: dict[str, Mapping[str, Any]] = {}
        #: Proxies that have.
        self._ended: set[str] = set()
        #: Workers that have left, and when: one that is retired leaves first, and drains then.
        self._left: dict[str, float] = {}
        #: Told of what comes outside of heartbeats: name of the source, and its counts by deployment.
        self.on_proxy: Callable[[str, Mapping[str, Any]], None] = lambda source, counts: None
        self.on_worker: Callable[[str, Mapping[str, Any]], None] = lambda source, counts: None

    # ------------------------------------------------------------------ what comes

    def proxy_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """Take over the counts of a proxy process by deployment; "" stands for requests of none."""
        # Who had no answer to its last report sends it again.
        if source not in self._ended:
            self._proxies[source] = counts
            self.on_proxy(source, counts)

    def proxy_ended(self, source: str) -> None:
        """A proxy process has ended; what it told last stays."""
        self.http()
        self._http.gone(source)
        self._ended.add(source)

    def joined(self, worker: WorkerState) -> None:
        """A worker has come; its heartbeats bring its counts."""
        self._workers[worker.address] = worker

    def left(self, address: str) -> None:
        """A worker has gone; what its last heartbeat brought stays."""
        worker = self._workers.pop(address, None)
        if worker is not None:
            source = _source(worker)
            self._left[source] = time.monotonic()
            if worker.metrics.get(COUNTS):
                last = self._last.setdefault(source, worker.metrics[COUNTS])
                self.on_worker(source, last)

    def worker_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """Take over the last counts of a worker that is about to go, or has left just now."""
        address = source.partition(" ")[0]
        # It may never have come to a heartbeat that named its process.
        if address in self._workers or source in self._left or source_of(address, "") in self._left:
            self._last[source] = counts
            self.on_worker(source, counts)

    # ------------------------------------------------------------------ what is known

    def http(self) -> dict[str, HttpCounts]:
        """Return what the proxies answered by deployment; "" stands for requests of none."""
        self._read(self._proxies, self._http, HttpCounts.read)
        self._proxies = {}
        return self._http.by_deployment()

    def replicas(self) -> dict[str, ReplicaCounts]:
        """Return what the replicas did by deployment."""
        present = {_source(worker): worker.metrics.get(COUNTS) or {} for worker in self._workers.values()}
        self._read({**present, **self._last}, self._replicas, ReplicaCounts.read)
        self._last = {source: counts for source, counts in self._last.items() if source in present}
        # Who left long ago tells no more.
        now = time.monotonic()
        for source in [source for source, left in self._left.items() if now - left > LATE]:
            del self._left[source]
            self._replicas.gone(source)
        return self._replicas.by_deployment()

    def heartbeats(self) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
        """Return the source, when it told last (seconds since 1970) and its counts, of each worker with any."""
        for worker in self._workers.values():
            counts = worker.metrics.get(COUNTS)
            # Who is about to go has told more than its last heartbeat.
            if counts and (source := _source(worker)) not in self._last:
                yield source, worker.last_seen, counts

    @staticmethod
    def _read(exported: Mapping[str, Mapping[str, Any]], totals: Totals[Any], read: Callable[[Any], Any]) -> None:
        for source, counts in exported.items():
            totals.tell(source, {deployment: read(one) for deployment, one in counts.items()})


def _source(worker: WorkerState) -> str:
    return source_of(worker.address, worker.metrics.get("serve", {}).get("process", ""))
