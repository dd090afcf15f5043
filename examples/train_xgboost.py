"""Boosted trees, trained on the cluster with xgboost's own Dask interface, and served from where they were trained.

``xgboost.dask.train`` gives its booster to whoever calls it. Called from a Dask task, that is a worker: the session
gets a future, binds it, and replicas fetch the booster from that worker.

Needs xgboost: ``pip install xgboost``, or the small ``xgboost-cpu``. Run it alone, 15 s with its own cluster::

    python -m examples.train_xgboost
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import dask.array as da
import httpx
import numpy as np
from distributed import Client, wait, worker_client
from starlette.exceptions import HTTPException
from starlette.requests import Request

import dask_serve as serve

ROWS, COLUMNS = 20_000, 4


def train(rounds: int) -> Any:
    """Train on all workers, each with the rows that it has. A Dask task: what it returns stays on this worker."""
    import xgboost.dask

    with worker_client() as client:
        inputs = client.persist(da.random.default_rng(0).random((ROWS, COLUMNS), chunks=(ROWS // 4, COLUMNS)))
        targets = client.persist(inputs @ np.arange(1.0, COLUMNS + 1))
        wait([inputs, targets])
        matrix = xgboost.dask.DaskDMatrix(client, inputs, targets)
        found = xgboost.dask.train(client, {"tree_method": "hist"}, matrix, num_boost_round=rounds)
    return found["booster"]


@serve.deployment(num_replicas=2)
class Trees:
    """Answers with a booster."""

    def __init__(self, booster: Any) -> None:
        self.booster = booster

    def __call__(self, request: Request) -> dict[str, float]:
        """``GET /?x=0.1,0.2,0.3,0.4``."""
        try:
            row = np.array([float(value) for value in request.query_params["x"].split(",")])
            [estimate] = self.predict(row.reshape(1, COLUMNS))
        except (KeyError, ValueError):
            raise HTTPException(400, f"give {COLUMNS} numbers: /?x=0.1,0.2,0.3,0.4") from None
        return {"estimate": float(estimate)}

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Answer Python."""
        return self.booster.inplace_predict(rows)


def main(client: Client) -> float:
    """Train and serve; the mean error."""
    try:
        booster = client.submit(train, 30, pure=False)
        wait(booster)
        serve.start(client=client, port=0)
        handle = serve.run(Trees.bind(booster), client=client)
        print(httpx.get(f"{serve.url(client=client)}/?x=0.1,0.2,0.3,0.4", trust_env=False).text)
        rows = np.random.default_rng(1).random((1000, COLUMNS))
        estimates = handle.predict.remote(rows).result(30)
        error = float(np.abs(estimates - rows @ np.arange(1.0, COLUMNS + 1)).mean())
        print(f"the mean error is {error:.3f}, where the values go from 0 to 10")
        return error
    finally:
        serve.shutdown(client=client)


if __name__ == "__main__":
    if importlib.util.find_spec("xgboost") is None:
        sys.exit("This example needs xgboost: pip install xgboost-cpu")
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
