"""Concurrent calls; standard library only, because peers run it too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["keep_going"]


async def keep_going(call: Callable[[int], Awaitable[Any]], in_flight: int, seconds: float) -> tuple[int, float]:
    """Keep that many calls going, each from a coroutine that calls again when it is answered.

    Returns
    -------
    tuple of int and float
        How many calls were answered, and the seconds that they took.
    """
    begun = time.perf_counter()

    async def caller() -> int:
        count = 0
        while time.perf_counter() - begun < seconds:
            await call(count)
            count += 1
        return count

    count = sum(await asyncio.gather(*[caller() for _ in range(in_flight)]))
    return count, time.perf_counter() - begun
