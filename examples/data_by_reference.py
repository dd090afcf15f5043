"""Data that is on the cluster already is an argument: it does not pass through the caller, and mostly not at all.

A frame of 16 MB partitions is persisted on two workers, each of which has a replica. A call with one of the partitions
goes to the replica on the worker that holds it, and nothing moves. Over HTTP a request refers to a partition of a data
set that was published for it: ``{"ref": {"dataset": "trips", "partition": 3}}``.

Run it alone, 10 s with its own cluster::

    python -m examples.data_by_reference
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.dataframe as dd
import httpx
import numpy as np
import pandas as pd
from distributed import Client, wait
from starlette.requests import Request

import dask_serve as serve

#: Rows of a partition: two columns of 8 bytes.
ROWS = 2**20


def month(number: int) -> pd.DataFrame:
    """Make one partition, as reading a file would."""
    generator = np.random.default_rng(number)
    return pd.DataFrame({"km": generator.exponential(5.0, ROWS), "minutes": generator.exponential(15.0, ROWS)})


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Speed:
    """Has a model for partitions."""

    def predict(self, trips: pd.DataFrame) -> float:
        """Return the mean speed in km/h."""
        return float(60 * trips["km"].sum() / trips["minutes"].sum())


@serve.deployment(datasets=["trips"])
class Site:
    """Answers HTTP. Requests may refer to ``trips``, and to nothing else."""

    def __init__(self, speed: serve.DeploymentHandle) -> None:
        self.speed = speed

    async def __call__(self, request: Request) -> dict[str, float]:
        """``{"trips": a reference}`` gives ``{"km/h": ...}``; the partition does not pass through here either."""
        body = await serve.resolve(await request.json(), lazy=True)
        return {"km/h": await self.speed.predict.remote(body["trips"])}


def sent(dask_worker: Any) -> int:
    """Bytes of data that a worker has given to others, by Dask's own count."""
    return dask_worker.transfer_outgoing_bytes_total


def moved(client: Client, action: Callable[[], Any]) -> tuple[Any, int]:
    """Do something; return what it did, and how many bytes went from worker to worker meanwhile."""
    before = sum(client.run(sent).values())
    result = action()
    return result, sum(client.run(sent).values()) - before


def main(client: Client) -> dict[str, int]:
    """Call with each partition, by handle and over HTTP; the bytes that moved."""
    trips = client.persist(dd.from_map(month, range(4)))
    wait(trips)
    client.publish_dataset(trips=trips)
    serve.start(client=client, port=0)
    speed = Speed.bind()
    try:
        handle = serve.run(speed, name="speed", route_prefix=None, client=client)
        found, by_handle = moved(client, lambda: [handle.predict.remote(part).result(30) for part in trips.partitions])
        print(f"4 calls with partitions of 16 MB: {found[0]:.1f} km/h, ...; {by_handle} bytes moved between workers")

        serve.run(Site.bind(speed), name="speed", client=client)
        url = serve.url(client=client)

        def post(name: str, number: int) -> httpx.Response:
            body = {"trips": {"ref": {"dataset": name, "partition": number}}}
            return httpx.post(url, json=body, timeout=30, trust_env=False)

        answers, over_http = moved(client, lambda: [post("trips", number) for number in range(4)])
        print(f"4 requests over HTTP: {answers[0].text}, ...; {over_http} bytes moved between workers")
        refused = [post("trips", 4), post("salaries", 0)]
        for answer in refused:
            print(f"{answer.status_code}: {answer.json()['message']}")
        if [answer.status_code for answer in (*answers, *refused)] != [200] * 4 + [404] * 2:
            raise RuntimeError(f"unexpected answers: {[answer.text for answer in (*answers, *refused)]}")
        return {"by handle": by_handle, "over HTTP": over_http}
    finally:
        serve.shutdown(client=client)
        client.unpublish_dataset("trips")


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
