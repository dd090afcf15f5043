"""Stored values whose refs were promoted, and dropped before Dask had taken the value."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from .state import RefState

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Leftovers"]

logger = logging.getLogger("dask_serve.refs")

#: Seconds between two questions to the scheduler.
EVERY = 1.0
#: A key that the scheduler does not know this many times in a row is forgotten, rather than not there yet.
UNKNOWN = 2


class Leftovers:
    """Frees what nobody else frees.

    The task that a ref became frees the value once it has taken it. A task that Dask forgets before it runs frees
    nothing, and one whose value calls share leaves it too. Whether others still want a task, only the scheduler knows.

    All methods are for the loop of the session's owner.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._states: dict[str, RefState] = {}
        self._unknown: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._states)

    def add(self, key: str, state: RefState) -> None:
        """Look after the value of a ref that became the task ``key``."""
        if self._session.closed:  # the door frees what a caller leaves behind
            return
        self._states[key] = state
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        try:
            while self._states and not self._session.closed:
                await asyncio.sleep(EVERY)
                try:
                    known = await self._session.owner.scheduler.get_task_status(keys=list(self._states))
                except Exception as error:  # noqa: BLE001
                    logger.info("The scheduler does not tell which refs are still wanted: %s", error)
                    continue
                for key, status in known.items():
                    self._look_at(key, status)
        finally:
            self._task = None

    def _look_at(self, key: str, status: str | None) -> None:
        self._unknown[key] = 0 if status is not None else self._unknown.get(key, 0) + 1
        state = self._states[key]
        if state.outcome is None or (status not in {"memory", "erred"} and self._unknown[key] < UNKNOWN):
            return
        del self._states[key], self._unknown[key]
        stored = state.outcome.stored
        if stored is not None:
            self._session.release(stored.process, stored.name)
