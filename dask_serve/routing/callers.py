"""Routers of a worker's process, for its ``/metrics`` page: those of replicas, and of tasks, that call deployments."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING

from ..measures.families import Family, Sample, names_of, router_families
from ..measures.histogram import Histogram

if TYPE_CHECKING:
    from .fabric import Fabric

__all__ = ["Callers", "caller_families", "callers"]

#: What becomes 0 when its loop ends.
_LEVELS = ("queued", "in_flight", "replicas")


class Callers:
    """Counts of the routers of many event loops; those of loops that have ended stay. Any thread may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fabrics: weakref.WeakSet[Fabric] = weakref.WeakSet()
        self._stats: dict[str, Counter[str]] = {}
        self._waited: dict[str, Histogram] = {}

    def add(self, fabric: Fabric) -> None:
        """Tell of this one's routers from now on."""
        with self._lock:
            self._fabrics.add(fabric)

    def close(self, fabric: Fabric) -> None:
        """Its loop ends; what its routers counted stays. Nothing happens with one that was not added."""
        with self._lock:
            if fabric in self._fabrics:
                self._fabrics.discard(fabric)
                _add(fabric, self._stats, self._waited)
                for stats in self._stats.values():
                    for level in _LEVELS:
                        stats[level] = 0

    def totals(self) -> tuple[dict[str, Counter[str]], dict[str, Histogram]]:
        """Return what routers counted, and how long requests waited there, by deployment."""
        with self._lock:
            stats = {deployment: Counter(of) for deployment, of in self._stats.items()}
            waited = {deployment: Histogram(of.export()) for deployment, of in self._waited.items()}
            for fabric in self._fabrics:
                _add(fabric, stats, waited)
        return stats, waited


def _add(fabric: Fabric, stats: dict[str, Counter[str]], waited: dict[str, Histogram]) -> None:
    for deployment, router in list(fabric.routers.items()):
        told = {name: value for name, value in router.stats().items() if name != "deployment"}
        # Counter.update adds, and keeps what is 0.
        stats.setdefault(deployment, Counter()).update(told)
        if router.waited is not None:
            waited.setdefault(deployment, Histogram()).merge(router.waited)


#: Of this process.
callers = Callers()


def caller_families() -> list[Family]:
    """Return what the routers of this process did."""
    stats, waited = callers.totals()
    text = "Seconds that requests of replicas and tasks waited at their routers, each time before they were sent."
    samples = [Sample(names_of(deployment), of) for deployment, of in sorted(waited.items())]
    return [
        *router_families(sorted(stats.items())),
        Family("dask_serve_router_wait_seconds", "histogram", text, samples),
    ]
