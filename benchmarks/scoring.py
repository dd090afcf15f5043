"""Data through the replicas that serve: a frame beside the same model in plain tasks, with and without requests."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
from distributed import Client

import dask_serve as serve

from .processes import DEADLINE, Clock, Cluster, cluster
from .table import Row, Sample, interleave

#: The frame, and the model that scores it.
ROWS, COLUMNS, PARTITIONS, TREES = 1_000_000, 8, 40, 10
#: Clients that call one after the other, with a pause.
CLIENTS, PAUSE = 20, 0.1
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
    yield from beside(handle, ours, theirs, max(2 * seconds, 4.0))
    handle = serve.run(Forest.options(threads=2).bind(model), name="scoring", route_prefix=None, client=client)
    yield from beside(handle, ours, theirs, max(2 * seconds, 4.0), ", replicas with 2 threads")


def plain(rows: Any, model: Counted) -> Any:
    """Do what the replicas do."""
    import pandas as pd

    return pd.Series(model.predict(rows), index=rows.index, name="label")


def beside(
    handle: serve.DeploymentHandle,
    ours: Callable[[], Sample],
    theirs: Callable[[], Sample],
    seconds: float,
    how: str = "",
) -> Iterator[Row]:
    """Let clients call meanwhile: beside nothing, the map, and the model in tasks, which shows what the machine can."""
    free = [ours().value for _ in range(2)]
    alone, together, plainly = Callers(handle.ask), Callers(handle.ask), Callers(handle.ask)
    with alone:
        time.sleep(seconds)
    with together:
        # The first pass begins before all clients do.
        done = [ours().value for _ in range(4)][1:]
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
    ideal = 1.0 - min(alone.busy / 2, 1.0)
    share = float(np.median(done)) / float(np.median(free)) / ideal
    note = f" (they keep {100 * (1 - ideal):.0f} % of the replicas busy)"
    yield Row(f"{what}: the map does, of what they leave", "x", [Sample(share)], least=0.85, note=note)


class Callers:
    """Clients in threads, each of which calls, waits for the answer, and pauses."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.seconds: list[float] = []
        #: Replicas that were busy on average.
        self.busy = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> Callers:
        row = np.full((1, COLUMNS), 0.4)
        taken = []
        for _ in range(20):
            begun = time.perf_counter()
            self._call.remote(row).result()
            taken.append(time.perf_counter() - begun)
        self._service = float(np.median(taken))
        self._begun = time.perf_counter()

        def one(number: int) -> None:
            random = np.random.default_rng(number)
            while not self._stop.wait(random.exponential(PAUSE)):
                begun = time.perf_counter()
                self._call.remote(row).result()
                self.seconds.append(time.perf_counter() - begun)

        self._threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.busy = len(self.seconds) * self._service / (time.perf_counter() - self._begun)

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
