"""A persisted Dask dataframe as the feature store of a model: requests bring a key, the replica joins it with its row.

The frame is sorted by its key, persisted and published. A replica finds a key's partition by the frame's divisions,
and takes it from the worker that holds it when it is first asked for; from then on a join is a look-up in memory, far
below a millisecond. Who publishes another frame under the same name refreshes the store: replicas load of the new one
what they use of the old one, and only then change over. No request waits, and none fails.

Run it alone, 10 s with its own cluster::

    python -m examples.feature_store
"""

from __future__ import annotations

import asyncio
import bisect
import statistics
import threading
import time
from typing import Any

import dask.dataframe as dd
import httpx
import numpy as np
import pandas as pd
from dask.base import tokenize
from distributed import Client, get_client, wait
from starlette.requests import Request
from starlette.responses import JSONResponse

import dask_serve as serve

CUSTOMERS = 200_000
FEATURES = [f"f{number}" for number in range(8)]
#: Seconds between two looks whether another frame was published.
EVERY = 0.5


class Store:
    """A frame, with those of its partitions in memory that were asked for.

    Parameters
    ----------
    frame : dask.dataframe.DataFrame
        Persisted, with known divisions.
    """

    def __init__(self, frame: dd.DataFrame) -> None:
        self.frame = frame
        self.token = tokenize(frame)
        self.parts: dict[int, tuple[pd.Index, np.ndarray]] = {}

    def partition(self, key: int) -> int:
        """Number of the partition that has a key, if any has."""
        divisions = self.frame.divisions
        if not divisions[0] <= key <= divisions[-1]:
            raise KeyError(key)
        return min(bisect.bisect_right(divisions, key), len(divisions) - 1) - 1

    async def load(self, number: int) -> None:
        """Take a partition from the worker that holds it."""
        part = await get_client().compute(self.frame.partitions[number])
        self.parts[number] = part.index, part.to_numpy()

    async def row(self, key: int) -> np.ndarray:
        """Join: the features of a key."""
        number = self.partition(key)
        if number not in self.parts:
            await self.load(number)
        index, values = self.parts[number]
        return values[index.get_loc(key)]


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Risk:
    """A linear model of features that it looks up by itself."""

    async def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.weights = np.linspace(-1.0, 1.0, len(FEATURES))
        self.client = await get_client()
        self.store = Store(await self.client.get_dataset(dataset))
        self.seconds: list[float] = []
        self.following = asyncio.create_task(self.follow())

    async def follow(self) -> None:
        """Change over to each frame that is published under the name."""
        while True:
            await asyncio.sleep(EVERY)
            try:
                frame = await self.client.get_dataset(self.dataset)
                if tokenize(frame) != self.store.token:
                    store = Store(frame)
                    await asyncio.gather(*map(store.load, list(self.store.parts)))
                    self.store = store
            except Exception as error:  # noqa: BLE001 - replaced while it was read: the next round sees the next one
                print(f"{self.dataset} could not be refreshed: {error!r}")

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer HTTP: ``GET /?customer=7``."""
        try:
            key = int(request.query_params["customer"])
            return JSONResponse({"customer": key, "risk": await self.predict(key)})
        except (KeyError, ValueError):
            return JSONResponse({"error": "name a customer: /?customer=7"}, status_code=404)

    async def predict(self, key: int) -> float:
        """Answer Python."""
        begun = time.perf_counter()
        row = await self.store.row(key)
        self.seconds.append(time.perf_counter() - begun)
        return float(self.weights @ row)

    async def median(self) -> float:
        """Seconds that a join took, the median of all."""
        return statistics.median(self.seconds)


def part(first: int, rows: int, version: int) -> pd.DataFrame:
    """Make one partition; the last feature is the version, so that answers tell which frame they come from."""
    values = np.ones((rows, len(FEATURES)))
    values[:, -1] += version
    return pd.DataFrame(values, columns=FEATURES, index=pd.RangeIndex(first, first + rows, name="customer"))


def features(version: int, customers: int) -> dd.DataFrame:
    """Describe a frame that is sorted by customer; `frame.set_index` sorts one that is not."""
    firsts = list(range(0, customers, customers // 8))
    divisions = (*firsts, customers - 1)
    return dd.from_map(part, firsts, rows=customers // 8, version=version, divisions=divisions)


def publish(client: Client, version: int, customers: int) -> None:
    """Compute a frame on the cluster, and publish it in the place of the one before."""
    frame = client.persist(features(version, customers))
    wait(frame)
    client.publish_dataset(frame, name="features", override=True)


def main(client: Client, customers: int = CUSTOMERS) -> dict[str, Any]:
    """Serve, measure, refresh under load, and stop; what was seen."""
    publish(client, 1, customers)
    serve.start(client=client, port=0)
    handle = serve.run(Risk.bind("features"), client=client)
    answers: list[float] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def call() -> None:
        """Ask for one customer after the other, and go on meanwhile."""
        generator = np.random.default_rng(0)
        while not over.is_set():
            try:
                answers.append(handle.predict.remote(int(generator.integers(customers))).result(10))
            except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                failures.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        begun = time.perf_counter()
        for version in (2, 3):
            publish(client, version, customers)
            deadline = time.monotonic() + 30
            # Both replicas have changed over: the last hundred answers come from the new frame.
            while len(answers) < 100 or {round(answer) for answer in answers[-100:]} != {version}:
                if time.monotonic() > deadline or not caller.is_alive():
                    raise RuntimeError(f"version {version} was not seen")
                time.sleep(0.02)
        over.set()
        caller.join()
        seconds = time.perf_counter() - begun
        median = handle.median.remote().result(10)
        url = f"{serve.url(client=client)}/?customer=7"
        print(f"GET {url}: {httpx.get(url, trust_env=False).text}")
        print(f"a join inside the replica takes {median * 1e6:.0f} us (the median)")
        print(f"{len(answers)} requests in {seconds:.1f} s while two new frames were published, {len(failures)} failed")
    finally:
        over.set()
        caller.join()
        serve.shutdown(client=client)
        client.unpublish_dataset("features")
    return {"median": median, "answers": len(answers), "failures": failures}


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
