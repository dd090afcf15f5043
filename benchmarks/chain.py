"""The second step of ``b.remote(a.remote(x))`` beside one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .handle_calls import watch
from .loops import Loop, connect
from .processes import Cluster
from .table import Row, Sample, interleave

#: The names of the two applications; both have their replica on one worker.
STEPS = ("first", "second")
#: A difference of two latencies is small beside their drift: they take turns so many times in each pair.
SLICES = 10


def synchronous(call: Callable[[], Any], cluster: Cluster, seconds: float) -> Sample:
    """Return the median latency, in milliseconds, of calls from a plain thread."""
    call()
    clock, begun, latencies = watch(cluster), time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        call()
        latencies.append(time.perf_counter() - sent)
    return Sample(1e3 * statistics.median(latencies), clock.per_request(len(latencies)))


async def asynchronous(call: Callable[[], Awaitable[Any]], cluster: Cluster, seconds: float) -> Sample:
    """Return the median latency, in milliseconds, of calls from a coroutine."""
    await call()
    clock, begun, latencies = watch(cluster), time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        await call()
        latencies.append(time.perf_counter() - sent)
    return Sample(1e3 * statistics.median(latencies), clock.per_request(len(latencies)))


def row(what: str, chains: Sequence[Sample], ones: Sequence[Sample]) -> Row:
    """Make the row of what a chain takes longer than one call, from slices."""
    chains, ones = joined(chains), joined(ones)
    extra = [
        Sample(chain.value - one.value, {name: spent - one.cpu.get(name, 0.0) for name, spent in chain.cpu.items()})
        for chain, one in zip(chains, ones, strict=True)
    ]
    return Row(f"Second step of a chain, {what}, against one call, latency", "ms", extra, ones, most=1.2)


def joined(slices: Sequence[Sample]) -> list[Sample]:
    """Make one sample of the slices of each pair."""
    samples = []
    for start in range(0, len(slices), SLICES):
        of_pair = slices[start : start + SLICES]
        cpu = {name: statistics.mean(sample.cpu.get(name, 0.0) for sample in of_pair) for name in of_pair[0].cpu}
        samples.append(Sample(statistics.median(sample.value for sample in of_pair), cpu))
    return samples


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure a caller in a plain thread, then one in an event loop."""
    app = NoOp.options(workers=["one"]).bind()
    pairs, seconds = SLICES * pairs, seconds / SLICES
    first, second = (serve.run(app, name=name, route_prefix=f"/{name}", client=client).echo for name in STEPS)
    one = partial(synchronous, lambda: first.remote(1).result(), cluster, seconds)
    chain = partial(synchronous, lambda: second.remote(first.remote(1)).result(), cluster, seconds)
    yield row("synchronous", *interleave(pairs, chain, one))
    with Loop() as loop:
        yield row("asyncio", *loop.run(in_loop(cluster, pairs, seconds)))
    for name in STEPS:
        serve.delete(name, client=client)


async def in_loop(cluster: Cluster, pairs: int, seconds: float) -> tuple[list[Sample], list[Sample]]:
    """Measure in the running loop, which carries the calls."""
    client = await connect(cluster.address)
    try:
        first, second = [(await serve.get_app_handle(name, client=client)).echo for name in STEPS]
        chains, ones = [], []
        for _ in range(pairs):
            ones.append(await asynchronous(lambda: first.remote(1), cluster, seconds))
            chains.append(await asynchronous(lambda: second.remote(first.remote(1)), cluster, seconds))
        return chains, ones
    finally:
        await client.close()
