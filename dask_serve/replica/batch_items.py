"""A call that waits for its batch, the batch, and what is counted and set."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..context import BatchContext, request_context
from .batch_values import Stack

if TYPE_CHECKING:
    from .batcher import Batcher

__all__ = ["Batch", "BatchCounts", "BatchSettings", "Item"]

#: The batchers whose batches wait for this code.
_inside: contextvars.ContextVar[frozenset[Batcher]] = contextvars.ContextVar("dask_serve_batches", default=frozenset())


class BatchSettings:
    """How one batched method batches; what changes while it serves is changed here."""

    __slots__ = ("bisect", "concurrent", "most", "size_fn", "stack", "wait")

    def __init__(
        self,
        *,
        most: int,
        wait: float,
        concurrent: int,
        size_fn: Callable[[list[Any]], float] | None,
        bisect: bool,
        stack: Stack,
    ) -> None:
        self.most = most
        self.wait = wait
        self.concurrent = concurrent
        self.size_fn = size_fn
        self.bisect = bisect
        self.stack = stack


class BatchCounts:
    """What a batcher has done."""

    __slots__ = ("batches", "calls", "failed", "largest", "late", "reruns", "run", "waited")

    def __init__(self) -> None:
        self.batches = self.calls = self.reruns = self.failed = self.late = self.largest = 0
        self.waited = self.run = 0.0

    def as_dict(self, waiting: int) -> dict[str, float]:
        """Return the counts, with means."""
        return {
            "batches": self.batches,
            "calls": self.calls,
            "reruns": self.reruns,
            "failed": self.failed,
            "late": self.late,
            "largest": self.largest,
            "waiting": waiting,
            "mean_size": self.calls / self.batches if self.batches else 0.0,
            "mean_wait_s": self.waited / self.calls if self.calls else 0.0,
            "mean_run_s": self.run / (self.batches + self.reruns) if self.batches else 0.0,
        }


class Item:
    """One call that waits for its batch, then for its result."""

    __slots__ = (
        "_future",
        "_gate",
        "_loop",
        "call",
        "context",
        "deadline",
        "error",
        "gone",
        "inside",
        "key",
        "request",
        "result",
        "settled",
        "since",
        "size",
        "traceback",
        "values",
    )

    def __init__(self, call: Callable[..., Any], values: tuple[Any, ...], size: float, key: Any) -> None:
        self.call = call
        self.values = values
        self.size = size
        self.request = request_context.get()
        self.key = (key, self.request.multiplexed_model_id if self.request is not None else "")
        self.context = contextvars.copy_context()
        #: Batchers that wait for it.
        self.inside = _inside.get()
        self.since = time.monotonic()
        self.deadline = None if self.request is None else self.request.deadline
        self.gone = False
        self.settled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None
        self._gate: threading.Event | None = None

    @property
    def blocks(self) -> bool:
        """Its caller is a thread that waits."""
        return self._gate is not None

    def waiter(self) -> asyncio.Future[None]:
        """Return what its caller awaits, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        return self._future

    def gate(self) -> threading.Event:
        """Return what its caller waits for in a thread."""
        self._gate = threading.Event()
        return self._gate

    def wake(self) -> None:
        """Let the caller look again."""
        if self._gate is not None:
            self._gate.set()

    def settle(self, result: Any, error: BaseException | None) -> None:
        """It has ended; the caller is told by `tell`."""
        self.result = result
        self.error = error
        self.traceback = None if error is None else error.__traceback__
        self.settled = True

    def outcome(self) -> Any:
        """Return the result, or raise."""
        error, self.error = self.error, None
        if error is not None:
            traceback, self.traceback = self.traceback, None
            # Others raise the same: each as it came from the batch, not with what was added on the way to them.
            raise error.with_traceback(traceback)
        return self.result

    @staticmethod
    def tell(items: Sequence[Item]) -> None:
        """Wake the callers of settled items, each loop once."""
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for item in items:
            if item._gate is not None:
                item._gate.set()
            elif item._loop is not None and item._future is not None:
                loops.setdefault(item._loop, []).append(item._future)
        for loop, futures in loops.items():
            # Nobody is left there when it is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_all, futures)


def _set_all(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Batch:
    """Calls that run together."""

    __slots__ = ("began", "context", "inside", "items", "live", "name", "task")

    def __init__(self, items: list[Item], owner: Batcher) -> None:
        self.items = items
        self.live = len(items)
        self.began = time.monotonic()
        self.context = BatchContext([item.request for item in items if item.request is not None])
        self.name = owner.name
        self.inside = frozenset[Any]((owner,)).union(*(item.inside for item in items))
        self.task: asyncio.Task[None] | None = None

    def enter(self) -> None:
        """The present context is the batch's; outside of requests that of the first call stays."""
        _inside.set(self.inside)
        if self.context.requests:
            request_context.set(self.context)
            spans = self.context.requests[0].spans
            if spans is not None:
                spans.begin_batch(self)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        task = self.task
        self.context.cancel(refuse=task is None)
        if task is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)
