"""Finds workers that hang: stopped, swapping, or with an interpreter that somebody does not let go of."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from distributed.scheduler import heartbeat_interval

from ..wire.tls import for_callers
from .knocks import Knocks

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from .reconciler import Reconciler
    from .registry import Registry
    from .replica import Replica

__all__ = ["Pulse"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two looks at the heartbeats.
TICK = 0.25
#: Seconds without a sign of life after which a door is knocked at; from so many workers on, later in proportion. Dask's
#: heartbeats get rarer with the number of workers, but a hung one is to be noticed within 3 s.
QUIET = 1.5
MANY = 200
#: Seconds that a door may take to answer; one that takes longer is silent.
PROBE = 1.0
#: How many processes that were given up the table names.
REMEMBERED = 100


class _Beat:
    """One worker's heartbeats, and its answers when they were rare."""

    __slots__ = ("probe", "quiet", "seen", "silence")

    def __init__(self) -> None:
        self.seen = 0.0
        #: Seconds since the last one, as far as we were there to hear it.
        self.silence = 0.0
        #: The same since the last sign of life.
        self.quiet = 0.0
        self.probe: asyncio.Task[None] | None = None


class Pulse:
    """Watches the workers that hold replicas, by Dask's heartbeats and, when those are late, by the doors.

    A door that does not answer gets no new requests. What runs behind it is given up when the heartbeats stay away as
    well, for ``health_check_timeout_s``: a worker may be busy for that long.

    Parameters
    ----------
    scheduler : Scheduler
    registry : Registry
    reconciler : Reconciler
    secret : bytes
        The cluster's secret.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, reconciler: Reconciler, secret: bytes) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._reconciler = reconciler
        self._knocks = Knocks(secret, for_callers(scheduler.security))
        self._beats: dict[str, _Beat] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        try:
            while True:
                await asyncio.sleep(TICK)
                now = loop.time()
                # While this process itself was stopped or busy, nobody was silent.
                passed, before = min(now - before, 2 * TICK), now
                try:
                    self._look(passed)
                except Exception:
                    logger.exception("looking at the heartbeats failed")
        finally:
            for beat in self._beats.values():
                if beat.probe is not None:
                    beat.probe.cancel()
            self._knocks.close()

    def _look(self, passed: float) -> None:
        registry, workers = self._registry, self._scheduler.workers
        late = 2 * heartbeat_interval(len(workers)) + TICK
        quiet = min(late, QUIET * max(1.0, len(workers) / MANY))
        if gone := self._beats.keys() - registry.by_worker.keys() - registry.silent:
            for worker in gone:
                del self._beats[worker]
            self._knocks.keep({r.process for address in self._beats for r in registry.on_worker(address)})
        for address in registry.by_worker.keys() | registry.silent:
            worker = workers.get(address)
            if worker is None:
                continue
            beat = self._beats.setdefault(address, _Beat())
            if worker.last_seen != beat.seen:
                beat.seen, beat.silence, beat.quiet = worker.last_seen, 0.0, 0.0
                self._note(address, silent=False)
                self._look_at_door(address, worker.metrics.get("serve") or {})
                continue
            beat.silence += passed
            beat.quiet += passed
            if beat.quiet >= quiet and beat.probe is None:
                beat.probe = asyncio.get_running_loop().create_task(self._probe(address, beat, late))
            if address in registry.silent:
                self._give_up(address, beat.silence)

    async def _probe(self, worker: str, beat: _Beat, late: float) -> None:
        doors = {(r.process, r.door) for r in self._registry.on_worker(worker) if r.door}
        try:
            answers = [await self._knocks.answers(*door, PROBE) for door in doors]
            # Where there is no door yet, the heartbeat is all there is.
            silent = not any(answers) and (bool(doors) or beat.silence >= late)
            if not silent:
                beat.quiet = 0.0
            if beat.silence:
                self._note(worker, silent)
        finally:
            beat.probe = None

    def _note(self, worker: str, silent: bool) -> None:
        registry = self._registry
        if silent == (worker in registry.silent):
            return
        if silent:
            logger.warning("Worker %s does not answer: no new requests go there", worker)
            self._reconciler.notes.add("silent", worker, "it does not answer: no new requests go there")
            registry.silent.add(worker)
        else:
            logger.warning("Worker %s answers again", worker)
            self._reconciler.notes.add("answers", worker, "it answers again, and gets requests")
            registry.silent.discard(worker)
        registry.touch_worker(worker)
        self._reconciler.wake()

    def _give_up(self, worker: str, silence: float) -> None:
        lost = [r for r in self._registry.on_worker(worker) if silence >= r.spec.options.health_check_timeout_s]
        if not lost:
            return
        for process in {replica.process for replica in lost if replica.process}:
            if process not in self._registry.given_up:
                self._registry.given_up = [*self._registry.given_up[1 - REMEMBERED :], process]
        for replica in lost:
            self._lose(replica, silence)

    def _lose(self, replica: Replica, silence: float) -> None:
        if replica.state == "starting":
            # A constructor that keeps the interpreter for so long would do it again elsewhere.
            why = f"its worker did not answer for {silence:.0f} s (health_check_timeout_s) while it was constructed"
            self._reconciler.reported_failed(replica, why)
        else:
            self._reconciler.lose([replica], f"given up after {silence:.0f} s of silence of worker")

    def _look_at_door(self, worker: str, told: dict[str, Any]) -> None:
        process, shut = told.get("process"), told.get("shut", 0.0)
        if not shut:
            return
        for replica in self._registry.on_worker(worker):
            if (
                replica.process == process
                and replica.state == "ready"
                and shut >= replica.spec.options.health_check_timeout_s
            ):
                self._reconciler.reported_failed(replica, f"the door of its process {process} is shut")
