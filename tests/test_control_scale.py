"""1,000 replicas of 100 deployments on 200 workers: what the controller costs the scheduler's loop.

The workers are entries in a table, so that what is measured is ours and not Dask's.
"""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from distributed.core import Status

from dask_serve.config import DeploymentOptions
from dask_serve.controller.changes import Throttle
from dask_serve.controller.notes import Notes
from dask_serve.controller.reconciler import Reconciler
from dask_serve.controller.registry import Registry
from dask_serve.controller.replica import Replica
from dask_serve.controller.status import ServeStatus
from dask_serve.controller.views import Views
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.routing.table import Table, decode_table, encode_table

DEPLOYMENTS, REPLICAS, WORKERS, ROUTERS = 100, 10, 200, 50


class Stopwatch:
    """How long functions keep the loop, in CPU time: others use this machine too."""

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}
        self.worst: dict[str, float] = {}
        self.total: dict[str, float] = {}

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                self.longest[name] = max(self.longest.get(name, 0.0), took)
                self.total[name] = self.total.get(name, 0.0) + took

        return timed

    def told(self) -> str:
        names = sorted(self.total)
        text = ", ".join(f"{n} {self.longest[n] * 1e3:.1f} ms at most, {self.total[n]:.2f} s in all" for n in names)
        self.worst = {name: max(self.worst.get(name, 0.0), took) for name, took in self.longest.items()}
        self.longest.clear()
        self.total.clear()
        return text


class Cluster:
    """The parts of a scheduler and of a client that the reconciler touches; replicas are ready a moment later."""

    def __init__(self) -> None:
        self.id = "scheduler"
        self.tasks: dict[str, Any] = {}
        self.workers = {
            f"tcp://10.0.{n // 100}.{n % 100}:40000": SimpleNamespace(
                address=f"tcp://10.0.{n // 100}.{n % 100}:40000",
                name=n,
                host=f"10.0.{n // 100}.{n % 100}",
                nthreads=8,
                status=Status.running,
                processing={},
                resources={},
                used_resources={},
                memory_limit=0,
                metrics={},
            )
            for n in range(WORKERS)
        }
        self.reconciler: Any = None

    def submit(self, cls: type, spec: dict[str, Any], **kwargs: Any) -> Any:
        async def stands() -> None:
            await asyncio.sleep(0.01)
            replica = self.reconciler.registry.replicas.get(spec["id"])
            if replica is not None:
                self.reconciler.reported_ready(replica, f"{replica.worker}1", f"process of {replica.worker}")

        return SimpleNamespace(
            _state=SimpleNamespace(wait=stands), status="finished", done=lambda: True, release=lambda: None
        )


def everything(revision: str) -> list[ApplicationSpec]:
    options = msgspec.convert({"num_replicas": REPLICAS}, DeploymentOptions)
    return [
        ApplicationSpec(
            name=f"app{number}",
            route_prefix=None,
            ingress="d",
            deployments=[
                DeploymentSpec(name="d", revision=f"{revision}-{number}", options=options, methods=["__call__"])
            ],
        )
        for number in range(DEPLOYMENTS)
    ]


async def scenario() -> Stopwatch:
    cluster, registry, watch = Cluster(), Registry(), Stopwatch()
    views = Views(registry)
    tables: list[tuple[float, bytes]] = [(0.0, b"")]
    last: list[Any] = [Table(epoch="e", version=0, secret=b"", deployments={}, routes=[]), ServeStatus()]

    def publish() -> None:
        table = msgspec.structs.replace(
            last[0], deployments=views.deployments(), routes=views.routes(), applications=views.applications()
        )
        if table != last[0]:
            last[0] = msgspec.structs.replace(table, version=last[0].version + 1)
            tables.append((time.monotonic(), encode_table(last[0])))
        status = msgspec.structs.replace(last[1], applications=views.statuses())
        if status != last[1]:
            last[1] = msgspec.structs.replace(status, version=last[1].version + 1)

    throttle = Throttle(watch.watch("publish", publish))
    reconciler: Any = Reconciler(cluster, registry, throttle, Notes(registry, lambda *_: None))  # type: ignore[arg-type]
    cluster.reconciler = reconciler
    reconciler.workers.equipped |= set(cluster.workers)
    reconciler._step = watch.watch("step", reconciler._step)
    reconciler.wake = watch.watch("wake", reconciler.wake)

    async def drained(*args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0.01)

    reconciler.actors.call = drained
    running = asyncio.ensure_future(reconciler.run(cluster))

    async def deploy(revision: str) -> None:
        began, cpu, before = time.monotonic(), time.process_time(), last[0].version
        for spec in everything(revision):
            registry.deploy(spec, {d.revision: b"" for d in spec.deployments})
            reconciler.wake()
            await asyncio.sleep(0)
        while len(registry.replicas) != DEPLOYMENTS * REPLICAS or not all(
            r.state == "ready" and r.spec.revision.startswith(revision + "-") for r in registry.replicas.values()
        ):
            await asyncio.sleep(0.02)
        throttle.flush()
        took, cpu = time.monotonic() - began, time.process_time() - cpu
        print(f"\n{revision}: {took:.1f} s, {cpu:.1f} s of CPU, {last[0].version - before} tables; {watch.told()}")

    await deploy("r1")
    await deploy("r2")
    began, number = time.monotonic(), len(tables)
    reconciler.reported_failed(next(iter(registry.replicas.values())), "it is a test")
    throttle.flush()
    print(f"one lost replica: a table after {(tables[number][0] - began) * 1e3:.1f} ms, {len(tables[-1][1])} bytes")
    decode = time.thread_time()
    for _ in range(ROUTERS):
        decode_table(tables[-1][1])
    print(f"read by {ROUTERS} routers in {(time.thread_time() - decode) * 1e3:.0f} ms of CPU")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await reconciler.close()
    return watch


@pytest.mark.slow
def test_a_thousand_replicas():
    # Python's own collections of garbage are no work of ours.
    gc.collect()
    gc.disable()
    try:
        watch = asyncio.run(scenario())
    finally:
        gc.enable()
    assert max(watch.worst.values()) < 0.01


def test_memory_of_a_replica():
    registry = Registry()
    spec = everything("r")[0].deployments[0]
    tracemalloc.start()

    async def make() -> None:
        for number in range(1000):
            registry.add(Replica("app0", spec, f"tcp://10.0.0.{number % 200}:40000", 0.0))

    asyncio.run(make())
    each = tracemalloc.get_traced_memory()[0] / 1000
    tracemalloc.stop()
    assert each < 4096


def test_what_reconciles_ends_when_it_is_cancelled_as_something_happens():
    async def scenario() -> None:
        registry, cluster = Registry(), Cluster()
        reconciler: Any = Reconciler(cluster, registry, lambda: None, Notes(registry, lambda *_: None))  # type: ignore[arg-type]
        cluster.reconciler = reconciler
        stepped = asyncio.Event()
        reconciler._step = lambda now: stepped.set() or now + 60
        running = asyncio.ensure_future(reconciler.run(cluster))
        await stepped.wait()
        await asyncio.sleep(0.01)
        reconciler.wake()
        running.cancel()
        await asyncio.wait({running}, timeout=1)
        assert running.cancelled()

    asyncio.run(scenario())
