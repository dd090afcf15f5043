"""Dask's side of replicas: their actors are submitted, called and withdrawn here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from distributed import Client
from distributed.protocol import to_serialize

from .replica import Replica

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["QUEUED_AFTER", "Actors", "explain", "replica_class"]

#: How long an actor may take to be made before its status says what it waits for.
QUEUED_AFTER = 0.5


def replica_class() -> type:
    """Return the actor class of replicas, imported late: this process needs nothing else of its package."""
    from ..replica.actor import Replica as Actor

    return Actor


class Actors:
    """The actors of all replicas.

    Attributes
    ----------
    client : distributed.Client or None
        Owns them; set before the first is submitted.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.client: Client | None = None
        self._scheduler = scheduler

    def submit(self, replica: Replica) -> None:
        """Have Dask make a replica's actor."""
        assert self.client is not None
        spec = {
            "id": replica.id,
            "app": replica.app,
            "deployment": replica.spec.name,
            "revision": replica.spec.revision,
            "keys": replica.spec.keys,
            "options": msgspec.msgpack.encode(replica.spec.options),
            "key": replica.key,
            "devices": [device.ordinal for device in replica.devices],
            "holds": bool(replica.booked),
        }
        replica.future = self.client.submit(
            replica_class(),
            spec,
            actor=True,
            workers=[replica.worker],
            allow_other_workers=False,
            resources=replica.booked or None,
            key=replica.key,
            pure=False,
        )

    async def call(self, replica: Replica, method: str, argument: Any, timeout: float | None) -> None:
        """Call a control method of a replica.

        This is the operation behind Dask's ``Actor`` proxy. The proxy itself would bind to whatever client or worker it
        finds in this process, and hides a failed call behind a future that nobody sets.
        """
        assert self.client is not None
        worker = self.client.rpc(replica.worker)
        call = worker.actor_execute(actor=replica.key, function=method, args=[to_serialize(argument)], kwargs={})
        answer = await asyncio.wait_for(call, timeout)
        if answer["status"] != "OK":
            raise answer["exception"]

    def waits_for(self, replica: Replica, now: float) -> str:
        """Say what an actor waits for that is not made yet."""
        worker = self._scheduler.workers.get(replica.worker)
        if worker is None or now - replica.started_at < QUEUED_AFTER:
            return replica.message
        wanted = {name: n for name, n in replica.booked.items() if worker.used_resources.get(name, 0) > n}
        if wanted:
            amounts = ", ".join(f"{name}={amount:g}" for name, amount in wanted.items())
            return f"waits for {amounts} on worker {worker.address}, which tasks hold"
        if len(worker.processing) > worker.nthreads:
            threads = "its only thread is" if worker.nthreads == 1 else f"all its {worker.nthreads} threads are"
            return f"queued on worker {worker.address}: {threads} busy with other tasks"
        return f"worker {worker.address} is loading it"

    def withdraw(self, replica: Replica) -> bool:
        """Withdraw an actor; return whether the scheduler knows of it.

        An actor that is released while it waits for a thread stays in Dask's set of its worker's actors for ever, and
        keeps that worker from being retired.
        """
        task = self._scheduler.tasks.get(replica.key)
        if task is None:
            return False
        worker = task.processing_on
        if self.client is not None and self.client.id in self._scheduler.clients:
            self._scheduler.client_releases_keys([replica.key], client=self.client.id)
        if worker is not None and task.state not in ("processing", "memory"):
            worker.actors.discard(task)
        return True


def explain(error: BaseException | None, worker: str) -> str:
    """Say why an actor could not be made."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError) and "dask_serve" in str(error):
        return f"{text}\ndask_serve is not installed on worker {worker}: run `pip install dask-serve` there"
    return text
