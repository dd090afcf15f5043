"""Changes, and those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Changes"]


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
