"""Clusters that grow and shrink with what replicas need, and do not end while something is deployed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from distributed import Client, LocalCluster
from distributed.core import Status
from distributed.deploy.subprocess import SubprocessCluster
from distributed.utils_test import async_poll_for, gen_cluster

import dask_serve as serve


def until(met: Callable[[], Any], timeout: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := met()):
        assert time.monotonic() < deadline, f"not met after {timeout} s"
        time.sleep(0.01)
    return found


@serve.deployment(autoscaling_config={"max_replicas": 3, "downscale_delay_s": 0.5, "target_ongoing_requests": 1})
class Model:
    async def __call__(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id


def local_cluster() -> Any:
    options = {"n_workers": 0, "threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    return LocalCluster(**options)


def subprocess_cluster() -> Any:
    return SubprocessCluster(
        n_workers=0,
        threads_per_worker=1,
        dashboard_address=None,
        worker_class="distributed.Worker",
        silence_logs=logging.CRITICAL,
    )


@pytest.mark.parametrize("make", [local_cluster, pytest.param(subprocess_cluster, marks=pytest.mark.slow)])
def test_workers_come_and_go_with_replicas(make):
    with make() as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=3, interval="100ms", wait_count=3)
        # Not one worker: the first replica brings it.
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        served = threading.Event()
        errors: list[BaseException] = []

        def ask() -> None:
            while not served.is_set():
                try:
                    handle.remote(0.1).result(20)
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 3)
            until(lambda: status(client).counts.get("ready") == 3)
            assert len({replica.worker for replica in status(client).replicas}) == 3
        finally:
            served.set()
            for thread in threads:
                thread.join()
        until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1)
        assert handle.remote(0.0).result(20)
        (left,) = status(client).replicas
        assert list(client.scheduler_info(n_workers=-1)["workers"]) == [left.worker]
        assert errors == []
        serve.shutdown(client=client)


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
