"""Where the outcomes of promoted refs are left and fetched."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["LOST", "Promises"]

#: Stands for the outcome of a promise whose client went away before it was settled.
LOST: dict[str, Any] = {"lost": True}
#: How long an outcome stays after it was first fetched: several tasks may ask for it, a moment apart.
KEEP_FETCHED = 60.0
#: A promise that was asked for and not opened for this long will not be: its client died before, or it was dropped.
UNOPENED = 20.0
#: How long an outcome stays that nobody asks for.
KEEP_UNFETCHED = 600.0


class _Promise:
    __slots__ = ("client", "fetched", "outcome", "settled", "since", "timer", "waiting")

    def __init__(self, client: str = "") -> None:
        self.client = client
        self.outcome: Any = None
        self.settled = asyncio.Event()
        self.fetched = False
        self.waiting = 0
        self.since = asyncio.get_running_loop().time()
        self.timer: asyncio.TimerHandle | None = None


class Promises:
    """A rendezvous: one side settles, others wait.

    Who comes first does not matter: a promise exists from the moment that anybody mentions it. Outcomes are opaque.
    """

    def __init__(self) -> None:
        self._promises: dict[str, _Promise] = {}

    def __len__(self) -> int:
        return len(self._promises)

    def open(self, name: str, client: str) -> None:
        """Note which client will settle the promise."""
        self._get(name).client = client

    def settle(self, name: str, outcome: Any) -> None:
        """Leave the outcome; the first one counts."""
        promise = self._get(name)
        if promise.settled.is_set():
            return
        promise.outcome = outcome
        promise.settled.set()
        self._drop_later(name, promise, KEEP_UNFETCHED)

    async def outcome(self, name: str, timeout: float) -> Any:
        """Wait for the outcome; None after ``timeout`` seconds, or lost when nobody has promised anything by then."""
        promise = self._get(name)
        promise.waiting += 1
        try:
            await asyncio.wait_for(promise.settled.wait(), timeout)
        except asyncio.TimeoutError:
            unopened = not promise.client and asyncio.get_running_loop().time() - promise.since >= UNOPENED
            return LOST if unopened else None
        finally:
            promise.waiting -= 1
            if not (promise.waiting or promise.client or promise.settled.is_set()):
                self._promises.pop(name, None)
        if not promise.fetched:
            promise.fetched = True
            self._drop_later(name, promise, KEEP_FETCHED)
        return promise.outcome

    def remove_client(self, client: str) -> None:
        """Settle as lost what this client opened and did not settle."""
        for name, promise in list(self._promises.items()):
            if promise.client == client and not promise.settled.is_set():
                self.settle(name, LOST)

    def close(self) -> None:
        """Settle everything as lost, and stop all timers."""
        for name, promise in list(self._promises.items()):
            self.settle(name, LOST)
            if promise.timer is not None:
                promise.timer.cancel()
        self._promises.clear()

    def _get(self, name: str) -> _Promise:
        return self._promises.setdefault(name, _Promise())

    def _drop_later(self, name: str, promise: _Promise, delay: float) -> None:
        if promise.timer is not None:
            promise.timer.cancel()
        promise.timer = asyncio.get_running_loop().call_later(delay, self._promises.pop, name, None)
