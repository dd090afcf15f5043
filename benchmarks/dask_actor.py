"""What handles are compared with: one Dask actor, called directly."""

from __future__ import annotations

from typing import Any


class Echo:
    """The actor; a coroutine method is its fastest kind, run on the worker's event loop."""

    async def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value
