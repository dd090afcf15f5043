"""The scheduler's workers as placement sees them, with what our replicas booked on each."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING

import cloudpickle
from distributed.core import Status

from ..policy.devices import share_of
from ..policy.placement import WorkerView
from .bookings import Bookings
from .devices import WorkerDevices
from .environments import Environments

if TYPE_CHECKING:
    from distributed import Client
    from distributed.scheduler import Scheduler

    from .registry import Registry
    from .replica import Replica

__all__ = ["WorkerViews", "what_is_missing"]

#: Seconds that a worker may take to import the package.
IMPORT_TIMEOUT = 60.0


def _probe() -> Callable[[], Coroutine[None, None, tuple[str, bytes]]]:
    async def probe() -> tuple[str, bytes]:
        import asyncio
        import importlib
        import sys

        name = "dask_serve.replica.actor"
        try:
            if name not in sys.modules:
                # Not on the worker's loop, which it would hold for a while.
                await asyncio.get_running_loop().run_in_executor(None, importlib.import_module, name)
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being imported
            return f"{type(error).__name__}: {error}", b""
        from dask_serve.replica.environment import ProcessEnvironment

        return "", ProcessEnvironment.told()

    return probe


async def what_is_missing(client: Client, worker: str, learn: Callable[[str, bytes], None] | None = None) -> str:
    """Return why a worker cannot hold replicas, or "".

    A task that names a class which a worker cannot import breaks the worker's connection to the scheduler, and with it
    the worker. So it is asked first, by a function that travels by value.

    Parameters
    ----------
    learn : callable, optional
        Told what the worker's process is: its address, and what `Prepared` is decoded from.

    Raises
    ------
    OSError
        The worker cannot be reached.
    """
    call = client.rpc(worker).run(function=cloudpickle.dumps(_probe()), wait=True)
    answer = await asyncio.wait_for(call, IMPORT_TIMEOUT)
    if answer["status"] != "OK":
        return f"worker {worker} could not be asked for dask_serve: {answer.get('text', answer['status'])}"
    missing, told = answer["result"]
    if not missing:
        if learn is not None:
            learn(worker, told)
        return ""
    return (
        f"dask_serve cannot be imported on worker {worker} ({missing}): run `pip install dask-serve` there, "
        "in the environment of `dask worker` and in the version of the scheduler"
    )


class WorkerViews:
    """Makes `WorkerView` s, and remembers what the scheduler does not tell."""

    def __init__(self, scheduler: Scheduler, registry: Registry) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self.bookings = Bookings(scheduler)
        self.devices = WorkerDevices(scheduler)
        self.environments = Environments(scheduler)
        #: Workers that are about to close though the scheduler does not say so yet.
        self._doomed: set[str] = set()
        #: Workers that have come since what waits was last tried on all of them.
        self._fresh: set[str] = set()
        #: Workers that have the package.
        self.equipped: set[str] = set()
        #: Failed starts by (worker, revision).
        self._failures: Counter[tuple[str, str]] = Counter()

    def doom(self, worker: str) -> None:
        """Place nothing more on a worker."""
        self._doomed.add(worker)

    def spare(self, worker: str) -> None:
        """A worker stays after all."""
        self._doomed.discard(worker)

    def joined(self, worker: str) -> None:
        """A worker has come, and what waits has not been tried on it."""
        self._fresh.add(worker)

    def tried(self) -> None:
        """What waits has been tried on all workers but those that do not run yet."""
        if self._fresh:
            there = self._scheduler.workers
            self._fresh = {one for one in self._fresh if one in there and there[one].status == Status.init}

    def forget(self, worker: str) -> None:
        """A worker left; one that comes at its address is another one."""
        self._doomed.discard(worker)
        self._fresh.discard(worker)
        self.equipped.discard(worker)
        self.bookings.forget(worker)
        self.devices.forget(worker)
        self.environments.forget(worker)
        for key in [key for key in self._failures if key[0] == worker]:
            del self._failures[key]

    def note_failure(self, replica: Replica) -> None:
        """Prefer other workers for this revision from now on."""
        self._failures[replica.worker, replica.spec.revision] += 1

    def hosting(self) -> set[str]:
        """Return the addresses of the workers that hold replicas."""
        return set(self._registry.by_worker)

    def views(self, deployment: str = "", revision: str = "", without: Collection[Replica] = ()) -> list[WorkerView]:
        """Return all workers, with the counts that concern one deployment and revision, ``without`` some replicas."""
        views = []
        avoided = self._doomed | self._registry.leaving | self._registry.silent
        shares: defaultdict[tuple[str, str], float] = defaultdict(float)
        for replica in self._registry.replicas.values() if self.devices.known else ():
            if replica.devices and replica not in without:
                for device in replica.devices:
                    shares[replica.host, device.id] += share_of(replica.spec.options.gpus)
        by_worker = self._registry.by_worker
        environments = self.environments.in_use
        for address, worker in self._scheduler.workers.items():
            here = by_worker.get(address, {}).values()
            ours = [replica for replica in here if replica not in without]
            booked: Counter[str] = Counter()
            memory = threads = same = 0
            for replica in ours:
                options = replica.spec.options
                memory += options.memory or 0
                threads += options.threads
                same += replica.deployment == deployment
                if replica.booked:
                    booked.update(replica.booked)
            views.append(
                WorkerView(
                    address=address,
                    name=str(worker.name),
                    host=worker.host,
                    nthreads=worker.nthreads,
                    running=worker.status == Status.running and address not in avoided,
                    fresh=address in self._fresh,
                    busy=len(worker.processing),
                    resources=self.bookings.declared(address),
                    booked=booked,
                    in_use=worker.used_resources,
                    devices=self.devices.of(address, worker.host, shares),
                    memory_limit=worker.memory_limit or 0,
                    memory=memory,
                    threads=threads,
                    replicas=same,
                    total=len(ours),
                    failures=self._failures[address, revision],
                    **(self.environments.describe(address, ours, len(ours) < len(here)) if environments else {}),
                )
            )
        return views
