"""Hand things from any thread to one event loop, waking it once however many come."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Mailbox", "Outbox"]

#: Things handled before the loop gets a turn for its sockets.
_BATCH = 256


class Mailbox:
    """A queue into an event loop.

    ``deque.append`` and the flag are atomic under the interpreter lock, and the flag is cleared *before* the queue is
    emptied: a thing that comes in between wakes the loop once more than needed, never once too few.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    handle : callable
        Called with each thing on the loop, in the order they were put.
    context : contextvars.Context, optional
        The context that ``handle`` runs in. By default an empty one: that of whoever wakes the loop would live as long
        as what is begun here, and with it the model of a replica.
    """

    __slots__ = ("_awake", "_context", "_handle", "_items", "_loop")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handle: Callable[[Any], object],
        context: contextvars.Context | None = None,
    ) -> None:
        self._loop = loop
        self._handle = handle
        self._context = contextvars.Context() if context is None else context
        self._items: deque[Any] = deque()
        self._awake = False

    def put(self, item: object) -> None:
        """Append from any thread; takes no lock, so that a finaliser may call it.

        Raises
        ------
        RuntimeError
            The loop is closed.
        """
        self._items.append(item)
        if not self._awake:
            self._wake()

    def leave(self, items: Iterable[object]) -> None:
        """Append without waking the loop: they are handled with what comes next, or by `drain`."""
        self._items.extend(items)

    def __len__(self) -> int:
        return len(self._items)

    def wake(self) -> None:
        """Wake the loop for what was left."""
        self.put_all(())

    def put_all(self, items: Iterable[object]) -> None:
        """Append several things, with one wake-up."""
        self._items.extend(items)
        if not self._awake:
            self._wake()

    def _wake(self) -> None:
        self._awake = True
        try:
            self._loop.call_soon_threadsafe(self._drain, context=self._context)
        except RuntimeError:
            # The next one has to hear of it too.
            self._awake = False
            raise

    def drain(self) -> bool:
        """Handle now what waits, on the loop's thread; True if something did."""
        if not self._items:
            return False
        while self._items:
            self._handle(self._items.popleft())
        return True

    def _drain(self) -> None:
        self._awake = False
        items = self._items
        handle = self._handle
        try:
            for _ in range(_BATCH):
                if not items:
                    return
                handle(items.popleft())
        finally:
            # Also when handling one of them raised: the others must not wait for the next put.
            if items and not self._awake:
                self._awake = True
                self._loop.call_soon(self._drain, context=self._context)


class Outbox:
    """Things for a mailbox, collected on one loop and handed over once a tick.

    Two threads that wake each other for every single thing spend their time handing over the interpreter lock.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The loop that the things come from.
    mailbox : Mailbox
        Where they go.
    """

    __slots__ = ("_items", "_loop", "_mailbox")

    def __init__(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox) -> None:
        self._loop = loop
        self._mailbox = mailbox
        self._items: list[object] = []

    def put(self, item: object) -> None:
        """Append, on the loop's thread."""
        if not self._items:
            self._loop.call_soon(self.flush)
        self._items.append(item)

    def flush(self) -> None:
        """Hand over now."""
        if self._items:
            items, self._items = self._items, []
            self._mailbox.put_all(items)
