"""Batches: the throughput of many callers beside what the model itself allows, and what a lone call pays."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from distributed import Client

import dask_serve as serve

from .apps import EACH, FIXED, Batched
from .handle_calls import concurrent
from .loops import Loop, connect
from .processes import Cluster
from .table import Row, Sample

CALLERS = 64


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure callers by handle, in an event loop."""
    serve.run(Batched.bind(), name="batching", route_prefix=None, client=client)
    ideal = Sample(CALLERS / (FIXED + EACH * CALLERS))
    with Loop() as runner:
        direct = runner.run(connect(cluster.address))
        try:
            handle = runner.run(find_handle(direct))
            ours = [runner.run(concurrent(handle.model.remote, CALLERS, cluster, seconds)) for _ in range(pairs)]
            yield Row(
                f"Batches, t(n) = {1e3 * FIXED:g} ms + {1e3 * EACH:g} ms n, {CALLERS} callers",
                "calls/s",
                ours,
                [ideal] * pairs,
                least=0.9,
                note=" (beside it: all callers in each batch, and nothing else)",
            )
            for kind in ("def", "async def"):
                added = [runner.run(lone(handle, kind, seconds)) for _ in range(pairs)]
                yield Row(f"Batches, `{kind}`, a lone call on an idle replica: added", "ms", added, most=1.0)
        finally:
            runner.run(direct.close())
    serve.delete("batching", client=client)


async def lone(handle: serve.DeploymentHandle, kind: str, seconds: float) -> Sample:
    """Compare a batched method with a plain one, call by call."""
    plain, batched = (handle.plain, handle.batched) if kind == "def" else (handle.aplain, handle.abatched)
    times: dict[bool, list[float]] = {False: [], True: []}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for is_batched, method in [(False, plain), (True, batched)]:
            # Idle: the replica has been for a while.
            await asyncio.sleep(0.001)
            begun = time.perf_counter()
            await method.remote(1)
            times[is_batched].append(time.perf_counter() - begun)
    return Sample(1e3 * (statistics.median(times[True]) - statistics.median(times[False])))


async def find_handle(client: Client) -> serve.DeploymentHandle:
    """Return the handle of this comparison's application."""
    handle: serve.DeploymentHandle = await serve.get_app_handle("batching", client=client)
    return handle
