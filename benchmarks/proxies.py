"""HTTP no-op through two proxies beside one, on two clusters: as far as the cores of the machine go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .http_noop import measure
from .processes import cluster
from .table import Row, interleave

CONNECTIONS = 100


def rows(pairs: int, seconds: float) -> Iterator[Row]:
    """Measure; both clusters stand, and one idles."""
    measures = []
    with ExitStack() as stack:
        for proxies in (2, 1):
            running = stack.enter_context(cluster())
            client = stack.enter_context(Client(running.address, set_as_default=False))
            serve.start(port=0, num_proxies=proxies, client=client)
            serve.run(NoOp.bind(), client=client)
            stack.callback(serve.shutdown, client=client)
            measures.append(partial(measure, serve.url(client=client) + "/", running.http(), CONNECTIONS))
        for warm_up in measures:
            warm_up(1.0)
        samples = interleave(pairs, *[partial(call, seconds) for call in measures])
    yield Row(f"HTTP no-op, {CONNECTIONS} connections, 2 proxies, against 1", "requests/s", *samples)
