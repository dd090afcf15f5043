"""Workers that leave: their replicas are replaced elsewhere first, and end when the replacements are ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_timedelta

from ..exceptions import ConfigError

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from .reconciler import Reconciler
    from .registry import Registry
    from .replica import Replica

__all__ = ["Leaving"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two looks at what is left on a worker.
LOOK = 0.05
#: Seconds that replicas wait for a place elsewhere before they end without a replacement.
NO_PLACE = 2.0
#: How Dask's workers sign when they retire of themselves, at the end of their ``--lifetime``.
OF_ITSELF = "worker-close-gracefully"
#: Seconds without a question after which nobody seems to add workers as they are needed. Adaptive asks every second,
#: unless told otherwise.
ADAPTIVE_WITHIN = 15.0


class Leaving:
    """Empties workers before they go.

    It stands before ``Scheduler.retire_workers``, which is what ``client.retire_workers``, ``cluster.scale``, Adaptive
    and a worker at the end of its ``--lifetime`` call: Dask itself would refuse to retire a worker with actors, and
    all but the first of them close it nevertheless.

    Parameters
    ----------
    scheduler : Scheduler
    registry : Registry
    reconciler : Reconciler
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, reconciler: Reconciler) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._reconciler = reconciler
        #: When an adaptive cluster asked last how many workers there should be.
        self.asked_at: float | None = None
        self._retire: Any = scheduler.retire_workers
        scheduler.handlers["retire_workers"] = self.retire_workers
        scheduler.__dict__["retire_workers"] = self.retire_workers

    async def retire_workers(
        self,
        workers: list[str] | None = None,
        *,
        names: list[Any] | None = None,
        close_workers: bool = False,
        remove: bool = True,
        stimulus_id: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Do what ``Scheduler.retire_workers`` does, after the replicas of these workers have moved elsewhere.

        Raises
        ------
        ConfigError
            Adaptive, which kills what it names afterwards, names workers that may be any of those that hold replicas.
        """
        how = {"close_workers": close_workers, "remove": remove, "stimulus_id": stimulus_id}
        if (workers is not None and names is not None) or (kwargs and (workers is not None or names is not None)):
            # Dask has an error for this.
            return dict(await self._retire(workers, names=names, **how, **kwargs))
        found = self._addresses(workers, names, kwargs)
        self._check_names(workers, names)
        hosting = {worker for worker in found if self._registry.on_worker(worker)}
        if hosting:
            # All of them, or replicas would move to the others that leave.
            await self.empty(found, of_itself=str(stimulus_id).startswith(OF_ITSELF))
        if self._is_from_cluster(workers):
            if len(found) == len(self._scheduler.workers):
                # The cluster is being closed: nobody is left who could take what these workers have.
                return {}
            # It closes them itself. One that is removed would close itself too, at the same time, and complain.
            how["remove"] = False
        answer = dict(await self._retire(found, **how))
        stay = {worker for worker in found if worker in self._scheduler.workers and worker not in answer}
        if stay and hosting:
            logger.warning("Dask did not retire %s; replicas may be placed there again", ", ".join(sorted(stay)))
            self.stay(stay)
        return answer

    def _addresses(self, workers: list[str] | None, names: list[Any] | None, kwargs: dict[str, Any]) -> list[str]:
        known = self._scheduler.workers
        if names is not None:
            wanted = {str(name) for name in names}
            return [address for address, worker in known.items() if str(worker.name) in wanted]
        if workers is None:
            workers = list(self._scheduler.workers_to_close(**kwargs))
        # A cluster object names its workers by alias, also those that have gone meanwhile.
        aliases = self._scheduler.aliases
        return [address for worker in workers if (address := aliases.get(worker, worker)) in known]

    def _is_from_cluster(self, workers: list[str] | None) -> bool:
        """Tell whether a cluster object asks: by alias, which Dask itself makes nothing of, and closes them then."""
        return workers is not None and not any(worker in self._scheduler.workers for worker in workers)

    def _check_names(self, workers: list[str] | None, names: list[Any] | None) -> None:
        """Complain of names that nobody has, if they may mean workers with replicas all the same.

        Usually they are workers that have not come yet, or have gone. But SubprocessCluster does not tell its workers
        their names: none of them ever seems to come, and it kills any.
        """
        known = self._scheduler.workers.values()
        if any(str(worker.name) != worker.address for worker in known):
            return
        aliases = {str(alias) for alias in self._scheduler.aliases}
        unknown = [name for name in names or workers or () if str(name) not in aliases and "://" not in str(name)]
        holding = [worker.address for worker in known if self._registry.on_worker(worker.address)]
        if not unknown or not holding:
            return
        named = ", ".join(map(str, unknown))
        text = (
            f"no worker is named {named}, and the {len(holding)} workers that hold replicas have no names: whoever "
            "closes one may close any of them, and fail its requests. Have the cluster give its "
            "workers the names that it knows them by: docs/operating.md, 'Workers that leave', shows how"
        )
        if names is not None:
            raise ConfigError(text)
        # A cluster object that is being closed asks in this way too.
        logger.warning("%s", text)

    async def empty(self, workers: Iterable[str], *, of_itself: bool = False) -> list[Replica]:
        """Bring workers to have no replica; return those that are left.

        What has no replacement after ``serve.leave-patience`` is drained nevertheless.

        Parameters
        ----------
        workers : iterable of str
            Addresses.
        of_itself : bool, default False
            A worker leaves because its time has come. Nobody else waits for it, and it can go on serving until there
            is a place elsewhere; where workers are added as they are needed, a place with free threads.
        """
        workers = set(workers)
        patience = parse_timedelta(dask.config.get("serve.leave-patience", "2 minutes"))
        if of_itself and self._adapts():
            with self._at_leisure(workers):
                await self.replace(workers, patience / 2, no_place=patience)
        await self.replace(workers, patience, no_place=patience if of_itself else NO_PLACE)
        left = self._left(workers)
        for replica in left:
            if replica.state in ("starting", "ready"):
                logger.warning("replica %s ends without a replacement: its worker leaves", replica.id)
                why = f"replica {replica.id} drained without a replacement: its worker {replica.worker} leaves"
                self._reconciler.notes.add("stopped", replica.deployment, why)
                self._reconciler.stop(replica)
        self._reconciler.wake()
        await asyncio.gather(*(replica.ended.wait() for replica in left))
        return self._left(workers)

    async def replace(self, workers: Iterable[str], patience: float, no_place: float) -> None:
        """Wait until the replicas of workers have replacements elsewhere, or find no place for ``no_place`` seconds."""
        workers = set(workers)
        loop = asyncio.get_running_loop()
        placed_at = began = loop.time()
        self._note(workers, leaving=True)
        while living := [r for r in self._left(workers) if r.state in ("starting", "ready")]:
            await asyncio.sleep(LOOK)
            now = loop.time()
            if any(replica.deployment not in self._registry.unplaced for replica in living):
                placed_at = now
            if now - began > patience or now - placed_at > no_place:
                return

    def stay(self, workers: Iterable[str]) -> None:
        """These workers do not leave after all."""
        self._note(set(workers), leaving=False)

    def _adapts(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self.asked_at is not None and now - self.asked_at < ADAPTIVE_WITHIN

    @contextlib.contextmanager
    def _at_leisure(self, workers: set[str]) -> Iterator[None]:
        """Replacements take free threads only meanwhile; an adaptive cluster adds workers where there are none."""
        registry = self._registry
        registry.at_leisure |= workers
        try:
            yield
        finally:
            registry.at_leisure -= workers
            registry.touch(*registry.unplaced)
            self._reconciler.wake()

    def _note(self, workers: set[str], leaving: bool) -> None:
        registry, note = self._registry, self._reconciler.notes.add
        for worker in sorted(workers - registry.leaving if leaving else workers & registry.leaving):
            held = len(registry.on_worker(worker))
            if leaving:
                replaced = "1 replica is" if held == 1 else f"{held} replicas are"
                note("leaving", worker, f"it leaves: {replaced} replaced elsewhere first")
            else:
                note("stays", worker, "it does not leave after all, and may hold replicas again")
        registry.leaving = registry.leaving | workers if leaving else registry.leaving - workers
        registry.touch(*registry.unplaced)
        for worker in workers:
            registry.touch_worker(worker)
        self._reconciler.wake()

    def _left(self, workers: set[str]) -> list[Replica]:
        return [replica for worker in workers for replica in self._registry.on_worker(worker)]
