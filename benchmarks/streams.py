"""Streams of small items beside a bare echo of as many frames through the door, on the same connection's code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from distributed import Client

import dask_serve as serve
from dask_serve.routing.dial import split_address
from dask_serve.routing.session import Session
from dask_serve.wire.connection import CallerConnection
from dask_serve.wire.local import connect_locally
from dask_serve.wire.messages import LEAST, WINDOW, Kind

from .apps import Streamer
from .handle_calls import watch
from .processes import Cluster
from .table import Row, Sample, interleave

CONSUMERS = (1, 100)
#: Frames of the echo under way for each consumer: as many as a stream may have small items.
AHEAD = WINDOW // LEAST

KINDS = {
    "numbers": "`async def` generator, numbers",
    "blocking_numbers": "`def` generator, numbers",
    "records": "`async def` generator, small dicts",
    "ticks": "`async def` generator that lets others run before each number",
}


async def consume(client: Client, kind: str, consumers: int, cluster: Cluster, seconds: float) -> Sample:
    """Let consumers in one event loop iterate, each over a stream of its own; items a second of all."""
    handle = (await serve.get_app_handle("streams", client=client)).options(method_name=kind, stream=True)
    clock, begun = watch(cluster), time.perf_counter()

    async def consumer() -> int:
        count = 0
        async for _ in handle.remote():
            count += 1
            if not count % 256 and time.perf_counter() - begun > seconds:
                break
        return count

    count = sum(await asyncio.gather(*[consumer() for _ in range(consumers)]))
    took = time.perf_counter() - begun
    return Sample(count / took, clock.per_request(count))


async def echo(client: Client, consumers: int, cluster: Cluster, seconds: float) -> Sample:
    """Send empty frames that the door sends back by itself, each echo followed by another frame; frames a second."""
    fabric = Session.of(client).fabric(asyncio.get_running_loop())
    while fabric.table is None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    [entry] = [entry for name, entry in fabric.table.deployments.items() if name.startswith("streams/")]
    [replica] = entry.replicas
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    count = 0

    def on_frame(connection: CallerConnection, frame: Any) -> None:
        nonlocal count
        count += 1
        connection.send(Kind.PING, frame.request, b"")

    connection = CallerConnection(
        fabric.table.secret, replica.process, on_frame, ready.set_result, lambda connection: None
    )
    sock = connect_locally(replica.process)
    if sock is None:
        await loop.create_connection(lambda: connection, *split_address(replica.door))
    else:
        await loop.create_unix_connection(lambda: connection, sock=sock)
    await ready
    clock, begun = watch(cluster), time.perf_counter()
    for number in range(consumers * AHEAD):
        connection.send(Kind.PING, number, b"")
    await asyncio.sleep(seconds)
    took = time.perf_counter() - begun
    sample = Sample(count / took, clock.per_request(count))
    connection.abort()
    return sample


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure each kind of generator with 1 and with 100 consumers."""
    serve.run(Streamer.bind(), name="streams", route_prefix="/streams", client=client)

    async def in_a_loop(measure: Any) -> Sample:
        async with Client(cluster.address, asynchronous=True, set_as_default=False) as direct:
            sample: Sample = await measure(direct)
        return sample

    for kind, what in KINDS.items():
        for consumers in CONSUMERS:

            def ours(kind: str = kind, consumers: int = consumers) -> Sample:
                return asyncio.run(in_a_loop(lambda direct: consume(direct, kind, consumers, cluster, seconds)))

            def theirs(consumers: int = consumers) -> Sample:
                return asyncio.run(in_a_loop(lambda direct: echo(direct, consumers, cluster, seconds)))

            samples = interleave(pairs, ours, theirs)
            many = f"{consumers} consumer{'s' if consumers > 1 else ''}"
            least = 0.5 if kind != "ticks" else None
            yield Row(f"Stream, {what}, {many}, against a bare echo", "items/s", *samples, least=least)
    serve.delete("streams", client=client)
