"""Arrays by ref beside the same through the caller, and by handle beside copies through a plain socket."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
from distributed import Client

import dask_serve as serve

from .apps import Maker, NoOp, Taker
from .bare_socket import receive_into
from .loops import Loop, connect
from .processes import Clock, Cluster, spawn, stop
from .table import Row, Sample, interleave

MEGABYTE = 1_000_000
BY_REF = 64 * MEGABYTE
THERE_AND_BACK = 8 * MEGABYTE
#: Receiving and sending methods of sockets, which return how many bytes they moved, or the bytes.
SYSTEM_CALLS = ("recv", "recv_into", "recvmsg", "recvmsg_into", "send", "sendmsg")


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure from replica to replica, then there and back."""
    handles = {
        "maker": Maker.options(workers=["one"]).bind(BY_REF),
        "taker": Taker.options(workers=["two"]).bind(),
        "echo": NoOp.options(workers=["one"]).bind(),
    }
    handles = {name: serve.run(app, name=name, route_prefix=f"/{name}", client=client) for name, app in handles.items()}
    with Loop() as loop:
        direct = loop.run(connect(cluster.address))
        try:
            yield from by_ref(loop, direct, cluster, pairs, seconds)
            yield from there_and_back(loop, direct, handles["echo"], cluster, pairs=pairs, seconds=seconds)
        finally:
            loop.run(direct.close())
    for name in handles:
        serve.delete(name, client=client)


# ---------------------------------------------------------------------- from replica to replica


def by_ref(loop: Loop, client: Client, cluster: Cluster, pairs: int, seconds: float) -> Iterator[Row]:
    """Compare a ref as the argument with its value; the two replicas are in two processes."""
    make = loop.run(find_handle("maker", client)).make
    size = loop.run(find_handle("taker", client)).size

    async def ref() -> None:
        assert await size.remote(make.remote()) == BY_REF

    async def through() -> None:
        assert await size.remote(await make.remote()) == BY_REF

    processes = {"caller": psutil.Process(), "maker": cluster.workers[0], "taker": cluster.workers[1]}

    def measure(call: Callable[[], Awaitable[None]]) -> Sample:
        return loop.run(bandwidth(call, BY_REF, processes, seconds))

    samples = interleave(pairs, partial(measure, ref), partial(measure, through))
    yield Row("64 MB from replica to replica by ref, against through the caller", "MB/s", *samples, least=1.5)
    samples = interleave(pairs, lambda: loop.run(passing(ref)), lambda: loop.run(passing(through)))
    yield Row("Bytes that pass the caller meanwhile", "MB", *samples, most=0.001)


async def find_handle(name: str, client: Client) -> serve.DeploymentHandle:
    """Return a handle that the running loop carries."""
    handle: serve.DeploymentHandle = await serve.get_app_handle(name, client=client)
    return handle


async def bandwidth(
    call: Callable[[], Awaitable[Any]], nbytes: int, processes: dict[str, psutil.Process], seconds: float
) -> Sample:
    """Return megabytes a second of calls one after the other, each of which moves ``nbytes``."""
    await call()
    clock, begun, count = Clock(processes), time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        await call()
        count += 1
    return Sample(count * nbytes / MEGABYTE / (time.perf_counter() - begun), clock.per_request(count))


async def passing(call: Callable[[], Awaitable[Any]]) -> Sample:
    """Return the megabytes that one call moves through this process's sockets, to workers, scheduler or anybody."""
    with counted() as moved:
        await call()
    return Sample(sum(moved) / MEGABYTE)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count what the sockets of this process move, at their system calls.

    The loop must be asyncio's own: it calls the methods that are replaced here, and so do Dask's connections.
    """
    moved: list[int] = []

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(self: socket.socket, *args: Any) -> Any:
            done = function(self, *args)
            first = done[0] if isinstance(done, tuple) else done
            moved.append(first if isinstance(first, int) else len(first))
            return done

        return counting

    for name in SYSTEM_CALLS:
        setattr(socket.socket, name, count(getattr(socket.socket, name)))
    try:
        yield moved
    finally:
        # They are inherited: what was set hides them.
        for name in SYSTEM_CALLS:
            delattr(socket.socket, name)


# ---------------------------------------------------------------------- there and back


def there_and_back(
    loop: Loop, client: Client, handle: serve.DeploymentHandle, cluster: Cluster, *, pairs: int, seconds: float
) -> Iterator[Row]:
    """Compare an array that is an argument and the result with the same bytes through a socket and back."""
    array = np.ones(THERE_AND_BACK, np.uint8)
    moved = 2 * THERE_AND_BACK
    echo = loop.run(find_handle("echo", client)).echo
    processes = {"caller": psutil.Process(), "worker": cluster.worker}

    async def ask() -> None:
        assert (await echo.remote(array)).nbytes == THERE_AND_BACK

    async def block() -> None:
        assert handle.echo.remote(array).result().nbytes == THERE_AND_BACK

    with bare_socket(THERE_AND_BACK) as (peer, process):

        async def copy() -> None:
            peer.sendall(array)
            receive_into(peer, buffer)

        buffer = bytearray(THERE_AND_BACK)
        others = {"caller": psutil.Process(), "peer": process}

        def plain() -> Sample:
            return loop.run(bandwidth(copy, moved, others, seconds))

        for how, call in [("asyncio", ask), ("synchronous", block)]:

            def ours(call: Callable[[], Awaitable[None]] = call) -> Sample:
                return loop.run(bandwidth(call, moved, processes, seconds))

            what = f"8 MB there and back by handle, {how}, against a plain loopback socket"
            yield Row(what, "MB/s", *interleave(pairs, ours, plain), least=0.7)


@contextmanager
def bare_socket(nbytes: int) -> Iterator[tuple[socket.socket, psutil.Process]]:
    """Start the process that sends back what it gets, and connect to it."""
    process = spawn("-m", "benchmarks.bare_socket", str(nbytes), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=30) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.settimeout(None)
            yield peer, psutil.Process(process.pid)
    finally:
        stop(process)
