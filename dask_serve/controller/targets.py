"""The numbers that autoscaling has come to, in the state file: a scheduler that comes back begins with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from .registry import Registry
from .store import Store, StoreError

__all__ = ["Targets"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that changes are collected for before they are written.
SETTLE = 1.0


class Targets:
    """Saves the registry's targets a while after they have changed.

    Parameters
    ----------
    registry : Registry
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._store: Store | None = None
        self._saved: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def restore(self, store: Store, saved: Mapping[str, int]) -> None:
        """Take over what the file holds, and save to it from now on."""
        self._store, self._saved = store, dict(saved)
        for id in self._registry.scaled():
            if id in saved:
                self._registry.set_target(id, saved[id], "as before the scheduler was started again")

    def look(self) -> None:
        """See to it that what has changed is saved; does not wait for it."""
        if self._store is not None and self._task is None and self._registry.targets != self._saved:
            self._task = asyncio.get_running_loop().create_task(self._save_soon(self._store))

    async def _save_soon(self, store: Store) -> None:
        try:
            while self._registry.targets != self._saved:
                await asyncio.sleep(SETTLE)
                await self._save(store)
        finally:
            self._task = None

    async def _save(self, store: Store) -> None:
        self._saved = dict(self._registry.targets)
        try:
            await store.save_targets(self._saved)
        except StoreError as error:
            # They hold for this scheduler all the same.
            logger.error("%s", error)

    async def close(self) -> None:
        """Write what is left to be written."""
        task = self._task
        if task is not None and self._store is not None:
            task.cancel()
            await asyncio.wait([task])
            await self._save(self._store)
