"""The examples on Dask: each runs on a cluster that they share here, and alone, as it is shown."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import wait

import dask_serve as serve

pytest.importorskip("pandas")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent
ALONE = ["batch_scoring", "data_by_reference", "feature_store", "train_then_serve", "computing_endpoint", "walltime"]
NEEDING = {"train_xgboost": "xgboost", "train_torch": "torch"}


def example(name: str) -> Any:
    needed = NEEDING.get(name)
    if needed is not None:
        pytest.importorskip(needed, reason=f"examples/{name}.py needs {needed}")
    return importlib.import_module(f"examples.{name}")


def test_data_by_reference(client):
    assert example("data_by_reference").main(client) == {"by handle": 0, "over HTTP": 0}


def test_feature_store(client):
    found = example("feature_store").main(client)
    assert found["failures"] == []
    assert found["answers"] > 200
    assert found["median"] < 0.001


@serve.deployment
class Holds:
    """Has a large model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def size(self) -> int:
        return len(self.model)


def test_train_then_serve(client):
    found = example("train_then_serve").main(client)
    assert found["right"] > 0.85
    assert found["agrees"] > 85
    assert found["better"] > 0.9
    assert found["trees"] in {20, 40}


def test_a_bound_model_does_not_pass_through_the_session(client):
    """Counted at the system calls of this process, all connections included."""
    from benchmarks.arrays import counted

    model = client.submit(bytes, 20_000_000, workers=[next(iter(client.nthreads()))])
    wait(model)
    with counted() as moved:
        app = Holds.options(num_replicas=2, max_replicas_per_worker=1).bind(model)
        handle = serve.run(app, route_prefix=None, client=client)
        assert serve.gather([handle.size.remote() for _ in range(10)]) == [20_000_000] * 10
    assert 1000 < sum(moved) < 1_000_000
    with counted() as moved:
        client.gather(model)
    assert sum(moved) > 20_000_000
    serve.shutdown(client=client)


def test_train_xgboost(client):
    assert example("train_xgboost").main(client) < 0.5


def test_train_torch(client):
    first, second = example("train_torch").main(client)
    assert first < second
    assert second > 0.9


def test_computing_endpoint(client):
    found = example("computing_endpoint").main(client)
    assert found["events"] == 13
    assert found["known"] > 300
    # Those that run are finished; one thread would need 10 s for all of them.
    assert found["left"] == 0
    assert found["seconds"] < 5


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_ten_generations_of_workers(capsys):
    found = example("walltime").main(generations=10, lifetime=8.0, patience=400.0)
    assert found["failures"] == []
    assert found["joined"] >= 33
    assert found["answers"].total() > 2000
    # Replicas have been on many of them.
    assert len(found["answers"]) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALONE, *NEEDING])
def test_alone_in_less_than_a_minute(name):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    needed = NEEDING.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        assert done.returncode == 1
        assert done.stderr == f"This example needs {needed}: " + done.stderr.partition(": ")[2]
        assert "pip install" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout
    assert time.monotonic() - begun < 60
