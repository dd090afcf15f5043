"""Measure everything, and write ``benchmarks/results.md``: ``python -m benchmarks [--quick] [--only http,handle]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from distributed import Client

import dask_serve as serve

from . import (
    arrays,
    batching,
    chain,
    control,
    counting,
    data,
    door,
    dropped,
    handle_calls,
    http_bodies,
    http_events,
    http_fastapi,
    http_noop,
    memory,
    overload,
    proxies,
    scoring,
    soak,
    streams,
)
from .command import run
from .load import generator
from .processes import DEADLINE, cluster
from .table import Row, page

#: Those that share a cluster, in turn; each other part has one or more of its own.
SHARED = {
    "http": http_noop,
    "fastapi": http_fastapi,
    "bodies": http_bodies,
    "events": http_events,
    "handle": handle_calls,
    "streams": streams,
    "batching": batching,
}
#: Those that have their own clusters.
ALONE = {"counting": counting, "proxies": proxies, "scoring": scoring}
#: Those that have two workers.
PAIRS = {"refs": [chain, arrays, dropped], "data": [data]}
#: Those that take as long as they take.
LONG = {"control": control, "soak": soak}
PARTS = (*SHARED, *ALONE, *PAIRS, "memory", "door", "overload", *LONG)
PACKAGES = ("dask", "distributed", "uvicorn", "starlette", "fastapi", "uvloop")
RESULTS = Path(__file__).parent / "results.md"


def measure_shared(parts: list[str], pairs: int, seconds: float) -> Iterator[Row]:
    """Measure those that share a cluster."""
    with cluster() as running, Client(running.address, set_as_default=False) as client:
        # A port that nobody else on this machine has, or will have.
        serve.start(port=0, client=client)
        for name, part in SHARED.items():
            if name in parts:
                yield from part.rows(running, client, pairs, seconds)


def measure(parts: list[str], pairs: int, seconds: float) -> Iterator[Row]:
    """Measure one part after the other."""
    if {*SHARED} & {*parts}:
        yield from measure_shared(parts, pairs, seconds)
    for name, part in ALONE.items():
        if name in parts:
            yield from part.rows(pairs, seconds)
    yield from measure_pairs(parts, pairs, seconds)
    if "memory" in parts:
        yield from memory.rows(pairs)
    if "door" in parts:
        with cluster() as running, Client(running.address, set_as_default=False) as client:
            yield from door.rows(client, pairs, seconds)
    if "overload" in parts:
        yield from overload.rows(pairs, seconds)
    for name, long in LONG.items():
        if name in parts:
            yield from long.rows()


def measure_pairs(parts: list[str], pairs: int, seconds: float) -> Iterator[Row]:
    """Measure the parts that have two workers."""
    for name, modules in PAIRS.items():
        if name in parts:
            with cluster(workers=2) as running, Client(running.address, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=DEADLINE)
                for part in modules:
                    yield from part.rows(running, client, pairs, seconds)


def render(rows: list[Row], how: str) -> str:
    """Return the page."""
    method = (
        f"{how} HTTP load from {generator()}. One scheduler and one worker process, two for refs (`dask scheduler`, "
        "`dask worker --no-nanny --nthreads 4`), one proxy, one replica of each deployment, all on one machine with "
        "the load. Ratios mean something, absolute figures only this machine."
    )
    return page(rows, title="Benchmarks", method=method, packages=PACKAGES)


if __name__ == "__main__":
    sys.exit(
        run(
            "benchmarks",
            __doc__,
            PARTS,
            results=RESULTS,
            measure=measure,
            render=render,
            slow=["scoring", "overload", *LONG],
        )
    )
