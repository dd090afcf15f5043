"""Train on the cluster, serve where it was trained, and try the next model on the live stream before it goes live.

A search over scikit-learn models runs on all workers (joblib's Dask backend), inside a Dask task, so that the best
model stays in a worker's memory: the session has its future only. Bound into an application, a future arrives in the
replicas as its value, from worker to worker; the model never passes through the session. The next model is published as
a candidate: replicas send what they are asked, and what they answered, to it as Dask tasks beside the live traffic,
which waits for none of them. When it agrees well enough it takes the place of the first one.

Run it alone, half a minute with its own cluster::

    python -m examples.train_then_serve
"""

from __future__ import annotations

import time
from typing import Any

import joblib
import numpy as np
from distributed import Client, Future, fire_and_forget, get_client, get_worker, wait
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV

import dask_serve as serve

from .digits import split


def search(sizes: list[int], random_state: int) -> RandomForestClassifier:
    """Find the best of some forests, with one task for each fit. A Dask task itself: what it returns stays here."""
    images, _, labels, _ = split()
    forests = GridSearchCV(
        RandomForestClassifier(random_state=random_state), {"n_estimators": sizes, "max_depth": [4, 12]}, cv=2
    )
    # joblib gives the thread of this task back while it waits for the others.
    with joblib.parallel_backend("dask"):
        forests.fit(images.reshape(-1, 64), labels)
    return forests.best_estimator_


def compare(candidate: Any, images: np.ndarray, answers: list[int]) -> None:
    """Ask a model what another one was asked, on whatever worker has time, and tell how often the two agree."""
    agree = int((candidate.predict(images) == answers).sum())
    get_worker().log_event("shadow", {"agree": agree, "of": len(answers)})


@serve.deployment(num_replicas=2, user_config={"candidate": None})
class Digits:
    """Recognises digits, and lets a candidate have a look at the stream.

    Parameters
    ----------
    model : object
        Anything with ``predict``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.candidate: Future | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take the name of a published future, or none. Changed in place: no replica restarts."""
        client = await get_client()
        self.candidate = await client.get_dataset(config["candidate"]) if config["candidate"] else None

    async def predict(self, images: np.ndarray) -> list[int]:
        """Tell which digits some images show."""
        rows = images.reshape(-1, 64)
        answers = self.model.predict(rows).tolist()
        if self.candidate is not None:
            # The worker that has the candidate gets the rows; nobody waits for it.
            fire_and_forget(get_client().submit(compare, self.candidate, rows, answers, pure=False))
        return answers

    async def size(self) -> int:
        """Tell how many trees the model has."""
        return len(self.model.estimators_)


def stream(handle: serve.DeploymentHandle, images: np.ndarray) -> list[int]:
    """Ask for all images, ten at a time: the live stream."""
    refs = [handle.predict.remote(images[first : first + 10]) for first in range(0, len(images), 10)]
    return [answer for answers in serve.gather(refs) for answer in answers]


def agreement(client: Client, count: int) -> float:
    """Wait until a candidate has seen so many images; in how many of 100 it agrees with what was answered."""
    deadline = time.monotonic() + 30
    while True:
        seen = [event for _, event in client.get_events("shadow")]
        if (total := sum(event["of"] for event in seen)) >= count:
            return 100 * sum(event["agree"] for event in seen) / total
        if time.monotonic() > deadline:
            raise RuntimeError(f"the candidate has seen {total} of {count} images")
        time.sleep(0.05)


def train(client: Client, sizes: list[int], random_state: int) -> Future:
    """Have a model trained; its future."""
    begun = time.monotonic()
    model = client.submit(search, sizes, random_state, pure=False)
    wait(model)
    (holder,) = client.who_has(model)[model.key]
    print(f"trained in {time.monotonic() - begun:.1f} s; the model stays on {holder}")
    return model


def main(client: Client) -> dict[str, Any]:
    """Train, serve, shadow, change over; what was seen."""
    _, images, _, labels = split()
    try:
        first = train(client, [8, 16], 0)
        app = Digits.bind(first)
        handle = serve.run(app, route_prefix=None, client=client)
        right = float(np.mean(np.array(stream(handle, images)) == labels))
        print(f"the first model is right in {right:.1%}")

        second = train(client, [20, 40], 1)
        client.publish_dataset(second, name="candidate")
        shadowing = Digits.options(user_config={"candidate": "candidate"})
        handle = serve.run(shadowing.bind(first), route_prefix=None, client=client)
        stream(handle, images)
        agrees = agreement(client, len(images))
        print(f"the candidate agrees with {agrees:.1f} % of the live answers")
        if agrees > 80:
            handle = serve.run(Digits.bind(second), route_prefix=None, client=client)
        better = float(np.mean(np.array(stream(handle, images)) == labels))
        trees = handle.size.remote().result(10)
        print(f"the second model, {trees} trees, serves, and is right in {better:.1%}")
        return {"right": right, "agrees": agrees, "better": better, "trees": trees}
    finally:
        serve.shutdown(client=client)
        if "candidate" in client.list_datasets():
            client.unpublish_dataset("candidate")


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
