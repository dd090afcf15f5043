"""Changes, and those who wait for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["Changes", "Throttle"]


class Changes:
    """What long-polls wait on."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._closed = False

    def happened(self) -> None:
        """Wake everyone, to look whether this is what they wait for."""
        self._event.set()
        self._event = asyncio.Event()

    def close(self) -> None:
        """Wake everyone for the last time: nobody waits from now on."""
        self._closed = True
        self.happened()

    async def until(self, met: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``met()`` after one of the changes, at most ``timeout`` seconds; return whether it is."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not met():
            left = deadline - loop.time()
            if left <= 0 or self._closed:
                return False
            try:
                await asyncio.wait_for(self._event.wait(), left)
            except asyncio.TimeoutError:
                return met()
        return True


class Throttle:
    """Does something whenever it is asked to, and less often while that takes long: at most a tenth of the time.

    The first time it is done at once.

    Parameters
    ----------
    function : callable
        What to do. Doing it once is as good as doing it for each time that it was asked for.
    """

    #: Share of the loop's time that this may take, and the most seconds between asking and doing.
    SHARE, LATEST = 0.1, 0.25

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> None:
        if self._timer is None:
            wait = self._not_before - time.monotonic()
            if wait <= 0:
                self._do()
            else:
                self._timer = self._loop.call_later(wait, self._do)

    def flush(self) -> None:
        """Do at once what was asked for."""
        if self._timer is not None:
            self._do()

    def close(self) -> None:
        """Do nothing more."""
        self._not_before = float("inf")
        if self._timer is not None:
            self._timer.cancel()

    def _do(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        began = time.monotonic()
        self._function()
        now = time.monotonic()
        self._not_before = now + min((now - began) / self.SHARE, self.LATEST)
