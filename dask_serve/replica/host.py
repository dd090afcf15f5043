"""What a replica offers to batched methods and multiplexed models: its loop, its threads, a place for their counts."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batcher import Batcher
    from .datasets import DataSets
    from .models import Models
    from .pool import Pool

__all__ = ["Host", "current_host", "enter_host"]


class Host:
    """One replica, as seen by what runs in it.

    Attributes
    ----------
    loop : asyncio.AbstractEventLoop
        Where its coroutines run.
    pool : Pool
        Where its ``def`` methods run.
    on_models : callable
        Called, from any thread, when what is loaded has changed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
        self.loop = loop
        self.pool = pool
        self._batchers: list[weakref.ref[Batcher]] = []
        self._models: list[weakref.ref[Models]] = []
        #: Published data sets that requests may refer to.
        self.data_sets: DataSets | None = None
        self.on_models: Callable[[], object] = lambda: None

    def add_batcher(self, batcher: Batcher) -> None:
        """Count what a batcher does. From any thread."""
        self._batchers = [known for known in self._batchers if known() is not None] + [weakref.ref(batcher)]

    def add_models(self, models: Models) -> None:
        """Tell what is loaded there. From any thread."""
        self._models = [known for known in self._models if known() is not None] + [weakref.ref(models)]

    def loaded(self) -> tuple[list[str], list[str]]:
        """Return the models that are there, and those that are being loaded."""
        ready: set[str] = set()
        loading: set[str] = set()
        for known in self._models:
            models = known()
            if models is not None:
                there, coming = models.names()
                ready.update(there)
                loading.update(coming)
        return sorted(ready), sorted(loading - ready)

    def batch_counts(self) -> dict[str, dict[str, float]]:
        """Return what the batched methods have done, by name."""
        batchers = [known() for known in self._batchers]
        return {batcher.name: batcher.counts.as_dict(len(batcher)) for batcher in batchers if batcher is not None}

    def batch_totals(self) -> dict[str, Counter[str]]:
        """Return what of that only grows."""
        totals = ("batches", "calls", "reruns")
        return {
            method: Counter({name: int(counts[name]) for name in totals})
            for method, counts in self.batch_counts().items()
        }

    async def close(self) -> None:
        """The replica ends: let models go."""
        for known in self._models:
            models = known()
            if models is not None:
                await models.close()


_host: contextvars.ContextVar[Host | None] = contextvars.ContextVar("dask_serve_host", default=None)


def current_host() -> Host | None:
    """Return the replica that runs this code, or None outside of one."""
    return _host.get()


def enter_host(host: Host) -> Any:
    """Make ``host`` the replica of the present context."""
    return _host.set(host)
