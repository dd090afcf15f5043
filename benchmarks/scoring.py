"""Data through the replicas that serve: a frame beside the same model in plain tasks, with and without requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
from distributed import Client

import dask_serve as serve

from . import online_clients
from .online_clients import COLUMNS
from .processes import DEADLINE, Clock, Cluster, cluster
from .table import Row, Sample, interleave
from .under_load import Running

#: The frame, and the model that scores it.
ROWS, PARTITIONS, TREES = 1_000_000, 40, 10
#: Clients that call one after the other, with a pause.
CLIENTS, PAUSE = 20, 0.1
#: A pass over the frame, with its rows a second.
Score = Callable[[], Sample]

#: Items of the map, and the seconds that its method waits.
ITEMS, WAIT = 100_000, 0.0001


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Forest:
    """A classifier of scikit-learn."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def predict(self, rows: Any) -> Any:
        """Score a piece of a frame."""
        return self.model.predict(rows)

    def ask(self, row: Any) -> int:
        """Score what a client sends."""
        return int(self.model.predict(row)[0])


@serve.deployment(max_ongoing_requests=1000)
class Waits:
    """A method that waits for something else."""

    async def get(self, key: int) -> int:
        """Wait for 0.1 ms."""
        await asyncio.sleep(WAIT)
        return key


class Counted:
    """A model that notes where it is loaded: in each task that has it among its arguments, unless Dask caches it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _loads.append(1)

    def predict(self, rows: Any) -> Any:
        """Score rows."""
        return self.model.predict(rows)


_loads: list[int] = []


def loads() -> int:
    """Return how often this process has loaded the model."""
    return len(_loads)


def rows(pairs: int, seconds: float) -> Iterator[Row]:
    """Measure on a cluster of its own: two workers with one thread each, as many as there are replicas."""
    with cluster(workers=2, threads=1) as running, Client(running.address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=DEADLINE)
        yield from frames(running, client, min(pairs, 3), seconds)
    with cluster() as running, Client(running.address, set_as_default=False) as client:
        yield from items(running, client, min(pairs, 3))


def train() -> Any:
    """Return the model, trained on a part of what it will score."""
    from sklearn.ensemble import RandomForestClassifier

    random = np.random.default_rng(0)
    table = random.random((20_000, COLUMNS))
    return RandomForestClassifier(TREES, max_depth=8, random_state=0).fit(table, table.sum(axis=1) > COLUMNS / 2)


def make_frame(client: Client) -> Any:
    """Return the frame, in the workers' memory."""
    import dask.dataframe as dd
    import pandas as pd

    def part(number: int) -> Any:
        return pd.DataFrame(np.random.default_rng(number).random((ROWS // PARTITIONS, COLUMNS)))

    names = pd.DataFrame(np.empty((0, COLUMNS)))
    frame = client.persist(dd.from_map(part, range(PARTITIONS), meta=names))
    client.compute(frame[0].count()).result(120)
    return frame


def frames(running: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """A frame alone, then beside clients."""
    model = train()
    frame = make_frame(client)
    processes = {"workers": running.workers[0], "worker two": running.workers[1]}
    handle = serve.run(Forest.bind(model), name="scoring", route_prefix=None, client=client)
    meta = ("label", "bool")
    counted = Counted(model)
    passes = itertools.count()

    def once() -> dict[str, Any]:
        # With the names of another pass Dask might have the results still.
        return {"meta": meta, "token": f"pass-{next(passes)}"}

    def score(what: Any) -> tuple[float, dict[str, float]]:
        clock, begun = Clock(processes), time.perf_counter()
        # One number comes back: what is measured is the scoring.
        client.compute(what.sum()).result(300)
        took = time.perf_counter() - begun
        return ROWS / took, clock.per_request(ROWS)

    def ours() -> Sample:
        return Sample(*score(handle.predict.map_partitions(frame, **once())))

    def theirs() -> Sample:
        return Sample(*score(frame.map_partitions(plain, counted, **once())))

    ours(), theirs()
    before = client.run(loads)
    mine, plainly = interleave(pairs, ours, theirs)
    loaded = sum(client.run(loads).values()) - sum(before.values())
    note = f" (the model is loaded 2 times in all, there {loaded / pairs:.0f} times a pass)"
    yield Row(
        "Map over 1,000,000 rows, 2 replicas, against the model in tasks", "rows/s", mine, plainly, 0.8, note=note
    )
    yield from beside(running.address, handle, ours, theirs, max(2 * seconds, 4.0))
    # Two of them have no place on a worker.
    serve.delete("scoring", client=client)
    handle = serve.run(Forest.options(threads=2).bind(model), name="scoring", route_prefix=None, client=client)
    yield from beside(running.address, handle, ours, theirs, max(2 * seconds, 4.0), ", replicas with 2 threads")


def plain(rows: Any, model: Counted) -> Any:
    """Do what the replicas do."""
    import pandas as pd

    return pd.Series(model.predict(rows), index=rows.index, name="label")


def beside(  # noqa: PLR0917
    scheduler: str, handle: serve.DeploymentHandle, ours: Score, theirs: Score, seconds: float, how: str = ""
) -> Iterator[Row]:
    """Let clients call meanwhile: beside nothing, the map, and the model in tasks, which shows what the machine can."""
    free = [ours().value for _ in range(2)]
    row = np.full((1, COLUMNS), 0.4)
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        handle.ask.remote(row).result()
        taken.append(time.perf_counter() - begun)
    service = float(np.median(taken))
    alone, together, plainly = Callers(scheduler), Callers(scheduler), Callers(scheduler)
    with alone:
        time.sleep(seconds)
    with together:
        done = [ours().value for _ in range(4)]
    with plainly:
        for _ in range(4):
            theirs()
    slowest = alone.quantile(0.99)
    ratio = together.quantile(0.99) / slowest
    note = (
        f" ({1e3 * slowest:.3g} ms alone, {len(alone.seconds)} calls; "
        f"{plainly.quantile(0.99) / slowest:.3g} x beside the model in tasks)"
    )
    what = f"{CLIENTS} clients call beside it{how}"
    yield Row(f"{what}: their 99th percentile", "x", [Sample(ratio)], most=1.5, note=note)
    ideal = 1.0 - min(alone.per_second * service / 2, 1.0)
    share = float(np.median(done)) / float(np.median(free)) / ideal
    note = f" (they keep {100 * (1 - ideal):.0f} % of the replicas busy)"
    yield Row(f"{what}: the map does, of what they leave", "x", [Sample(share)], least=0.85, note=note)


class Callers(Running):
    """Clients in a process of their own, each of which calls, waits for the answer, and pauses.

    Attributes
    ----------
    seconds : list of float
        What the calls took that were made while the block ran.
    per_second : float
        How many they were.
    """

    ends_by = signal.SIGTERM

    def __init__(self, scheduler: str) -> None:
        module = online_clients.__name__
        self.command = [sys.executable, "-m", module, scheduler, str(CLIENTS), str(PAUSE)]

    def __enter__(self) -> Callers:
        super().__enter__()
        self._begun = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ended = time.monotonic()
        super().__exit__(kind, *rest)

    def take(self, out: str) -> None:
        """Keep what was called meanwhile."""
        calls = online_clients.Calls(**json.loads(out))
        both = zip(calls.begun, calls.seconds, strict=True)
        self.seconds = [seconds for begun, seconds in both if self._begun <= begun <= self._ended]
        self.per_second = len(self.seconds) / (self._ended - self._begun)

    def quantile(self, share: float) -> float:
        """Return what that share of the calls does not exceed."""
        return float(np.quantile(self.seconds, share))


def items(running: Cluster, client: Client, pairs: int) -> Iterator[Row]:
    """Many small calls."""
    handle = serve.run(Waits.bind(), name="waits", route_prefix=None, client=client).get
    processes = {"caller": psutil.Process(), "worker": running.worker}

    def mapped() -> Sample:
        clock, begun = Clock(processes), time.perf_counter()
        for ref in handle.map(range(ITEMS)):
            ref.result()
        return Sample(ITEMS / (time.perf_counter() - begun), clock.per_request(ITEMS))

    mapped()
    yield Row(
        "100,000 items by handle.map of an `async def` that waits for 0.1 ms, 1 replica",
        "items/s",
        [mapped() for _ in range(pairs)],
        least=20_000,
    )
