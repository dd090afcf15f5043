"""Batched generators: each list that one yields has one item for each caller's stream."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..exceptions import BatchError, ServeError
from .batch_items import Batch, Item
from .batcher import Batcher

__all__ = ["BatchStream", "StreamBatcher"]

#: Items that a caller may be behind before the generator waits for it, and with it the other callers of the batch.
BEHIND = 64

_END: Any = object()


class BatchStream:
    """What one caller gets of a batched generator: an asynchronous iterator. The call begins with the first step."""

    def __init__(self, batcher: StreamBatcher, item: Item) -> None:
        self._batcher = batcher
        self._item = item
        self._entered = False
        self._values: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> BatchStream:
        return self

    def __iter__(self) -> Any:
        raise ServeError(
            f"what the batched generator {self._batcher.name} returns is iterated in `async def` code, with "
            "`async for`: a thread that waits for it could be the one that it needs"
        )

    async def __anext__(self) -> Any:
        item = self._item
        if not self._entered:
            self._entered = True
            self._loop = asyncio.get_running_loop()
            self._batcher.streams[item] = self
            self._batcher.enter(item)
        while not self._values:
            if item.settled or item.gone:
                self._batcher.streams.pop(item, None)
                item.outcome()
                raise StopAsyncIteration
            assert self._loop is not None
            self._waiter = self._loop.create_future()
            # What came meanwhile found nobody to wake.
            if not self._values and not item.settled:
                await self._waiter
        if len(self._values) == BEHIND:
            self._batcher.went_on()
        return self._values.popleft()

    async def aclose(self) -> None:
        """Want no more of it."""
        if self._entered:
            self._batcher.give_up(self._item)
            self._batcher.went_on()
        self._entered = self._item.gone = True

    def put(self, value: Any) -> None:
        """Take one item (on the batcher's loop)."""
        self._values.append(value)
        self.wake()

    @property
    def is_behind(self) -> bool:
        """Its caller has much to take."""
        return len(self._values) >= BEHIND

    def wake(self) -> None:
        """Something has come, or nothing more will."""
        waiter, loop = self._waiter, self._loop
        if waiter is not None and loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, waiter)


class StreamBatcher(Batcher):
    """Batches the calls of a generator function, ``def`` or ``async def``. Its batches are driven by tasks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams: dict[Item, BatchStream] = {}
        self._room: asyncio.Event | None = None

    def went_on(self) -> None:
        """A caller that was behind has taken something."""
        if self._room is not None and self.loop is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._room.set)

    async def _run_task(self, batch: Batch) -> None:
        batch.enter()
        todo = [batch.items]
        try:
            while todo:
                part = self.still_wanted(todo.pop())
                if part:
                    await self._run_part(part, todo)
        except BaseException as error:
            self.fail(self.still_wanted(batch.items), error)
            raise
        finally:
            self._wake(batch.items)
            self._ended(batch)
            for item in batch.items:
                self.streams.pop(item, None)
            self.look()

    async def _run_part(self, part: list[Item], todo: list[list[Item]]) -> None:
        begun = False
        steps: Any = None
        try:
            args, kwargs = self.columns(part)
            steps = part[0].call(*args, **kwargs)
            step = anext_of(steps, self)
            while (values := await step()) is not _END:
                if not isinstance(values, (list, tuple)) or len(values) != len(part):
                    found = len(values) if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
                    raise BatchError(
                        f"the batched generator {self.name} has {len(part)} callers and yielded {found}; it must yield "
                        "lists with one item for each, in their order"
                    )
                begun = True
                self._give(part, values)
                await self._wait_for_room(part)
                if not self.still_wanted(part):
                    break
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - somebody waits for it
            if begun:
                # What has been given to callers cannot be taken back.
                self.fail(self.still_wanted(part), error)
            else:
                self.failed(part, error, todo)
        else:
            self.answered(part, [None] * len(part))
        finally:
            if steps is not None:
                await self._close(steps)
        self._wake(part)

    def _give(self, part: list[Item], values: Any) -> None:
        for item, value in zip(part, values, strict=True):
            if item.gone or item.settled:
                continue
            if value is StopIteration or value is StopAsyncIteration:
                item.settle(None, None)
                self.streams[item].wake()
            else:
                self.streams[item].put(value)

    async def _wait_for_room(self, part: list[Item]) -> None:
        while any(self.streams[item].is_behind for item in self.still_wanted(part)):
            self._room = self._room or asyncio.Event()
            self._room.clear()
            # Whoever went on since the look found the event set already.
            if any(self.streams[item].is_behind for item in self.still_wanted(part)):
                await self._room.wait()

    def _wake(self, items: list[Item]) -> None:
        for item in items:
            stream = self.streams.get(item)
            if stream is not None and (item.settled or item.gone):
                stream.wake()

    async def _close(self, steps: Any) -> None:
        if hasattr(steps, "aclose"):
            await steps.aclose()
        elif hasattr(steps, "close"):
            await self.in_thread(steps.close)

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Run a step of a plain generator where ``def`` methods run."""
        context = contextvars.copy_context()
        run = partial(context.run, function)
        if self.pool is not None:
            return await self.pool.run(run)
        return await asyncio.get_running_loop().run_in_executor(None, run)


def anext_of(steps: Any, batcher: StreamBatcher) -> Callable[[], Any]:
    """Return what makes the next step of a generator, or `_END`."""
    if inspect.isasyncgen(steps) or hasattr(steps, "__anext__"):

        async def step() -> Any:
            return await anext(steps, _END)

        return step
    iterator: Iterator[Any] = iter(steps)
    return lambda: batcher.in_thread(lambda: next(iterator, _END))


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
