"""Values of Dask keys, fetched to a worker from the workers that hold them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from distributed.utils_comm import gather_from_workers

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["gather_keys"]

#: Seconds between two attempts.
EVERY = 0.1
#: A key that the scheduler does not know, or has no intention of computing, this many times in a row is gone.
UNKNOWN = 3
#: Seconds until a worker is given up that the scheduler believes to hold a key, and that does not give it.
PATIENCE = 30.0

#: States of a key whose value is there, or will be: one that was lost with its worker is computed again.
_COMING = {"waiting", "no-worker", "queued", "processing"}


async def gather_keys(worker: Worker, keys: list[Any]) -> dict[Any, Any]:
    """Return the values of Dask keys (on the worker's loop).

    Raises
    ------
    KeyError
        Keys that are no longer on the cluster, as text.
    """
    values: dict[Any, Any] = {key: worker.data[key] for key in keys if key in worker.data}
    unknown = 0
    deadline = time.monotonic() + PATIENCE
    while missing := [key for key in keys if key not in values]:
        who_has = await worker.scheduler.who_has(keys=missing)
        found = {key: who_has[key] for key in missing if who_has.get(key)}
        if found:
            data, *_ = await gather_from_workers(found, rpc=worker.rpc, who=worker.address)
            values.update(data)
            if len(data) == len(missing):
                break
        states = await worker.scheduler.get_task_status(keys=missing)
        if all(states.get(key) in _COMING for key in missing):
            deadline = time.monotonic() + PATIENCE
        unknown = unknown + 1 if any(states.get(key) not in {*_COMING, "memory"} for key in missing) else 0
        if unknown == UNKNOWN or time.monotonic() > deadline:
            raise KeyError(", ".join(map(str, missing)))
        await asyncio.sleep(EVERY)
    return values
