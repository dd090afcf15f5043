"""Large arrays through handles: their memory is used again, and never while an array is on it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
from distributed import Client
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve
from dask_serve.replica.process import IDLE_SHARE
from dask_serve.wire import memory

SIZE = 4_000_000


@serve.deployment(max_ongoing_requests=10)
class Arrays:
    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    async def add(self, x: np.ndarray, number: int) -> np.ndarray:
        x += number
        return x

    def keep(self, x: np.ndarray) -> None:
        self.kept.append(x)

    def sums(self) -> list[int]:
        return [int(x.sum()) for x in self.kept]


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(memory, "_pool", memory._Pool(memory.IDLE_LIMIT))


@gen_cluster(client=True, nthreads=[("", 2)])
async def test_arrays_that_are_kept_do_not_change(c: Client, s: Any, a: Any):
    """The caller keeps results, the replica keeps arguments, while others come and go."""
    handle = await serve.run(Arrays.bind(), route_prefix=None, client=c)
    kept = []
    for i in range(30):
        x = np.full(SIZE, i, np.uint8)
        results = await asyncio.gather(*(handle.add.remote(x, j) for j in range(3)))
        assert (x == i).all()
        for j, result in enumerate(results):
            assert result.flags.writeable
            assert (result == i + j).all()
        if i % 3 == 0:
            kept.append((i, results[0]))
            await handle.keep.remote(x)
    assert all((result == i).all() for i, result in kept)
    assert await handle.sums.remote() == [i * SIZE for i, _ in kept]


@gen_cluster(client=True, nthreads=[("", 2)])
async def test_calls_leave_no_memory_behind(c: Client, s: Any, a: Any):
    """Caller, scheduler and worker are one process here: what none of them refers to is idle, and not much."""
    handle = await serve.run(Arrays.bind(), route_prefix=None, client=c)
    for i in range(100):
        assert (await handle.add.remote(np.zeros(SIZE, np.uint8), i))[-1] == i
    gc.collect()
    await until(lambda: memory.idle_bytes() >= SIZE)
    assert memory.idle_bytes() < 10 * SIZE


@gen_cluster(client=True, nthreads=[("", 2)], worker_kwargs={"memory_limit": "1 GiB"})
async def test_less_is_idle_in_a_small_worker(c: Client, s: Any, a: Any):
    await serve.run(Arrays.bind(), route_prefix=None, client=c)
    assert memory._pool.limit == (1 << 30) * IDLE_SHARE
