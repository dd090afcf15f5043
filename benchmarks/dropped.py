"""Refs that are made, dropped and never awaited, beside futures of ``client.submit``: what they cost their caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from distributed import Client

import dask_serve as serve

from .apps import NoOp
from .handle_calls import watch
from .processes import Cluster
from .table import Row, Sample, interleave

#: Made and dropped before the caller waits until all have run.
BURST = 200


def no_op(value: int) -> int:
    """Be the task."""
    return value


def measure(make: Callable[[int], Any], cluster: Cluster, seconds: float) -> Sample:
    """Return microseconds that making and dropping one takes; CPU until it has run."""
    make(0).result()
    clock, begun, making, count = watch(cluster), time.perf_counter(), 0.0, 0
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        for number in range(BURST):
            make(number)
        making += time.perf_counter() - sent
        make(0).result()
        count += BURST
    return Sample(1e6 * making / count, clock.per_request(count))


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure the time that the caller loses, and the CPU time of its process."""
    handle = serve.run(NoOp.bind(), name="dropped", route_prefix="/dropped", client=client)
    ours = partial(measure, handle.echo.remote, cluster, seconds)
    theirs = partial(measure, partial(client.submit, no_op, pure=False), cluster, seconds)
    mine, other = interleave(pairs, ours, theirs)
    what = "A ref made and dropped, against client.submit of a no-op"
    yield Row(f"{what}, time of the caller", "µs", mine, other, most=0.1)
    mine, other = ([Sample(sample.cpu["caller"]) for sample in samples] for samples in (mine, other))
    yield Row(f"{what}, CPU of its process until done", "µs", mine, other, most=0.1)
    serve.delete("dropped", client=client)
