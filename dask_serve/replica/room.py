"""Room for results: calls from Python wait at their routers while the store of the process is full.

How many a replica may run at once follows from what the store holds and from how large its results are; what is freed
lets the next ones in at once. Requests that add nothing for long are never held back: HTTP requests, calls that a
running request makes, and those that take a stored result as an argument for the first time.

Should everything stand still all the same, because whoever waits for the calls that wait is also the one who keeps
what fills the store, then one call a second is let in, and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import dask
from dask.system import CPU_COUNT
from dask.utils import format_bytes, parse_bytes
from distributed.system import MEMORY_LIMIT

from ..exceptions import ConfigError
from ..policy.results import most_at_once
from ..routing.store import ResultStore

if TYPE_CHECKING:
    from distributed import Worker

    from .core import ReplicaCore

__all__ = ["Room"]

logger = logging.getLogger("dask_serve.door")

#: Default of ``serve.results-limit``: this fraction of the worker's memory.
FRACTION = 0.3
#: Seconds without any change after which one call is let in though there is no room.
STALLED_AFTER = 1.0


def limit_for(worker: Worker) -> int | None:
    """Return the bytes of results that the process of a worker may hold, or None for any number.

    ``serve.results-limit`` in Dask's configuration: bytes as Dask parses them ("2 GiB"), or a fraction (up to 1) of
    the worker's memory limit. A worker without a limit has the share of the machine's memory that Dask would give it
    by its threads. 0: no limit.

    Raises
    ------
    ConfigError
        It is neither.
    """
    setting = dask.config.get("serve.results-limit", FRACTION)
    try:
        fraction = float(setting)
    except (TypeError, ValueError):
        fraction = None
    try:
        if fraction is not None and 0 <= fraction <= 1:
            memory = worker.memory_manager.memory_limit
            memory = memory or MEMORY_LIMIT * min(1.0, worker.state.nthreads / CPU_COUNT)
            return int(fraction * memory) or None
        limit = int(parse_bytes(setting))
    except (AttributeError, TypeError, ValueError):
        limit = -1
    if limit < 0:
        raise ConfigError(
            f"serve.results-limit = {setting!r} in Dask's configuration is not valid: give bytes, such as '2 GiB', a "
            "fraction of the worker's memory, such as 0.3, or 0 for no limit"
        )
    return limit


class Room:
    """Keeps the replicas of a process from storing more than its limit. For the door's loop.

    Parameters
    ----------
    store : ResultStore
    cores : collection of ReplicaCore
        The replicas, as they come and go.
    loop : asyncio.AbstractEventLoop
    call : callable
        Runs a function on that loop, from any thread.
    """

    def __init__(
        self,
        store: ResultStore,
        cores: Collection[ReplicaCore],
        loop: asyncio.AbstractEventLoop,
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        self.store = store
        self._cores = cores
        self._loop = loop
        self._call = call
        self._look_is_due = False
        self._events = -1
        self._timer: asyncio.TimerHandle | None = None
        self._told = False

    def look(self) -> None:
        """See how much room there is, and tell the replicas."""
        self._look_is_due = False
        store = self.store
        if store.limit is None:
            return
        held = store.settle()
        storing = [core for core in self._cores if core.result_size.mean]
        pressed = False
        for core in storing:
            most = most_at_once(store.limit, held, core.result_size.mean, len(storing))
            pressed = pressed or (most is not None and most < core.admission.limit)
            core.set_most(most)
        if not pressed:
            store.freed = None
            self._told = False
        elif store.freed is None:
            store.freed = self._on_freed
            if store.settle() != held:
                # Something was freed before anybody listened.
                self.look()

    def _on_freed(self) -> None:
        """A result is gone; in any thread, maybe in a finaliser."""
        if not self._look_is_due:
            self._look_is_due = True
            self._call(self.look)

    # ------------------------------------------------------------------ when everything stands still

    def refused(self) -> None:
        """A call has to wait for room."""
        if self._timer is None:
            self._events = self.store.events
            self._timer = self._loop.call_later(STALLED_AFTER, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        held_back = [core for core in self._cores if core.admission.held_back]
        if not held_back:
            return
        if self._events == self.store.events and not any(core.admission.storing for core in self._cores):
            self._let_one_in(held_back[0])
        self.refused()

    def _let_one_in(self, core: ReplicaCore) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "Calls wait for room for their results: this process holds %d of %s, its limit is %s "
                "(serve.results-limit), and nobody fetches them; one call a second is let in. Fetch results or drop "
                "their refs while you wait for others, or raise the limit",
                len(self.store),
                format_bytes(self.store.settle()),
                format_bytes(self.store.limit or 0),
            )
        core.set_most(1)

    def close(self) -> None:
        """The door closes."""
        self.store.freed = None
        if self._timer is not None:
            self._timer.cancel()
