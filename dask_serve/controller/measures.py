"""What all replicas and proxies have counted, those included that are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..measures.counts import HttpCounts, ReplicaCounts
from ..measures.totals import Totals
from ..replica.process import COUNTS

if TYPE_CHECKING:
    from distributed.scheduler import WorkerState

__all__ = ["Measures"]


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
        #: Told of what comes outside of heartbeats: name of the source, and its counts by deployment.
        self.on_proxy: Callable[[str, Mapping[str, Any]], None] = lambda source, counts: None
        self.on_worker: Callable[[str, Mapping[str, Any]], None] = lambda source, counts: None

    # ------------------------------------------------------------------ what comes

    def proxy_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """Take over the counts of a proxy process by deployment; "" stands for requests of none."""
        self._proxies[source] = counts
        self.on_proxy(source, counts)

    def joined(self, worker: WorkerState) -> None:
        """A worker has come; its heartbeats bring its counts."""
        self._workers[worker.address] = worker

    def left(self, address: str) -> None:
        """A worker has gone; what its last heartbeat brought stays."""
        worker = self._workers.pop(address, None)
        if worker is not None and worker.metrics.get(COUNTS):
            last = self._last.setdefault(_source(worker), worker.metrics[COUNTS])
            self.on_worker(_source(worker), last)

    def worker_told(self, worker: str, counts: Mapping[str, Any]) -> None:
        """Take over the last counts of a worker that is about to go."""
        if worker in self._workers:
            self._last[_source(self._workers[worker])] = counts
            self.on_worker(_source(self._workers[worker]), counts)

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
        # Who has left tells no more.
        self._replicas.keep(present)
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
    return f"{worker.address} {worker.metrics.get('serve', {}).get('process', '')}"
