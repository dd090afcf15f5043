"""Replicas that crowd each other move to workers with free threads: a new one first, then the old one ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..policy.balance import Sitting, to_move
from ..policy.placement import Need, place

if TYPE_CHECKING:
    from .registry import Registry
    from .replica import Replica
    from .workers import WorkerViews

__all__ = ["Balance"]

#: How many replicas are tried in one round; the next follow when one of these has moved.
TRIES = 8
#: Seconds between two looks: much may come and go at once, and that a worker runs or is paused is no event.
EVERY = 1.0


class Balance:
    """Chooses replicas that move.

    Parameters
    ----------
    registry : Registry
        Its ``moving`` are the replicas that were chosen.
    workers : WorkerViews
    need_of : callable
        Returns what a replica asks of its worker.
    """

    def __init__(self, registry: Registry, workers: WorkerViews, need_of: Callable[[Replica], Need]) -> None:
        self._registry = registry
        self._workers = workers
        self._need_of = need_of
        #: Workers or replicas have come or gone since the last look.
        self.due = False
        self._looked = 0.0

    def look(self, now: float) -> float | None:
        """Choose, if there may be better places than there were; return when to look again, if at all."""
        if not self.due:
            return None
        if now < self._looked + EVERY:
            return self._looked + EVERY
        self._looked = now
        self.due = self._choose()
        return now + EVERY if self.due else None

    def _choose(self) -> bool:
        """Return whether replicas crowd each other somewhere."""
        registry = self._registry
        workers = self._workers.views(without=[registry.replicas[id] for id in registry.moving])
        if not any(worker.threads > worker.nthreads for worker in workers):
            return False
        steady = {id for id in registry.by_deployment if self._is_steady(id)}
        sitting = [
            Sitting(replica.id, replica.worker, replica.spec.options.threads)
            for replica in registry.replicas.values()
            if replica.deployment in steady
        ]
        for id in to_move(sitting, workers)[:TRIES]:
            replica = registry.replicas[id]
            views = self._workers.views(replica.deployment, replica.spec.revision)
            if place(self._need_of(replica), views).worker is not None:
                registry.moving.add(id)
                registry.touch(replica.deployment)
        return True

    def _is_steady(self, deployment: str) -> bool:
        """Whether nothing else is going on with a deployment, and it may have one replica more for a while."""
        registry = self._registry
        found = registry.desired(deployment)
        if found is None or deployment in registry.unplaced or deployment in registry.failed:
            return False
        application, spec = found
        replicas = registry.of(deployment)
        return (
            len(replicas) == registry.target(application.spec.name, spec)
            and bool(spec.options.max_surge)
            and all(
                replica.state == "ready"
                and replica.spec.revision == spec.revision
                and replica.id not in registry.moving
                and replica.worker not in registry.leaving
                for replica in replicas
            )
        )
