"""Where a replica is started, and what would make a place where there is none."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..policy.desired import DeploymentSpec
from ..policy.placement import Need, WorkerView, booking, place, wanted_workers
from ..policy.reconcile import Start
from .environments import describe
from .registry import Registry
from .replica import Replica
from .workers import WorkerViews, what_is_missing

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Places", "need_of"]


class Places:
    """Finds workers for replicas.

    Parameters
    ----------
    registry : Registry
        Its ``unplaced`` and ``crowded`` tell of those that find none.
    workers : WorkerViews
    spawn : callable
        Runs a coroutine as a task.
    wake : callable
        Called when there may be places that there were not.

    Attributes
    ----------
    client : distributed.Client or None
        Through which workers are asked.
    """

    def __init__(
        self,
        registry: Registry,
        workers: WorkerViews,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        wake: Callable[[], None],
    ) -> None:
        self.client: Client | None = None
        self._registry = registry
        self._workers = workers
        self._spawn = spawn
        self._wake = wake
        #: By deployment: how many of the replicas that found no worker wait only for free threads, and for how many.
        self._short: dict[str, tuple[int, int]] = {}
        #: Deployments that are placed once workers have told their devices.
        self._wait_for_devices: set[str] = set()

    def wanted_workers(self) -> int:
        """Return how many workers an adaptive cluster should have for our replicas."""
        unplaced = sum(number for number, _ in self._registry.unplaced.values())
        short = self._short.values()
        extra, threads = sum(number for number, _ in short), sum(threads for _, threads in short)
        # Those that move are counted where they go to.
        moving = [self._registry.replicas[id] for id in self._registry.moving]
        return wanted_workers(self._workers.views(without=moving), unplaced - extra, threads)

    def forget(self, deployment: str) -> None:
        """A deployment is about to be placed anew."""
        self._short.pop(deployment, None)

    def find(self, action: Start, now: float) -> Replica | None:
        """Return the replica that is to be started, at its place; None: there is none, or not yet."""
        found = self._registry.spec_of(action.deployment, action.revision)
        if found is None:
            return None
        app, spec = found
        options = spec.options
        registry, id = self._registry, action.deployment
        moving = registry.moving.intersection(registry.by_deployment.get(id, ()))
        need = need_of(spec, only_free_threads=bool(moving) or registry.is_extra(id, spec))
        if need.environment:
            self._workers.environments.in_use = True
        if id in registry.unplaced:
            # It was found a moment ago that there is no place.
            number, reason = registry.unplaced[id]
            registry.unplaced[id] = (number + 1, reason)
            if id in self._short:
                number, threads = self._short[id]
                self._short[id] = (number + 1, threads + need.threads)
            return None
        views = self._workers.views(id, action.revision)
        if options.gpus:
            for worker in self._workers.devices.unasked():
                self._spawn(self._ask_for_devices(worker))
        choice = place(need, views)
        if choice.worker is None and moving:
            # Somebody else was faster: they stay where they are.
            registry.moving -= moving
            registry.touch(id)
            return None
        if choice.worker is None:
            if options.gpus and self._workers.devices.being_asked:
                self._wait_for_devices.add(id)
                return None
            registry.unplaced[id] = (1, describe(choice.reason, spec.environment))
            self._look_for_more(action, need, views, now)
            return None
        replica = Replica(app, spec, choice.worker, now)
        view = next(view for view in views if view.address == choice.worker)
        replica.host, replica.devices = view.host, choice.devices
        replica.booked = booking(need, view.resources)
        return replica

    def _look_for_more(self, action: Start, need: Need, views: list[WorkerView], now: float) -> None:
        """There is no place for a replica: see what would make one."""
        id = action.deployment
        restart = self._workers.environments.restart_one(need, views, now)
        if restart is not None:
            self._spawn(self._restart(restart))
        if need.only_free_threads and place(replace(need, only_free_threads=False), views).worker is not None:
            self._short[id] = (1, need.threads)
        old = [r for r in self._registry.of(id) if r.state == "ready" and r.spec.revision != action.revision]
        if old and place(need, self._workers.views(id, action.revision, without=old)).worker is not None:
            self._registry.crowded.add(id)

    async def _ask_for_devices(self, worker: str) -> None:
        assert self.client is not None
        await self._workers.devices.ask(self.client, worker, what_is_missing)
        self._registry.touch(*self._wait_for_devices)
        self._wait_for_devices.clear()
        self._wake()

    async def _restart(self, worker: str) -> None:
        self._workers.doom(worker)
        if not await self._workers.environments.restart(worker):
            self._workers.spare(worker)
        self._wake()


def need_of(spec: DeploymentSpec, *, only_free_threads: bool) -> Need:
    """Return what a replica asks of its worker."""
    options = spec.options
    return Need(
        threads=options.threads,
        resources=options.resources,
        gpus=options.gpus,
        memory=options.memory or 0,
        workers=options.workers,
        max_replicas_per_worker=options.max_replicas_per_worker,
        only_free_threads=only_free_threads,
        environment="" if spec.environment is None else spec.environment.id,
    )
