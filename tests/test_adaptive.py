"""Clusters that grow and shrink with what replicas need, and do not end while something is deployed."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from distributed import Client, LocalCluster, Worker
from distributed.core import Status
from distributed.deploy.subprocess import SubprocessCluster, SubprocessWorker
from distributed.utils_test import async_poll_for, gen_cluster
from helpers import Going, wait_until

import dask_serve as serve
from dask_serve.exceptions import ConfigError


@serve.deployment(autoscaling_config={"max_replicas": 3, "downscale_delay_s": 0.5, "target_ongoing_requests": 1})
class Model:
    async def __call__(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id


def local_cluster() -> Any:
    options = {"n_workers": 0, "threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    return LocalCluster(**options)


class NamedWorker(SubprocessWorker):
    """A worker in a process of its own that is told the name under which its cluster knows it."""

    def __init__(self, scheduler: str, name: Any = None, worker_kwargs: Any = None, **options: Any) -> None:
        super().__init__(scheduler, name=name, worker_kwargs={**worker_kwargs, "name": name}, **options)


def nameless_cluster() -> Any:
    return SubprocessCluster(
        n_workers=0,
        threads_per_worker=1,
        dashboard_address=None,
        worker_class="distributed.Worker",
        silence_logs=logging.CRITICAL,
    )


def named_cluster() -> Any:
    cluster = nameless_cluster()
    cluster.new_spec["cls"] = NamedWorker
    return cluster


def workers_of(client: Client) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])


class Callers(Going):
    """Six threads that ask without a pause, until they are stopped."""

    def __init__(self, handle: Any) -> None:
        super().__init__(6)
        self.handle = handle
        self.errors: list[BaseException] = []

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.handle.remote(0.1).result(20)
            except Exception as error:
                self.errors.append(error)


@pytest.mark.parametrize("make", [local_cluster, pytest.param(named_cluster, marks=pytest.mark.slow)])
def test_workers_come_and_go_with_replicas(make):
    with make() as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=3, interval="100ms", wait_count=3)
        # Not one worker: the first replica brings it.
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        with Callers(handle) as callers:
            wait_until(lambda: len(workers_of(client)) == 3, timeout=30)
            wait_until(lambda: status(client).counts.get("ready") == 3, timeout=30)
            assert len({replica.worker for replica in status(client).replicas}) == 3
            assert {one["status"] for _, one in cluster._adaptive.log} == {"up"}, "no more were asked for than needed"
        wait_until(lambda: len(workers_of(client)) == 1, timeout=30)
        assert handle.remote(0.0).result(20)
        (left,) = status(client).replicas
        assert workers_of(client) == [left.worker]
        assert callers.errors == []
        serve.shutdown(client=client)


@pytest.mark.slow
def test_workers_without_names_stay_as_long_as_they_hold_replicas():
    """SubprocessCluster does not tell its workers their names, and kills any when it is to close one."""
    with nameless_cluster() as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=3, interval="100ms", wait_count=3)
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        with Callers(handle) as callers:
            wait_until(lambda: status(client).counts.get("ready") == 3, timeout=30)
        before = workers_of(client)
        wait_until(lambda: status(client).counts == {"ready": 1}, timeout=30)
        for _ in range(20):
            assert handle.remote(0.1).result(20)
        assert workers_of(client) == before
        assert callers.errors == []
        serve.shutdown(client=client)
        wait_until(lambda: not workers_of(client), timeout=30)


@gen_cluster(client=True, nthreads=[])
async def test_nobody_closes_a_worker_by_a_name_that_may_be_any(c, s):
    async with Worker(s.address, nthreads=1) as worker:
        await serve.run(Model.bind(), route_prefix=None, client=c)
        with pytest.raises(ConfigError, match=r"no worker is named 0, .* 1 workers that hold replicas have no names"):
            await c.scheduler.retire_workers(names=[0], close_workers=True)
        assert await c.scheduler.adaptive_target(target_duration=5.0) == 1
        async with Worker(s.address, nthreads=1):
            assert await c.scheduler.adaptive_target(target_duration=5.0) == 2
        # One with a name shows that names are given: this one has not come yet, or has gone.
        async with Worker(s.address, nthreads=1, name="one"):
            assert await c.scheduler.retire_workers(names=[0], close_workers=True) == {}
            assert await c.scheduler.adaptive_target(target_duration=5.0) == 1
        assert list(await c.scheduler.retire_workers(names=[worker.address], remove=False)) == [worker.address]
        await serve.shutdown(client=c)
        assert await c.scheduler.retire_workers(names=[0], close_workers=True) == {}


def status(client: Client) -> Any:
    return serve.status(client=client).applications["default"].deployments["Model"]


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], scheduler_kwargs={"idle_timeout": "60s"})
async def test_an_idle_scheduler_with_deployments_does_not_end(c, s, a):
    to_zero = Model.options(autoscaling_config={"min_replicas": 0, "downscale_delay_s": 0.1})
    handle = await serve.run(to_zero.bind(), route_prefix=None, client=c)
    await async_poll_for(lambda: not a.state.actors, timeout=5)
    s.idle_timeout = 0.5
    await asyncio.sleep(1.5)
    assert s.status == Status.running
    assert await handle.remote(0.0)
    await serve.shutdown(client=c)
    await async_poll_for(lambda: s.status == Status.closed, timeout=5)
