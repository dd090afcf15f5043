"""Requests with 16 MB partitions of a persisted array: what moves, by Dask's own count, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
from distributed import Client, wait

import dask_serve as serve

from .apps import Taker
from .arrays import MEGABYTE
from .processes import Cluster
from .table import Row, Sample

PARTITION = 16 * MEGABYTE
#: So many lie on each of the two workers.
PARTS = 4


def sent(dask_worker: Any) -> tuple[int, int]:
    """Transfers to other workers so far, and their bytes."""
    return dask_worker.transfer_outgoing_count_total, dask_worker.transfer_outgoing_bytes_total


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Call with each partition once."""
    one, two = (persisted(client, name, seed) for seed, name in enumerate(["one", "two"]))
    near = Taker.options(num_replicas=2, max_replicas_per_worker=1).bind()
    far = Taker.options(workers=["one"]).bind()
    near, far = (
        serve.run(app, name=name, route_prefix=None, client=client) for name, app in {"near": near, "far": far}.items()
    )
    for handle in (near, far):
        serve.gather([handle.size.remote(one.blocks[0]) for _ in range(20)])
    cases = {
        "that lies on the worker of a replica": (near, [part for array in (one, two) for part in array.blocks], 0.0, 0),
        "that lies on another worker": (far, list(two.blocks), 1.001 * PARTITION / MEGABYTE, 1),
    }
    for where, (handle, parts, most, transfers) in cases.items():
        what = f"A request with a partition of 16 MB {where}"
        seen = [moved(client, lambda part=part, handle=handle: handle.size.remote(part).result()) for part in parts]
        between, count, taken = ([Sample(values[i]) for values in seen] for i in range(3))
        yield Row(f"{what}: bytes from worker to worker", "MB", between, most=most)
        yield Row(f"{what}: transfers", "", count, most=transfers)
        yield Row(f"{what}: time", "ms", taken)
    for name in ("near", "far"):
        serve.delete(name, client=client)


def persisted(client: Client, worker: str, seed: int) -> Any:
    """Return an array whose partitions lie on one worker."""
    size = PARTITION // 8
    array = client.persist(da.random.default_rng(seed).random(PARTS * size, chunks=size), workers=[worker])
    with client.as_current():
        wait(array)
    return array


def moved(client: Client, call: Callable[[], int]) -> tuple[float, float, float]:
    """Call once: megabytes and transfers between workers, milliseconds."""
    before = client.run(sent)
    begun = time.perf_counter()
    size = call()
    taken = time.perf_counter() - begun
    after = client.run(sent)
    if size != PARTITION:
        raise RuntimeError(f"a replica was given {size} bytes")
    counts, nbytes = (sum(after[at][i] - before[at][i] for at in after) for i in range(2))
    return nbytes / MEGABYTE, counts, 1000 * taken
