"""Which worker's process has which environment: claimed by the first replica that needs it, for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import cloudpickle
import msgspec
from distributed.core import Status
from msgspec import Struct

from ..policy.environment import Environment
from ..policy.placement import Need, WorkerView, worth_restarting

if TYPE_CHECKING:
    from distributed import Client
    from distributed.scheduler import Scheduler

    from .replica import Replica

__all__ = ["Environments", "Prepared"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that a worker may take to prepare its process: two waits for pip, and something for files.
PREPARE_TIMEOUT = 1320.0
#: Seconds until a worker that was restarted must be back; then the next one may be.
BACK_WITHIN = 30.0


class Prepared(Struct, frozen=True, kw_only=True):
    """What a worker says when it is to have an environment."""

    #: The one that its process has now.
    environment: str = ""
    #: It can be given one no more: it held replicas.
    used: bool = False
    #: Why it could not be prepared.
    error: str = ""


def _prepare() -> Callable[..., Any]:
    async def prepare(environment: bytes, dask_worker: Any = None) -> bytes:
        from dask_serve.replica.environment import prepare

        return await prepare(environment, dask_worker)

    return prepare


class Environments:
    """Knows the environments of the workers' processes.

    Parameters
    ----------
    scheduler : Scheduler
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        #: There has been a replica that needs one, or a worker that has one.
        self.in_use = False
        #: By worker: the environment that its process has, or is about to have.
        self.claimed: dict[str, str] = {}
        #: Workers that said so themselves.
        self._prepared: set[str] = set()
        #: Workers that hold, or held, replicas.
        self._used: set[str] = set()
        #: When the last restarts began, by host.
        self._restarts: dict[str, float] = {}

    def claim(self, replica: Replica) -> None:
        """A replica will be on its worker."""
        self._used.add(replica.worker)
        if replica.spec.environment is not None:
            self.claimed[replica.worker] = replica.spec.environment.id

    def learn(self, worker: str, told: bytes) -> None:
        """A worker told what its process is, be it from the time of another controller."""
        self._learn(worker, msgspec.msgpack.decode(told, type=Prepared))

    def _learn(self, worker: str, told: Prepared) -> None:
        if told.environment:
            self.in_use = True
            self.claimed[worker] = told.environment
            self._prepared.add(worker)
        if told.used:
            self._used.add(worker)

    def forget(self, worker: str) -> None:
        """A worker is gone."""
        self.claimed.pop(worker, None)
        self._prepared.discard(worker)
        self._used.discard(worker)

    def describe(self, address: str, others: Collection[Replica], emptied: bool) -> dict[str, Any]:
        """Return what placement wants to know of a worker.

        Parameters
        ----------
        address : str
        others : collection of Replica
            Its replicas that are to be reckoned with.
        emptied : bool
            It has others, which are thought away.
        """
        worker = self._scheduler.workers[address]
        empty = not (others or worker.processing or worker.has_what)
        returns = bool(worker.nanny) or bool(getattr(self._scheduler, "serve_keeps_workers", False))
        # Actors of others are data of others; those of replicas that have just ended go in a moment.
        spare = empty and returns and not worker.actors and worker.status == Status.running
        if emptied and not others and returns and not worker.processing:
            return {"environment": "", "clean": True, "spare": False}
        return {
            "environment": self.claimed.get(address, ""),
            "clean": empty and not worker.actors and address not in self._used,
            "spare": spare,
        }

    def fits(self, replica: Replica) -> bool:
        """Whether the process of a replica's worker is the one that it was taken for."""
        wanted = "" if replica.spec.environment is None else replica.spec.environment.id
        return self.claimed.get(replica.worker, "") == wanted

    def needs_preparation(self, replica: Replica) -> bool:
        """Whether the process of a replica's worker has yet to be prepared, or asked."""
        return replica.spec.environment is not None and replica.worker not in self._prepared

    async def prepare(self, client: Client, replica: Replica) -> str:
        """Have a worker prepare its process for a replica.

        Returns
        -------
        str
            Why it could not be prepared, or "": it was, or its process turned out to be no free one (see `fits`).

        Raises
        ------
        OSError, asyncio.TimeoutError
            The worker does not answer.
        """
        environment = replica.spec.environment
        assert environment is not None
        call = client.rpc(replica.worker).run(
            function=cloudpickle.dumps(_prepare()),
            kwargs=cloudpickle.dumps({"environment": msgspec.msgpack.encode(environment)}),
            wait=True,
        )
        answer = await asyncio.wait_for(call, PREPARE_TIMEOUT)
        if answer["status"] != "OK":
            return f"worker {replica.worker} could not be prepared: {answer.get('text', answer['status'])}"
        told = msgspec.msgpack.decode(answer["result"], type=Prepared)
        if told.environment == environment.id:
            self._prepared.add(replica.worker)
            return ""
        if replica.worker in self._scheduler.workers:
            self.claimed.pop(replica.worker, None)
            # It failed before anything in its process was touched: whoever comes next may try.
            self._used.discard(replica.worker)
            self._learn(replica.worker, told)
        return told.error

    # -- restarts

    def restart_one(self, need: Need, views: list[WorkerView], now: float) -> str | None:
        """Return a worker that is to be restarted so that a replica finds a place; one at a time."""
        if any(now - began < BACK_WITHIN for began in self._restarts.values()):
            return None
        worker = worth_restarting(need, views)
        if worker is not None:
            self._restarts = {worker: now}
        return worker

    def came_back(self) -> None:
        """A worker joined: the next one may be restarted."""
        self._restarts.clear()

    async def restart(self, worker: str) -> bool:
        """End the process of a worker that holds nothing; its nanny, or the embedded cluster, starts another one.

        Returns
        -------
        bool
            False: it stays, as it holds something by now.
        """
        state = self._scheduler.workers.get(worker)
        if state is None or state.processing or state.has_what or state.actors:
            self._restarts.clear()
            return False
        logger.warning("worker %s holds nothing and is restarted: its process has another environment", worker)
        try:
            await self._scheduler.restart_workers(
                [worker],
                timeout=BACK_WITHIN,
                wait_for_workers=False,
                on_error="return",
                stimulus_id=f"serve-environment-{time.time()}",
            )
        except (OSError, asyncio.TimeoutError) as error:
            logger.warning("worker %s could not be restarted: %r", worker, error)
            return worker not in self._scheduler.workers
        return True


def describe(reason: str, environment: Environment | None) -> str:
    """Add to the reason why there is no place for an environment what it is."""
    if environment is None or environment.id not in reason:
        return reason
    return f"{reason} [environment {environment.id}: {environment.describe()}]"
