"""Callers in an event loop, which lives as long as a comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from distributed import Client

T = TypeVar("T")


class Loop:
    """What ``asyncio.Runner`` does, on Python 3.10 too."""

    def __enter__(self) -> Loop:
        self.loop = asyncio.new_event_loop()
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop."""
        return self.loop.run_until_complete(coroutine)

    def __exit__(self, *error: object) -> None:
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


async def connect(address: str) -> Client:
    """Connect in the running loop, straight to the workers."""
    return await Client(address, asynchronous=True, direct_to_workers=True)
