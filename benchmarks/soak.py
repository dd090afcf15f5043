"""Resident memory of a proxy after a million requests, beside what it had after ten thousand."""

from __future__ import annotations

from collections.abc import Iterator

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .load import drive
from .processes import cluster
from .table import Row, Sample

CONNECTIONS = 100
FEW, MANY = 10_000, 1_000_000
#: Seconds of one run of the generator.
SLICE = 5.0


def rows() -> Iterator[Row]:
    """Measure once."""
    with cluster() as running, Client(running.address, set_as_default=False) as client:
        serve.start(port=0, client=client)
        serve.run(NoOp.bind(), client=client)
        url = serve.url(client=client) + "/"
        [proxy] = running.proxies()
        sizes, answered = [], 0
        for requests, slice_ in [(FEW, 1.0), (MANY, SLICE)]:
            while answered < requests:
                answered += drive(url, CONNECTIONS, slice_).requests
            sizes.append(proxy.memory_info().rss / 1e6)
        serve.shutdown(client=client)
    few, many = sizes
    note = f" (it was {few:.3g} MB)"
    yield Row(f"Memory of a proxy: growth in {MANY:,} requests", "MB", [Sample(many - few)], most=5.0, note=note)
