"""One deployment for requests and for data: a million rows are scored by the replicas that answer clients meanwhile.

What it shows:

- ``handle.predict.map_partitions(frame, meta=...)`` is lazy, as any Dask collection, and may be a step among others.
- Nothing is loaded again: the two replicas have the model, and no task brings one.
- It is background work: clients are answered as before.
- ``handle.predict.map(...)`` does the same for what is no collection.

Run it, in less than a minute::

    python -m examples.batch_scoring
"""

from __future__ import annotations

import threading
import time
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier

import dask_serve as serve

ROWS, PARTITIONS = 1_000_000, 20
COLUMNS = ["age", "income", "visits", "balance", "tenure"]


@serve.deployment(num_replicas=2)
class Churn:
    """Tells how likely customers are to leave."""

    def __init__(self) -> None:
        features, left = make_classification(
            5000, len(COLUMNS), n_informative=3, n_redundant=0, shuffle=False, random_state=0
        )
        self.model = RandomForestClassifier(n_estimators=10, max_depth=6, random_state=0)
        self.model.fit(pd.DataFrame(features, columns=COLUMNS), left)

    def predict(self, customers: pd.DataFrame) -> Any:
        """Take a frame of any number of customers; return as many probabilities."""
        return self.model.predict_proba(customers)[:, 1]


def make_part(number: int, rows: int) -> pd.DataFrame:
    """Make up one partition of customers."""
    return pd.DataFrame(np.random.default_rng(number).normal(size=(rows, len(COLUMNS))), columns=COLUMNS)


def main(rows: int = ROWS) -> dict[str, float]:
    """Score the frame while a client calls; return what was seen."""
    with serve.run(Churn.bind(), name="churn", route_prefix=None) as handle:
        one = make_part(0, 1)
        # A frame that is made on the workers, and never in one place.
        parts = [rows // PARTITIONS] * PARTITIONS
        customers = dd.from_map(make_part, range(PARTITIONS), parts, meta=one.iloc[:0])
        # Which step of the graph is scored by the deployment makes no difference to Dask.
        scores = handle.predict.map_partitions(customers, meta=("churn", "float64"))
        likely = customers[scores > 0.5].income

        latencies: list[float] = []
        done = threading.Event()

        def call() -> None:
            while not done.wait(0.02):
                begun = time.perf_counter()
                handle.predict.remote(one).result()
                latencies.append(time.perf_counter() - begun)

        client = threading.Thread(target=call)
        client.start()
        begun = time.perf_counter()
        try:
            count, income = dask.compute(likely.count(), likely.mean())
        finally:
            done.set()
            client.join()
        took = time.perf_counter() - begun
        print(f"{rows:,} customers scored in {took:.1f} s, {rows / took:,.0f} a second, by two models that were there")
        print(f"{count:,.0f} of them are likely to leave; their income is {income:.2f} on average")
        print(f"{len(latencies)} requests meanwhile, each answered in {1e3 * np.median(latencies):.1f} ms (median)")

        # Items that are no collection: refs, in order, so many calls ahead.
        single = (make_part(number, 1) for number in range(200))
        found = [float(ref.result()[0]) for ref in handle.predict.map(single)]
        print(f"{len(found)} customers one by one: {sum(score > 0.5 for score in found)} are likely to leave")
        return {"count": float(count), "requests": float(len(latencies)), "single": float(len(found))}


if __name__ == "__main__":
    main()
