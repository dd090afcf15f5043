"""HTTP no-op beside the same Starlette handler on one bare uvicorn process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import psutil
from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .load import Load, drive
from .processes import Clock, Cluster, bare_uvicorn
from .table import Row, Sample, interleave

MANY = (32, 100)


def rate(load: Load) -> float:
    """Requests a second."""
    return load.rate


def median_ms(load: Load) -> float:
    """Milliseconds until half of the answers are there."""
    return 1e3 * load.median_s


def measure(
    url: str,
    processes: dict[str, psutil.Process],
    connections: int,
    seconds: float,
    *,
    body: str = "",
    value: Callable[[Load], float] = rate,
) -> Sample:
    """Load one server for some seconds."""
    clock = Clock(processes)
    load = drive(url, connections, seconds, body)
    return Sample(value(load), clock.per_request(load.requests))


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure with few and many connections."""
    serve.run(NoOp.bind(), name="http", route_prefix="/", client=client)
    url = serve.url(client=client).rstrip("/") + "/"
    with bare_uvicorn("noop") as (bare_url, bare):
        ours = partial(measure, url, cluster.http())
        theirs = partial(measure, bare_url, {"uvicorn": bare})
        for warm_up in (ours, theirs):
            warm_up(MANY[0], 1.0)
        one = [partial(call, 1, seconds, value=median_ms) for call in (ours, theirs)]
        yield Row(
            "HTTP no-op, 1 connection, median latency, against bare uvicorn", "ms", *interleave(pairs, *one), most=2.6
        )
        for connections in MANY:
            many = [partial(call, connections, seconds) for call in (ours, theirs)]
            what = f"HTTP no-op, {connections} connections, against bare uvicorn"
            yield Row(what, "requests/s", *interleave(pairs, *many), least=0.7)
    serve.delete("http", client=client)
