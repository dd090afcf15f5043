"""Calls through a Python handle beside Dask's own actor calls, straight to the worker, on the same cluster."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import psutil
from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .calling import keep_going
from .dask_actor import Echo
from .loops import Loop, connect
from .processes import Clock, Cluster
from .table import Row, Sample, interleave

IN_FLIGHT = (1, 50, 1000)


def watch(cluster: Cluster) -> Clock:
    """Start a clock for who takes part in a call."""
    return Clock({"caller": psutil.Process(), "worker": cluster.worker, "scheduler": cluster.scheduler})


def synchronous(call: Callable[[int], Any], in_flight: int, cluster: Cluster, seconds: float) -> Sample:
    """Issue ``in_flight`` calls, wait for the result of each, and again."""
    clock, begun, count = watch(cluster), time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for ref in [call(number) for number in range(in_flight)]:
            ref.result()
        count += in_flight
    took = time.perf_counter() - begun
    return Sample(1e3 * took / count if in_flight == 1 else count / took, clock.per_request(count))


async def concurrent(call: Callable[[int], Awaitable[Any]], in_flight: int, cluster: Cluster, seconds: float) -> Sample:
    """Keep ``in_flight`` calls going, each from a coroutine that calls again when it is answered."""
    clock = watch(cluster)
    count, took = await keep_going(call, in_flight, seconds)
    return Sample(count / took, clock.per_request(count))


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure synchronous callers, then those in an event loop."""
    handle = serve.run(NoOp.bind(), name="handle", route_prefix="/handle", client=client)
    yield from synchronous_rows(handle, cluster, pairs, seconds)
    yield from asyncio_rows(cluster, pairs, seconds)
    serve.delete("handle", client=client)


def synchronous_rows(handle: serve.DeploymentHandle, cluster: Cluster, pairs: int, seconds: float) -> Iterator[Row]:
    """Compare callers in a plain thread."""
    # Dask looks for the default client when it makes the proxy of an actor.
    with Client(cluster.address, direct_to_workers=True) as direct:
        actor = direct.submit(Echo, actor=True).result()
        for in_flight in IN_FLIGHT:
            ours = partial(synchronous, handle.echo.remote, in_flight, cluster, seconds)
            theirs = partial(synchronous, actor.echo, in_flight, cluster, seconds)
            samples = interleave(pairs, ours, theirs)
            if in_flight == 1:
                yield Row("Handle, synchronous, one after the other, latency", "ms", *samples, most=0.35)
            else:
                yield Row(f"Handle, synchronous, {in_flight} in flight", "calls/s", *samples)


def asyncio_rows(cluster: Cluster, pairs: int, seconds: float) -> Iterator[Row]:
    """Compare callers in one event loop, which lives as long as the comparison."""
    with Loop() as runner:
        direct = runner.run(connect(cluster.address))
        try:
            actor = runner.run(make_actor(direct))
            # The handle of an asynchronous client: the running loop carries its calls, as it carries the actor's.
            echo = runner.run(find_handle(direct)).echo
            for in_flight in IN_FLIGHT:

                def measure(call: Callable[[int], Awaitable[Any]], in_flight: int = in_flight) -> Sample:
                    return runner.run(concurrent(call, in_flight, cluster, seconds))

                samples = interleave(pairs, partial(measure, echo.remote), partial(measure, actor.echo))
                what = "one after the other" if in_flight == 1 else f"{in_flight} in flight"
                least = 12.0 if in_flight == 50 else None
                yield Row(f"Handle, asyncio, {what}", "calls/s", *samples, least=least)
        finally:
            runner.run(direct.close())


async def find_handle(client: Client) -> serve.DeploymentHandle:
    """Return the handle of this comparison's application."""
    handle: serve.DeploymentHandle = await serve.get_app_handle("handle", client=client)
    return handle


async def make_actor(client: Client) -> Any:
    """Make the actor that is compared."""
    return await client.submit(Echo, actor=True)
