"""What replicas take of Dask's resources, as the scheduler is told.

An actor acquires its resources as a task does, in line with all others, and would release them when its constructor has
returned. Its worker then makes them its own instead (`dask_serve.replica.hold`): it has so much less from that moment,
and the scheduler has to know, or it would go on sending tasks there that can never run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from distributed.utils import time

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Bookings"]


class Bookings:
    """Keeps the scheduler's figures of its workers' resources at what is left for tasks.

    Parameters
    ----------
    scheduler : Scheduler
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        #: By worker: what replicas hold there.
        self._held: dict[str, Counter[str]] = {}

    def declared(self, worker: str) -> dict[str, float]:
        """Return what a worker has in all, for tasks and replicas."""
        resources = dict(self._scheduler.workers[worker].resources)
        for name, amount in self._held.get(worker, {}).items():
            resources[name] = resources.get(name, 0) + amount
        return resources

    def take(self, worker: str, amounts: Mapping[str, float]) -> None:
        """A replica holds these from now on; tasks that can no longer run there go elsewhere, or wait."""
        if not amounts or worker not in self._scheduler.workers:
            return
        self._held.setdefault(worker, Counter()).update(amounts)
        self._change(worker, {name: -amount for name, amount in amounts.items()})
        scheduler = self._scheduler
        state = scheduler.workers[worker]
        # None of them runs: what they want and what the replica has are more than the worker had.
        stuck = [
            task.key
            for task in state.processing
            if any((task.resource_restrictions or {}).get(name, 0) > state.resources.get(name, 0) for name in amounts)
        ]
        if stuck:
            scheduler.transitions(dict.fromkeys(stuck, "released"), stimulus_id=f"serve-take-{time()}")

    def give_back(self, worker: str, amounts: Mapping[str, float]) -> None:
        """A replica that held these has ended; tasks that waited for them may run."""
        held = self._held.get(worker)
        if not amounts or held is None or worker not in self._scheduler.workers:
            return
        held.subtract(amounts)
        self._change(worker, amounts)
        scheduler = self._scheduler
        runnable = scheduler.bulk_schedule_unrunnable_after_adding_worker(scheduler.workers[worker])
        if runnable:
            scheduler.transitions(runnable, stimulus_id=f"serve-give-back-{time()}")

    def forget(self, worker: str) -> None:
        """A worker is gone."""
        self._held.pop(worker, None)

    def _change(self, worker: str, amounts: Mapping[str, float]) -> None:
        scheduler = self._scheduler
        resources = scheduler.workers[worker].resources
        for name, amount in amounts.items():
            if name in resources:
                # Tenths are taken and given back many times.
                resources[name] = round(resources[name] + amount, 9)
                scheduler.resources.setdefault(name, {})[worker] = resources[name]
