"""HTTP no-op beside the same Starlette handler on one bare uvicorn process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import psutil
from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .load import drive
from .processes import Clock, Cluster, bare_uvicorn
from .table import Row, Sample, interleave

#: Connections, and the least ratio that is asked.
CASES = {1: 0.35, 32: 0.55, 100: 0.55}


def measure(url: str, processes: dict[str, psutil.Process], connections: int, seconds: float) -> Sample:
    """Load one server for some seconds."""
    clock = Clock(processes)
    load = drive(url, connections, seconds)
    if load.failed:
        raise RuntimeError(f"{load.failed} of {load.requests} requests to {url} failed")
    return Sample(load.rate, clock.per_request(load.requests))


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure with few and many connections."""
    serve.run(NoOp.bind(), name="http", route_prefix="/", client=client)
    url = serve.url(client=client).rstrip("/") + "/"
    processes = {"worker": cluster.worker, "scheduler": cluster.scheduler}
    processes.update({f"proxy {number}".removesuffix(" 0"): proxy for number, proxy in enumerate(cluster.proxies())})
    with bare_uvicorn() as (bare_url, bare):
        for connections, least in CASES.items():
            ours = partial(measure, url, processes, connections, seconds)
            theirs = partial(measure, bare_url, {"uvicorn": bare}, connections, seconds)
            for warm_up in (ours, theirs):
                warm_up()
            what = f"HTTP no-op, {connections} connection{'s' if connections > 1 else ''}, against bare uvicorn"
            yield Row(what, "requests/s", *interleave(pairs, ours, theirs), least=least)
    serve.delete("http", client=client)
