"""Calls that wait for their batch, and the batches that run.

No thread waits for a batch but those of callers that block anyway: a batch of a ``def`` is made up when a thread has
come for it. A blocked caller runs the batch on its own thread where it can, so that a replica with one thread needs no
other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..exceptions import BatchError, RequestCancelledError, RequestTimeoutError, ServeError
from ..policy.batches import CostModel, Pace, compose
from .batch_items import Batch, BatchCounts, BatchSettings, Item
from .batch_rows import rows_of
from .batch_values import Parameters, split
from .pool import Pool

__all__ = ["Batcher"]

logger = logging.getLogger("dask_serve.batching")


class Batcher:
    """Batches the calls of one function in one place. From any thread.

    Parameters
    ----------
    name : str
        Of the function.
    parameters : Parameters
    settings : BatchSettings
    on_loop : bool
        Batches are coroutines (or generators, driven by one); else functions.
    loop : asyncio.AbstractEventLoop or None
        Where coroutines run, and timers; None: only threads call.
    pool : Pool or None
        Where functions run whose callers do not block; None: on the loop's own threads.
    """

    def __init__(
        self,
        name: str,
        parameters: Parameters,
        settings: BatchSettings,
        *,
        on_loop: bool,
        loop: asyncio.AbstractEventLoop | None,
        pool: Pool | None,
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.settings = settings
        self.counts = BatchCounts()
        self.cost = CostModel()
        self.loop = loop
        self.pool = pool
        self._on_loop = on_loop
        self._pace = Pace(self.cost)
        self._lock = threading.Lock()
        self._waiting: list[Item] = []
        self._running = 0
        #: Threads or tasks that are on their way to run a batch.
        self._called = 0
        #: Sizes of the waiting calls.
        self._size = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rings = 0.0
        self._batches: dict[Item, Batch] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    # ------------------------------------------------------------------ callers

    async def run(self, item: Item) -> Any:
        """Wait for the result of a call, on the running loop."""
        waiter = item.waiter()
        self.enter(item)
        try:
            await waiter
        except asyncio.CancelledError:
            self.give_up(item)
            raise
        return item.outcome()

    def run_blocking(self, item: Item) -> Any:
        """Wait for the result of a call in this thread, which runs batches itself where nobody else does."""
        gate = item.gate()
        request = item.request
        if request is not None:
            request.note(item, gate.set)
        try:
            with self._lock:
                self._append(item)
            while not item.settled:
                timeout = self._lead(item)
                if request is not None and request.cancelled and not item.settled:
                    raise RequestCancelledError(f"request {request.request_id} was cancelled")
                if not item.settled:
                    gate.wait(timeout)
                    gate.clear()
                if item.deadline is not None and not item.settled and time.monotonic() >= item.deadline:
                    raise RequestTimeoutError(f"the deadline passed while a call waited for a batch of {self.name}")
        finally:
            if request is not None:
                request.forget(item)
            if not item.settled:
                self.give_up(item)
            self.look()
        return item.outcome()

    def _lead(self, item: Item) -> float | None:
        """Run a batch in this thread, if one is due; else return the seconds after which to look again."""
        now = time.monotonic()
        with self._lock:
            due = self._due(now)
            batch, late = self._take(now) if due <= now else (None, [])
        self._refuse(late)
        if batch is not None:
            self._run_function(batch)
            return 0.0
        ends = min(due, item.deadline if item.deadline is not None else due)
        return None if ends == float("inf") else max(0.0, ends - now)

    def enter(self, item: Item) -> None:
        """Let a call wait for its batch."""
        with self._lock:
            self._append(item)
        self.look()

    def _append(self, item: Item) -> None:
        if self in item.inside:
            raise ServeError(f"a batch of {self.name} calls {self.name}, and would wait for itself")
        self._waiting.append(item)
        self._size += item.size

    def give_up(self, item: Item) -> None:
        """Its caller is gone."""
        with self._lock:
            if item.gone or item.settled:
                return
            item.gone = True
            batch = self._batches.get(item)
            if batch is None:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(item)
                    self._size -= item.size
                return
            batch.live -= 1
            abandoned = batch.live <= 0
        if abandoned:
            batch.cancel()

    # ------------------------------------------------------------------ when a batch begins

    def _due(self, now: float) -> float:
        """Return when the next batch should begin (under the lock)."""
        waiting = self._waiting
        if not waiting:
            return float("inf")
        settings = self.settings
        free = self._running < settings.concurrent
        pressing = float("inf")
        if settings.wait and free:
            halves = ((item.since + item.deadline) / 2 for item in waiting if item.deadline is not None)
            pressing = min(halves, default=pressing)
        return self._pace.due(
            now,
            self._size,
            waiting[0].since,
            most=settings.most,
            wait=settings.wait,
            free=free,
            idle=self._running == 0,
            pressing=pressing,
        )

    def look(self) -> None:
        """See to it that somebody comes when the next batch is due."""
        now = time.monotonic()
        with self._lock:
            if not self._waiting or self._called + self._running >= self.settings.concurrent:
                return
            due = self._due(now)
            leader = None if self._on_loop else next((item for item in self._waiting if item.blocks), None)
            if due <= now and leader is None:
                self._called += 1
        loop = self.loop
        if leader is not None:
            leader.wake()
        elif due > now:
            if loop is not None and (self._timer is None or self._rings > due):
                self._on_its_loop(partial(self._arm, due))
        elif loop is None:
            self._called -= 1
        else:
            # At the end of the loop's tick, for what the same tick brings.
            self._on_its_loop(self._come)

    def _on_its_loop(self, function: Callable[[], object]) -> None:
        assert self.loop is not None
        if _runs_here(self.loop):
            self.loop.call_soon(function)
        else:
            # A closed loop has no callers left.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(function)

    def _arm(self, due: float) -> None:
        assert self.loop is not None
        if self._timer is not None:
            if self._rings <= due:
                # It looks again itself.
                return
            self._timer.cancel()
        self._rings = due
        self._timer = self.loop.call_later(max(0.0, due - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.look()

    def _come(self) -> None:
        """Make up a batch and run it as a task, or send for a thread that does (on the loop)."""
        assert self.loop is not None
        if self._on_loop:
            batch = self._begin()
            if batch is not None:
                batch.task = batch.items[0].context.run(self.loop.create_task, self._run_task(batch))
        elif self.pool is not None:
            self.pool.submit(self._work)
        else:
            self.loop.run_in_executor(None, self._work)

    def _work(self) -> None:
        batch = self._begin()
        if batch is not None:
            self._run_function(batch)
            self.look()

    def _begin(self) -> Batch | None:
        """Make up the batch that this was called for, if it is still due."""
        now = time.monotonic()
        with self._lock:
            self._called -= 1
            due = self._due(now)
            batch, late = self._take(now) if due <= now else (None, [])
        self._refuse(late)
        if batch is None:
            self.look()
        return batch

    def _take(self, now: float) -> tuple[Batch | None, list[Item]]:
        """Make up a batch (under the lock); also return the calls that cannot be in time any more."""
        late = [item for item in self._waiting if item.deadline is not None and item.deadline <= now]
        alive = [item for item in self._waiting if item.deadline is None or item.deadline > now]
        batch = None
        if alive:
            # Calls for one model, and of arrays that can be stacked: those of the one that came first.
            key = alive[0].key
            taken, hopeless = compose([item for item in alive if item.key == key], now, self.cost, self.settings.most)
            late += hopeless
            self._pace.began(sum(item.size for item in alive))
            self._running += 1
            batch = Batch(taken, self)
            for item in taken:
                self._batches[item] = batch
            counts = self.counts
            counts.batches += 1
            counts.calls += len(taken)
            counts.largest = max(counts.largest, len(taken))
            counts.waited += sum(now - item.since for item in taken)
        if batch is not None or late:
            left = {*late, *(batch.items if batch is not None else ())}
            self._waiting = [item for item in self._waiting if item not in left]
            self._size = sum(item.size for item in self._waiting)
        return batch, late

    def _refuse(self, late: Sequence[Item]) -> None:
        if late:
            self.counts.late += len(late)
            message = f"a call could not be answered in time by the next batch of {self.name}; it was not executed"
            for item in late:
                item.settle(None, RequestTimeoutError(message))
            Item.tell(late)

    def _ended(self, batch: Batch) -> None:
        now = time.monotonic()
        with self._lock:
            self._running -= 1
            for item in batch.items:
                self._batches.pop(item, None)
            size = sum(item.size for item in batch.items)
            self._pace.ended(now, size, self._size)
        batch.context.end()

    # ------------------------------------------------------------------ running

    def _run_function(self, batch: Batch) -> None:
        """Run a batch in this thread; never raises."""
        todo = [batch.items]
        context = batch.items[0].context
        while todo:
            part = self.still_wanted(todo.pop())
            if part:
                try:
                    results = context.run(self._call, batch, part)
                except BaseException as error:  # noqa: BLE001 - somebody waits for it
                    self.failed(part, error, todo)
                else:
                    self.answered(part, results)
        self._ended(batch)

    def _call(self, batch: Batch, part: Sequence[Item]) -> list[Any]:
        batch.enter()
        args, kwargs = self.columns(part)
        began = time.monotonic()
        result = part[0].call(*args, **kwargs)
        self.measured(part, time.monotonic() - began)
        return self.split(result, part)

    async def _run_task(self, batch: Batch) -> None:
        batch.enter()
        todo = [batch.items]
        try:
            while todo:
                part = self.still_wanted(todo.pop())
                if part:
                    try:
                        args, kwargs = self.columns(part)
                        began = time.monotonic()
                        result = await part[0].call(*args, **kwargs)
                        self.measured(part, time.monotonic() - began)
                        results = self.split(result, part)
                    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - somebody waits for it
                        # Raised in a task, the last two would end the loop, and all that runs there.
                        self.failed(part, error, todo)
                    else:
                        self.answered(part, results)
        except BaseException as error:
            self.fail(self.still_wanted(batch.items), error)
            raise
        finally:
            self._ended(batch)
            self.look()

    def columns(self, part: Sequence[Item]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the function for these calls."""
        return self.parameters.columns([item.values for item in part], self.settings.stack)

    def split(self, result: Any, part: Sequence[Item]) -> list[Any]:
        """Return the results of single calls."""
        by_rows = self.settings.stack == "rows"
        sizes = [rows_of(item.values, self.name) if by_rows else 1 for item in part]
        return split(result, sizes, self.settings.stack, self.name)

    def measured(self, part: Sequence[Item], seconds: float) -> None:
        """A batch of these calls took that long."""
        with self._lock:
            self.cost.observe(sum(item.size for item in part), seconds)
            self.counts.run += seconds

    def still_wanted(self, items: Sequence[Item]) -> list[Item]:
        """Return the calls that somebody waits for."""
        return [item for item in items if not item.gone and not item.settled]

    def answered(self, part: Sequence[Item], results: Sequence[Any]) -> None:
        """These calls have their results."""
        for item, result in zip(part, results, strict=True):
            item.settle(result, None)
        Item.tell(part)

    def failed(self, part: Sequence[Item], error: BaseException, todo: list[list[Item]]) -> None:
        """The function failed for these calls: they fail, or each half of them is tried again."""
        again = isinstance(error, Exception) and not isinstance(error, BatchError)
        if len(part) > 1 and again and self.settings.bisect:
            middle = len(part) // 2
            todo += [list(part[middle:]), list(part[:middle])]
            self.counts.reruns += 2
            logger.info("A batch of %d calls of %s failed; its halves are tried: %r", len(part), self.name, error)
            return
        self.fail(part, error)

    def fail(self, items: Sequence[Item], error: BaseException) -> None:
        """These calls have failed."""
        self.counts.failed += len(items)
        for item in items:
            item.settle(None, error)
        Item.tell(items)


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
