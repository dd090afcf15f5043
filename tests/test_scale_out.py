"""One service that grows: two groups of workers, more workers by hand, several proxies."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from distributed import Client, LocalCluster, Worker
from distributed.utils_test import gen_cluster
from helpers import http_client, wait_until

import dask_serve as serve


@serve.deployment
class Where:
    def __call__(self, request: Any = None) -> str:
        return serve.get_replica_context().worker


@serve.deployment
class Both:
    """Its parts live in two groups of workers."""

    def __init__(self, large: Any, small: Any) -> None:
        self.parts = large, small

    async def __call__(self) -> list[list[str]]:
        return [sorted(set(await asyncio.gather(*[part.remote() for _ in range(20)]))) for part in self.parts]


@gen_cluster(client=True, nthreads=[])
async def test_one_service_over_two_groups_of_workers(c, s):
    groups: dict[str, list[Worker]] = {"large": [], "small": []}
    for name, workers in groups.items():
        for _ in range(2):
            workers.append(await Worker(s.address, nthreads=1, resources={name: 1}, dashboard=False))

    async def placed() -> None:
        deployments = (await serve.status(client=c)).applications["default"].deployments
        for name, workers in groups.items():
            replicas = deployments[name.capitalize()].replicas
            assert sorted(r.worker for r in replicas) == sorted(w.address for w in workers)

    large = Where.options(name="Large", num_replicas=2, resources={"large": 1}).bind()
    small = Where.options(name="Small", num_replicas=2, resources={"small": 1}).bind()
    handle = await serve.run(Both.bind(large, small), route_prefix=None, client=c)
    for seen, workers in zip(await handle.remote(), groups.values(), strict=True):
        assert set(seen) <= {worker.address for worker in workers}
    await placed()
    # One more worker of a group, one more replica there: the other group is not touched.
    groups["small"].append(await Worker(s.address, nthreads=1, resources={"small": 1}, dashboard=False))
    small = Where.options(name="Small", num_replicas=3, resources={"small": 1}).bind()
    handle = await serve.run(Both.bind(large, small), route_prefix=None, client=c)
    await placed()
    for worker in [*groups["large"], *groups["small"]]:
        await worker.close()


def test_more_workers_and_more_proxies():
    """``cluster.scale`` by hand: replicas that waited for room start, and HTTP goes through several processes."""
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        url = serve.start(port=0, num_proxies=3, client=client)
        app = Where.options(num_replicas=3, max_replicas_per_worker=1).bind()
        serve.run(app, client=client, wait=False)
        cluster.scale(3)
        wait_until(lambda: serve.status(client=client).applications["default"].status == "running", 40)
        workers = set(client.scheduler_info(n_workers=-1)["workers"])
        assert len(workers) == 3
        proxies = [row.pid for row in serve.status(client=client).proxies]
        assert len(set(proxies)) == 3
        assert {httpx.get(url, trust_env=False).text for _ in range(60)} == workers
        with http_client(url) as http:
            assert http.get("/-/readyz").text == "ready"
        serve.shutdown(client=client)
