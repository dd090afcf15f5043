"""Threads for ``def`` methods."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

__all__ = ["Pool"]


class Pool:
    """At most ``size`` daemon threads, started as they are needed.

    Not the standard library's executor: the interpreter waits for its threads at exit, so that one ``def`` that never
    returns would keep a worker from ending; and a hand-over costs it several times as much.

    Parameters
    ----------
    size : int
    name : str
        Of the threads.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        #: How many functions threads have begun to run: it changes as long as the pool gets on.
        self.begun = 0
        #: Called by each thread before what it runs next, when it was changed.
        self.prepare: Callable[[], object] = _nothing
        self._name = name
        self._jobs: SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Nothing is started any more."""
        return self._stopped

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads there are."""
        return list(self._threads)

    @property
    def is_awaited(self) -> bool:
        """Something waits for a thread."""
        return not self._jobs.empty()

    def submit(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function``, which does not raise, on a thread. From any thread."""
        self._jobs.put((function, args))
        if len(self._threads) < self._size:
            self._grow()

    def _grow(self) -> None:
        with self._lock:
            if len(self._threads) < self._size and not self._stopped:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        prepared: Callable[[], object] = _nothing
        while not self._stopped:
            job = self._jobs.get()
            if job is None:
                return
            # Not exact with several threads, which does no harm.
            self.begun += 1
            if self.prepare is not prepared:
                prepared = self.prepare
                prepared()
            job[0](*job[1])
            # What was run must not live until there is something else to do.
            del job

    async def run(self, function: Callable[[], Any]) -> Any:
        """Run a function on a thread and return its result.

        A caller that is cancelled meanwhile leaves only when the function has returned: what runs, counts as running.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[bool, Any]] = loop.create_future()

        def call() -> None:
            try:
                outcome = (True, function())
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                outcome = (False, error)
            # Once the loop is closed nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set_result, outcome)

        self.submit(call)
        cancelled: asyncio.CancelledError | None = None
        while not done.done():
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError as error:
                cancelled = error
                if self._stopped:
                    raise
        if cancelled is not None:
            raise cancelled
        returned, value = done.result()
        if returned:
            return value
        raise value

    def stop(self) -> None:
        """Start nothing more, and end the threads as soon as what runs there returns. From any thread."""
        self._stopped = True
        with contextlib.suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)


def _nothing() -> None:
    pass
