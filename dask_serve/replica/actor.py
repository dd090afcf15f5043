"""The Dask actor. Thin on purpose: Dask places, owns and watches it, and never carries a request through it."""

from __future__ import annotations

import weakref
from typing import Any

from distributed import get_worker

from .unit import ReplicaUnit, _decode_options

__all__ = ["Replica"]


class Replica:
    """A replica, as Dask sees it.

    ``__init__`` returns at once; whether user code could be constructed is reported to the controller later. The
    methods are coroutines, since Dask runs all ``def`` methods of a worker's actors one behind the other on a single
    thread. When Dask lets go of the actor (released, cancelled, ``client.restart()``) the replica ends.

    Parameters
    ----------
    spec : dict
        See `ReplicaUnit`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        unit = ReplicaUnit(spec, get_worker())
        self._unit = unit
        # Not a __del__: the threads hold the unit, and nothing but Dask holds the actor.
        self._end = weakref.finalize(self, unit.release)
        unit.start()

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait until nothing runs, at most ``timeout`` seconds."""
        await self._unit.drain(timeout)

    async def reconfigure(self, options: bytes) -> None:
        """Take over ``max_ongoing_requests``, ``inline_result_bytes`` and ``user_config`` in place."""
        await self._unit.change(_decode_options(options))
