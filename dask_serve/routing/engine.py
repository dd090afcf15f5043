"""The engine: the one background event loop of a process, for callers that have no loop of their own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from ..wire.loops import new_event_loop
from ..wire.mailbox import Mailbox

__all__ = ["Engine"]


class Engine:
    """A daemon thread with an event loop, shared by all sessions of the process and ended with the last of them."""

    #: How often this process has been forked off: an engine's thread stays in the process that began it. Counted, as
    #: asking for the process's id costs every call a system call.
    forks: ClassVar[int] = 0
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[Engine | None] = None

    def __init__(self) -> None:
        self.loop = new_event_loop()
        self.mailbox = Mailbox(self.loop, _run)
        self.born = Engine.forks
        self._users = 0
        self._thread = threading.Thread(target=self._main, name="dask-serve-engine", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> Engine:
        """Return the process's engine, started if there is none; give it back with `release`."""
        with cls._lock:
            engine = cls._current
            if engine is None or engine.born != Engine.forks:
                engine = cls._current = Engine()
            engine._users += 1
            return engine

    def release(self) -> None:
        """A user of the engine is done with it."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if Engine._current is self:
                Engine._current = None
        self.loop.call_soon_threadsafe(self.loop.stop)

    def put(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function on the engine's loop, from any thread; a finaliser may do so."""
        self.mailbox.put((function, args))

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            pending = asyncio.all_tasks(self.loop)
            for task in pending:
                task.cancel()
            if pending:
                self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self.loop.close()


def _after_fork() -> None:
    # The thread of the engine is in the parent, and somebody there may have held the lock.
    Engine.forks += 1
    Engine._lock = threading.Lock()
    Engine._current = None


os.register_at_fork(after_in_child=_after_fork)


def _run(item: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    item[0](*item[1])
