"""What the replicas of one worker process share: the door, and the end of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin

from ..exceptions import ServeError
from ..logs import join_dask
from ..printed import keep_printed
from ..records import keep_records
from ..wire.memory import limit_idle
from ..wire.tls import for_callers, for_door, lend_to_client
from .door import Door
from .ledger import Ledger
from .listening import place_of
from .profiling import join_profile
from .room import limit_for

if TYPE_CHECKING:
    from distributed import Worker

    from .unit import ReplicaUnit

__all__ = ["COUNTS", "DrainAtClose", "ServeProcess", "source_of"]

logger = logging.getLogger("dask_serve.process")

#: Seconds that a closing worker is given where nobody said how many; it is 8 for `dask worker`, 4 in a LocalCluster.
CLOSE_WITHIN = 4.0
#: Seconds of it that are kept for closing, and the most that is used.
CLOSING, MOST = 1.0, 8.0
#: Share of the rest in which replicas go on serving, until there are others in their place; then they drain.
REPLACING = 0.4
#: Share of the worker's memory limit that may lie idle between large payloads: Dask counts it as used.
IDLE_SHARE = 1 / 16
#: Seconds to wait for the replicas' threads then.
JOIN = 0.5

#: What a worker's heartbeat calls the counts of its replicas, by deployment.
COUNTS = "serve-counts"

_LEAVING = (Status.closing, Status.closed, Status.failed)


class ServeProcess:
    """The doors of this process by cluster, and the replicas by worker.

    A process normally has one worker of one cluster; in-process clusters have several.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _doors: ClassVar[dict[bytes, Door]] = {}
    _workers: ClassVar[dict[str, tuple[bytes, list[ReplicaUnit]]]] = {}
    _ledgers: ClassVar[WeakKeyDictionary[Worker, Ledger]] = WeakKeyDictionary()

    @classmethod
    def door_of(cls, worker: Worker, secret: bytes, unit: ReplicaUnit) -> Door:
        """Return the process's door to the cluster that has this secret, opened at first use. Blocks.

        The unit is remembered as one of the worker's replicas.
        """
        from .metrics import tell_metrics  # which tells of this process

        with cls._lock:
            if worker.status in _LEAVING:
                raise ServeError(f"worker {worker.address} is closing")
            door = cls._doors.get(secret)
            if door is None or door.closed:
                join_dask()
                keep_printed(keep_records())
                lend_to_client(worker.security, "worker")
                listen, dial = for_door(worker.security, worker.address), for_callers(worker.security)
                door = Door(secret, place_of(worker), listen, dial, limit_for(worker))
                door.start()
                cls._doors[secret] = door
            if worker.memory_manager.memory_limit:
                limit_idle(int(worker.memory_manager.memory_limit * IDLE_SHARE))
            known = worker.address in cls._workers
            units = cls._workers.setdefault(worker.address, (secret, []))[1]
            units[:] = [other for other in units if not other.ended]
            units.append(unit)
        if not known:
            loop = worker.loop.asyncio_loop
            drain = DrainAtClose(door.process)
            asyncio.run_coroutine_threadsafe(worker.plugin_add(drain, name=DrainAtClose.name), loop).result(10)
            # Travels with the worker's heartbeats.
            worker.metrics["serve"] = lambda worker: {**door.report(), **_counts(worker)}
            tell_metrics()
            join_profile(worker)
            worker.metrics[COUNTS] = lambda worker: _exported(cls.ledger_of(worker))
            if worker.status in _LEAVING:
                # It may have looked for plugins to tear down before ours was there.
                cls.leave(worker)
                raise ServeError(f"worker {worker.address} is closing")
        return door

    @classmethod
    def door(cls) -> Door | None:
        """Return a door of this process, if it has one."""
        return next(iter(cls._doors.values()), None)

    @classmethod
    def doors(cls) -> list[Door]:
        """Return all doors of this process."""
        return list(cls._doors.values())

    @classmethod
    def units_of(cls, worker: Worker) -> list[ReplicaUnit]:
        """Return the replicas of a worker that have not ended."""
        entry = cls._workers.get(worker.address)
        return [] if entry is None else [unit for unit in entry[1] if not unit.ended]

    @classmethod
    def all_units(cls) -> list[list[ReplicaUnit]]:
        """Return the replicas of this process that have not ended, by worker."""
        return [[unit for unit in units if not unit.ended] for _, units in list(cls._workers.values())]

    @classmethod
    def ledger_of(cls, worker: Worker) -> Ledger:
        """Return what the replicas of a worker have counted."""
        return cls._ledgers.setdefault(worker, Ledger())

    @classmethod
    def ledgers(cls) -> list[tuple[str, Ledger]]:
        """Return the ledgers of this process by the address of their worker."""
        return [(worker.address, ledger) for worker, ledger in list(cls._ledgers.items())]

    @classmethod
    def leave(cls, worker: Worker, patience: float = JOIN) -> None:
        """A worker closes: end its replicas, within ``patience`` seconds, and the door with the last one. Blocks."""
        units = cls.units_of(worker)
        with cls._lock:
            secret, _ = cls._workers.pop(worker.address, (b"", []))
            last = all(other != secret for other, _ in cls._workers.values())
            door = cls._doors.pop(secret, None) if last else None
        for unit in units:
            unit.end()
        deadline = time.monotonic() + patience
        for unit in units:
            unit.user.join(max(0.0, deadline - time.monotonic()))
        if door is not None:
            door.close()


def _counts(worker: Worker) -> dict[str, dict[str, Any]]:
    """Return the counts of a worker's replicas, of their batches, and the models that they have."""
    units = [unit for unit in ServeProcess.units_of(worker) if unit.core is not None]
    batches = {unit.id: unit.user.host.batch_counts() for unit in units}
    models = {unit.id: unit.user.host.loaded()[0] for unit in units}
    return {
        "replicas": {unit.id: unit.core.stats() for unit in units if unit.core is not None},
        "batches": {id: counts for id, counts in batches.items() if counts},
        "models": {id: names for id, names in models.items() if names},
    }


def source_of(address: str, process: str) -> str:
    """Return what names one life of a worker."""
    return f"{address} {process}"


def _exported(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return {deployment: counts.export() for deployment, counts in ledger.by_deployment().items()}


class DrainAtClose(WorkerPlugin):
    """Drains a worker's replicas before the worker goes: SIGTERM, ``close``, the end of a cluster."""

    name = "dask-serve-drain"

    def __init__(self, process: str) -> None:
        self._process = process

    def setup(self, worker: Any) -> None:
        self._within = CLOSE_WITHIN
        self._told: dict[str, dict[str, Any]] = {}
        close = worker.close

        async def close_within(timeout: float = 30, **kwargs: Any) -> Any:
            # The plugins are not told.
            self._within = min(timeout, MOST)
            return await close(timeout=timeout, **kwargs)

        worker.close = close_within

    async def teardown(self, worker: Any) -> None:
        units = ServeProcess.units_of(worker)
        ends = time.monotonic() + max(self._within - CLOSING, CLOSING)
        if units:
            await self._be_replaced(worker, (ends - time.monotonic()) * REPLACING)
            units = ServeProcess.units_of(worker)
            left = max(ends - time.monotonic(), 0.0)
            reports = [asyncio.wait_for(unit.report("draining"), 1.0) for unit in units]
            drains = [unit.drain(min(left, unit.options.graceful_shutdown_timeout_s)) for unit in units]
            await asyncio.gather(*reports, *drains, return_exceptions=True)
        await self._tell_counts(worker)
        # What draining has not taken is for applications that shut down.
        patience = JOIN + max(0.0, ends - time.monotonic())
        await asyncio.get_running_loop().run_in_executor(None, ServeProcess.leave, worker, patience)
        await self._tell_counts(worker)

    async def _tell_counts(self, worker: Any) -> None:
        """There may be no heartbeat any more."""
        counts = _exported(ServeProcess.ledger_of(worker))
        if counts == self._told:
            return
        self._told = counts
        source = source_of(worker.address, self._process)
        telling = worker.scheduler.serve_counts(source=source, counts=counts, worker=worker.address)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(telling, 1.0)

    async def _be_replaced(self, worker: Any, patience: float) -> None:
        """Go on serving until there are other replicas, for a while."""
        try:
            await asyncio.wait_for(
                worker.scheduler.serve_leaving(worker=worker.address, patience=patience), patience + 0.5
            )
        except (OSError, asyncio.TimeoutError) as error:
            logger.info("The controller does not answer (%r); closing without replacements", error)
