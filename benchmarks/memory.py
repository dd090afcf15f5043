"""Resident memory that a replica adds to its worker before user code: one replica, then nine, an eighth of the rest."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .processes import Cluster, cluster
from .table import Row, Sample

MORE = 8


def resident(cluster: Cluster) -> tuple[int, int]:
    """Return RSS, and USS (what only this process has), of the worker in bytes."""
    info = cluster.worker.memory_full_info()
    return info.rss, info.uss


def measure() -> tuple[float, float]:
    """Measure in a fresh worker, because memory that was given back is seldom returned to the system; MB."""
    with cluster() as fresh, Client(fresh.address, set_as_default=False) as client:
        sizes = []
        for replicas in (1, 1 + MORE):
            serve.run(NoOp.options(num_replicas=replicas).bind(), client=client)
            sizes.append(resident(fresh))
        serve.shutdown(client=client)
    (rss, uss), (more_rss, more_uss) = sizes
    return (more_rss - rss) / MORE / 1e6, (more_uss - uss) / MORE / 1e6


def rows(pairs: int) -> Iterator[Row]:
    """Measure as often as the rest."""
    values = [measure() for _ in range(pairs)]
    note = f" (of that its own: {statistics.median(uss for _, uss in values):.2g} MB)"
    yield Row("Memory of a replica", "MB", [Sample(rss) for rss, _ in values], most=8.0, note=note)
