"""The door's latency in a process whose user code computes in four Python threads."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

from distributed import Client

import dask_serve as serve
from dask_serve.exceptions import ReplicaLostError
from dask_serve.routing.session import Session

from .apps import Busy, NoOp
from .table import Row, Sample


async def door_latency(client: Client, app: str, seconds: float) -> Sample:
    """Return the median round trip to the door and back, in milliseconds: a question that it answers by itself."""
    session = Session.of(client)
    fabric = session.fabric(asyncio.get_running_loop())
    while fabric.table is None or f"{app}/" not in "".join(fabric.table.deployments):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    replica = next(entry.replicas[0] for name, entry in fabric.table.deployments.items() if name.startswith(f"{app}/"))

    async def ask() -> None:
        with contextlib.suppress(ReplicaLostError):
            await fabric.fetch(replica.process, replica.door, "no such result")

    return await median(ask, seconds)


async def call_latency(handle: serve.DeploymentHandle, seconds: float) -> Sample:
    """Return the median of whole calls of an ``async def``, in milliseconds: to the door, to user code, and back."""
    direct = handle.options(method_name="echo", sync=False)

    async def call() -> None:
        await (await direct.remote(1))

    return await median(call, seconds)


async def median(ask: Callable[[], Awaitable[None]], seconds: float) -> Sample:
    """Ask one after the other; return the median in milliseconds."""
    await ask()
    values = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        await ask()
        values.append(1e3 * (time.perf_counter() - sent))
    return Sample(statistics.median(values))


def rows(client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure a quiet worker first; the threads of `Busy` end only with the worker."""
    for what, deployment, most in [("alone", NoOp, None), ("beside 4 computing Python threads", Busy, 2.0)]:
        handle = serve.run(deployment.bind(), name="door", route_prefix="/door", client=client)
        door = [asyncio.run(door_latency(client, "door", seconds)) for _ in range(pairs)]
        yield Row(f"Door's median latency, {what}", "ms", door, most=most)
        calls = [asyncio.run(call_latency(handle, seconds)) for _ in range(pairs)]
        yield Row(f"Median latency of a call, {what}", "ms", calls)
