"""What a replica holds of its worker's Dask resources for as long as it lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from distributed.utils import time
from distributed.worker_state_machine import UnpauseEvent

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Hold"]

logger = logging.getLogger("dask_serve.replica")

#: Seconds that the worker's loop may take to note it.
TIMEOUT = 30.0


class Hold:
    """Keeps what the actor's task acquired.

    Dask gives a task's resources back when the task has run, also that of an actor. While it runs, they are taken off
    what the worker has in all: tasks that want them wait, by Dask's own rules, until the replica ends.

    Parameters
    ----------
    worker : distributed.Worker
    key : str
        The actor's key.
    """

    def __init__(self, worker: Worker, key: str) -> None:
        self._worker = worker
        self._key = key
        self._taken: dict[str, float] = {}

    def take(self) -> None:
        """Take over what the actor's task has acquired. In its constructor, on a thread of the worker; blocks."""
        asyncio.run_coroutine_threadsafe(self._take(), self._worker.loop.asyncio_loop).result(TIMEOUT)

    async def _take(self) -> None:
        state = self._worker.state
        task = state.tasks.get(self._key)
        if task is None or task not in state.executing or not task.resource_restrictions:
            return
        for name, amount in task.resource_restrictions.items():
            state.total_resources[name] -= amount
            self._taken[name] = amount
        # Nothing of it is released when the constructor has returned.
        task.resource_restrictions = {}

    def give_back(self) -> None:
        """The replica has ended. From any thread; waits for nothing."""
        # The worker's loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            self._worker.loop.asyncio_loop.call_soon_threadsafe(self._give_back)

    def _give_back(self) -> None:
        taken, self._taken = self._taken, {}
        if not taken:
            return
        state = self._worker.state
        for name, amount in taken.items():
            state.total_resources[name] = round(state.total_resources[name] + amount, 9)
            state.available_resources[name] = round(state.available_resources[name] + amount, 9)
        if state.running:
            # Let it look for tasks that have waited for this.
            self._worker.handle_stimulus(UnpauseEvent(stimulus_id=f"serve-give-back-{time()}"))
