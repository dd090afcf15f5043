"""Replicas that crowd each other spread out again; workers at the end of their lifetime wait for room."""

from __future__ import annotations

import asyncio
from typing import Any

import dask
from distributed import Worker
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve


@serve.deployment
class Model:
    async def where(self, seconds: float = 0.0) -> str:
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id


def replicas(s: Any) -> list[Any]:
    controller = s.plugins["dask-serve"]
    return [r for r in controller.registry.of("default/Model") if r.state == "ready"]


def workers(s: Any) -> list[str]:
    return sorted(str(s.workers[replica.worker].name) for replica in replicas(s))


class Calls:
    """One call after the other, until it is stopped."""

    def __init__(self, handle: Any) -> None:
        self.number = 0
        self._stop = False
        self._tasks = [asyncio.create_task(self._go_on(handle.options(sync=False))) for _ in range(3)]

    async def _go_on(self, handle: Any) -> None:
        while not self._stop:
            await (await handle.where.remote(0.01))
            self.number += 1

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_replicas_spread_out_when_a_worker_joins(c, s, a):
    handle = await serve.run(Model.options(num_replicas=3).bind(), route_prefix=None, client=c)
    before = {replica.id for replica in replicas(s)}
    assert await c.scheduler.adaptive_target() == 3
    calls = Calls(handle)
    async with Worker(s.address, nthreads=1, name="b") as b:
        # It has room for one: the other two stay where they are.
        await until(lambda: workers(s).count("b") == 1 and len(replicas(s)) == 3)
        assert len(before & {replica.id for replica in replicas(s)}) == 2
        # What was asked for is kept while it may still be of use.
        assert await c.scheduler.adaptive_target() == 3
        async with Worker(s.address, nthreads=1, name="c"):
            await until(lambda: workers(s) == sorted([str(a.name), "b", "c"]))
            assert await c.scheduler.adaptive_target() == 3
            await calls.stop()
            await serve.shutdown(client=c)
            del b
    assert calls.number > 0


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_a_replica_that_finds_no_better_place_stays(c, s, a):
    """Nothing may begin to move, again and again, to a worker that it must not be on."""
    app = Model.options(num_replicas=2, workers=[str(a.name)]).bind()
    await serve.run(app, route_prefix=None, client=c)
    before = {replica.id for replica in replicas(s)}
    registry = s.plugins["dask-serve"].registry
    balance = s.plugins["dask-serve"].reconciler.balance
    async with Worker(s.address, nthreads=4, name="b"):
        looked = balance._looked
        await until(lambda: balance._looked > looked + 1)
        assert not registry.moving
        assert {replica.id for replica in replicas(s)} == before
        await serve.shutdown(client=c)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_a_worker_whose_time_has_come_waits_for_the_next(c, s, a):
    """It is the only one: it serves until another has joined, however long that takes."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    calls = Calls(handle)
    leaving = asyncio.create_task(a.close_gracefully())
    await until(lambda: s.plugins["dask-serve"].registry.leaving)
    # Longer than a worker that is retired by others waits.
    await asyncio.sleep(2.5)
    assert not leaving.done()
    assert workers(s) == [str(a.name)]
    assert await c.scheduler.adaptive_target() == 2
    async with Worker(s.address, nthreads=1, name="b"):
        await leaving
        assert workers(s) == ["b"]
        await calls.stop()
        await serve.shutdown(client=c)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2, timeout=60)
async def test_where_workers_are_added_it_waits_for_free_threads(c, s, a, b):
    handle = await serve.run(Model.options(num_replicas=2).bind(), route_prefix=None, client=c)
    assert workers(s) == sorted([str(a.name), str(b.name)])
    # An adaptive cluster asks.
    await c.scheduler.adaptive_target()
    calls = Calls(handle)
    leaving = asyncio.create_task(a.close_gracefully())
    await until(lambda: s.plugins["dask-serve"].registry.unplaced)
    assert await c.scheduler.adaptive_target() == 3
    assert len(replicas(s)) == 2
    async with Worker(s.address, nthreads=1, name="c"):
        await leaving
        assert workers(s) == sorted([str(b.name), "c"])
        await calls.stop()
        await serve.shutdown(client=c)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 2, timeout=60)
async def test_but_not_for_ever(c, s, a, b):
    with dask.config.set({"serve.leave-patience": "1s"}):
        await serve.run(Model.options(num_replicas=2).bind(), route_prefix=None, client=c)
        await c.scheduler.adaptive_target()
        await a.close_gracefully()
        assert workers(s) == [str(b.name)] * 2
        assert not s.plugins["dask-serve"].registry.at_leisure
        await serve.shutdown(client=c)
