"""Tells the controller how many requests run at the replicas of a worker that scale by it.

Nothing is paid per request: the first one after a pause starts a timer, which samples until nothing runs any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..policy.load import SAMPLE, Levels

if TYPE_CHECKING:
    from distributed import Worker

    from .core import ReplicaCore

__all__ = ["LoadReports"]


class LoadReports:
    """Samples what runs at some replicas of one worker, on the loop of the door.

    Parameters
    ----------
    worker : distributed.Worker
        Its connection to the scheduler carries the reports.
    loop : asyncio.AbstractEventLoop
        The door's, which all methods are for.
    """

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop
        self._cores: set[ReplicaCore] = set()
        self._levels = Levels()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def follow(cls, core: ReplicaCore, worker: Worker, loop: asyncio.AbstractEventLoop, wanted: bool) -> None:
        """Report on a replica from now on, or no more."""
        if not wanted:
            if core.load is not None:
                core.load._cores.discard(core)
                core.load = None
            return
        reports = _reports.get(worker)
        if reports is None or reports._loop is not loop:
            reports = _reports[worker] = cls(worker, loop)
        reports._cores.add(core)
        core.load = reports
        if core.admission.running:
            reports.wake()

    def wake(self) -> None:
        """A request has come."""
        if self._timer is None:
            # It is in the books with the next tick.
            self._timer = self._loop.call_later(SAMPLE, self._sample)

    def _sample(self) -> None:
        self._cores = {core for core in self._cores if not core.closed}
        report = self._levels.sample({core.id: core.admission.running for core in self._cores}, time.monotonic())
        if report is not None:
            # The worker's loop may have ended.
            with contextlib.suppress(RuntimeError):
                self._worker.loop.asyncio_loop.call_soon_threadsafe(self._tell, report)
        self._timer = None
        if not self._levels.quiet:
            self.wake()

    def _tell(self, report: dict[str, float]) -> None:
        self._worker.batched_send({"op": "serve-load", "running": report})


#: One for each worker, touched by the loop of its door only.
_reports: WeakKeyDictionary[Worker, LoadReports] = WeakKeyDictionary()
