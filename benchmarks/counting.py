"""What counting costs: the same no-op on two clusters, one with what is counted for metrics taken out of its processes.

``on`` counts as everybody's cluster does; ``off`` has `benchmarks/uncounted` in it, which nothing else uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .handle_calls import concurrent, find_handle
from .http_noop import measure
from .loops import Loop, connect
from .processes import Cluster, cluster
from .table import Row, Sample, interleave

UNCOUNTED = str(Path(__file__).parent / "uncounted")
CONNECTIONS = (32, 100)
#: Of the throughput without counting.
LEAST = 0.95


@contextmanager
def without_counting() -> Iterator[None]:
    """Let processes that are started count no requests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [UNCOUNTED, before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def rows(pairs: int, seconds: float) -> Iterator[Row]:
    """Measure over HTTP, then calls by a handle."""
    with ExitStack() as stack:
        counting = stack.enter_context(cluster())
        with without_counting():
            silent = stack.enter_context(cluster())
        runs = [(one, serve_noop(stack, one)) for one in (counting, silent)]
        check(runs[1][1], counts=False)
        check(runs[0][1], counts=True)
        for connections in CONNECTIONS:
            calls = [partial(measure, url, one.http(), connections, seconds) for one, url in runs]
            for call in calls:
                call()
            what = f"HTTP no-op, {connections} connections, counted against not counted"
            yield Row(what, "requests/s", *interleave(pairs, *calls), least=LEAST)
        yield handle_row(counting, silent, pairs, seconds)


def serve_noop(stack: ExitStack, running: Cluster) -> str:
    """Deploy the no-op and return its URL."""
    client = stack.enter_context(Client(running.address, set_as_default=False))
    serve.start(port=0, client=client)
    serve.run(NoOp.bind(), name="handle", route_prefix="/", client=client)
    return serve.url(client=client).rstrip("/") + "/"


def check(url: str, *, counts: bool) -> None:
    """Make sure that the two differ.

    Raises
    ------
    RuntimeError
        They do not.
    """
    from urllib.request import urlopen

    with urlopen(url, timeout=10), urlopen(url + "-/metrics", timeout=10) as page:
        told = b'dask_serve_http_requests_total{application="handle"' in page.read()
    if told != counts:
        raise RuntimeError(f"requests to {url} are {'' if told else 'not '}counted, which they should{' not' * told}")


def handle_row(counting: Cluster, silent: Cluster, pairs: int, seconds: float) -> Row:
    """Compare calls from an event loop, 50 in flight."""
    with Loop() as runner:
        clients = [runner.run(connect(one.address)) for one in (counting, silent)]
        try:

            def call(number: int) -> Sample:
                one = (counting, silent)[number]
                return runner.run(concurrent(echoes[number].remote, 50, one, seconds))

            echoes = [runner.run(find_handle(client)).echo for client in clients]
            calls = [partial(call, number) for number in (0, 1)]
            for each in calls:
                each()
            what = "Handle, asyncio, 50 in flight, counted against not counted"
            return Row(what, "calls/s", *interleave(pairs, *calls), least=LEAST)
        finally:
            for client in clients:
                runner.run(client.close())
