"""Batch scoring: Dask collections through the replicas that serve."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from dask.base import tokenize
from distributed import Client
from helpers import embedded_client, wait_until

import dask_serve as serve

pd = pytest.importorskip("pandas")
dd = pytest.importorskip("dask.dataframe")


@serve.deployment(num_replicas=2, max_ongoing_requests=20)
class Model:
    """Doubles; counts its calls and the rows that they bring."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.background: set[bool] = set()

    def _note(self, rows: Any) -> None:
        self.sizes.append(len(rows))
        self.background.add(serve.get_request_context().background)

    def double(self, rows: Any) -> Any:
        self._note(rows)
        return rows * 2

    def plain(self, rows: Any) -> Any:
        self._note(rows)
        return np.asarray(rows)[:, 0] * 2

    def listed(self, rows: Any) -> list[float]:
        return [float(x) for x in np.asarray(rows)[:, 0]]

    def total(self, rows: Any, times: int = 1) -> Any:
        return rows.sum() * times

    def add(self, rows: Any, more: Any, constant: int = 0) -> Any:
        return rows["x"] + more + constant

    @serve.batch(max_batch_size=8, stack="rows")
    def batched(self, rows: Any) -> Any:
        self.sizes.append(len(rows))
        return rows["x"] * 2

    def fail_at(self, rows: Any, value: int) -> Any:
        if (np.asarray(rows) == value).any():
            raise ValueError(f"{value} is bad")
        return np.asarray(rows)[:, 0]

    def one(self, item: int, offset: int = 0) -> int:
        if item == -1:
            raise KeyError("minus one")
        return item * 2 + offset

    def worker(self, rows: Any) -> Any:
        time.sleep(0.005)
        return [serve.get_replica_context().worker] * len(rows)

    def slow(self, rows: Any) -> Any:
        time.sleep(0.05)
        return np.asarray(rows)[:, 0]

    def nested(self, rows: Any) -> Any:
        # Needs a thread of the pool that the tasks who wait for this are in.
        with serve_client() as client:
            return client.submit(lambda x: x * 2, np.asarray(rows)[:, 0], pure=False).result()

    def seen(self) -> tuple[list[int], set[bool], int]:
        seen = self.sizes, self.background, os.getpid()
        self.sizes, self.background = [], set()
        return seen


def serve_client() -> Client:
    from distributed import worker_client

    return worker_client()


@pytest.fixture(scope="module")
def client():
    with embedded_client(2, 2) as client:
        yield client


@pytest.fixture(scope="module")
def handle(client):
    return serve.run(Model.bind(), name="scoring", route_prefix=None, client=client)


def frame(rows: int = 1000, npartitions: int = 4) -> Any:
    return dd.from_pandas(pd.DataFrame({"x": np.arange(rows), "y": np.arange(rows) % 7}), npartitions=npartitions)


def test_a_frame(client, handle):
    ddf = frame()
    scored = handle.double.map_partitions(ddf, meta=ddf)
    assert isinstance(scored, dd.DataFrame)
    assert scored.divisions == ddf.divisions
    pd.testing.assert_frame_equal(client.compute(scored).result(30), ddf.compute() * 2)


def test_arrays_get_the_index_of_their_rows(client, handle):
    ddf = frame()
    scored = client.compute(handle.plain.map_partitions(ddf, meta=("score", "int64"))).result(30)
    assert scored.name == "score"
    pd.testing.assert_series_equal(scored, (ddf.x.compute() * 2).rename("score"))
    listed = client.compute(handle.listed.map_partitions(ddf, meta=("score", "float64"), batch_size=10)).result(30)
    assert listed.index.equals(ddf.compute().index)


def test_rows_of_a_call(client, handle):
    ddf = frame(100, 2)
    sizes(handle)
    client.compute(handle.plain.map_partitions(ddf, meta=("s", "int64"), batch_size=15)).result(30)
    assert sorted(sizes(handle)) == [5, 5, 15, 15, 15, 15, 15, 15]
    client.compute(handle.plain.map_partitions(ddf, meta=("s", "int64"), batch_size=None)).result(30)
    assert sizes(handle) == [50, 50]
    scored = handle.batched.map_partitions(ddf, meta=("s", "int64"))
    assert list(client.compute(scored).result(30)) == [2 * x for x in range(100)]
    assert max(sizes(handle)) <= 8


def sizes(handle: Any) -> list[int]:
    """Rows of the calls since the last look, at both replicas."""
    found: dict[int, list[int]] = {}
    while len(found) < 2:
        seen, _, pid = handle.seen.remote().result(20)
        found.setdefault(pid, []).extend(seen)
    return [size for seen in found.values() for size in seen]


def test_it_is_background_work(client, handle):
    sizes(handle)
    client.compute(handle.double.map_partitions(frame(), meta=frame())).result(30)
    kinds: set[bool] = set()
    pids: set[int] = set()
    while len(pids) < 2:
        _, background, pid = handle.seen.remote().result(20)
        kinds |= background
        pids.add(pid)
    assert kinds == {True}


def test_more_arguments(client, handle):
    ddf = frame()
    scored = handle.add.map_partitions(ddf, ddf.y, constant=3, meta=("s", "int64"), batch_size=7)
    expected = ddf.compute()
    assert list(client.compute(scored).result(30)) == list(expected.x + expected.y + 3)


def test_fusion_and_projection(client, handle):
    ddf = frame()
    scored = handle.double.map_partitions(ddf[ddf.y < 5].assign(z=1), meta=ddf.assign(z=1))
    result = scored[scored.x > 10].x.sum()
    plain = ddf[ddf.y < 5].assign(z=1).map_partitions(lambda rows: rows * 2, meta=ddf._meta.assign(z=1))
    assert len(scored.optimize().__dask_graph__()) == len(plain.optimize().__dask_graph__())
    assert client.compute(result).result(30) == sum(2 * x for x in range(1000) if x % 7 < 5 and 2 * x > 10)
    narrow = handle.plain.map_partitions(ddf.assign(z=1), meta=("s", "int64"), required_columns=["x"])
    assert list(client.compute(narrow).result(30)) == [2 * x for x in range(1000)]


def test_empty_partitions(client, handle):
    ddf = frame()
    scored = handle.plain.map_partitions(ddf[ddf.x < 10], meta=("s", "int64"))
    assert list(client.compute(scored).result(30)) == [2 * x for x in range(10)]
    array = da.ones((4, 3), chunks=(2, 3))
    scored = handle.double.map_blocks(array[array[:, 0] > 1], dtype=float)
    assert client.compute(scored).result(30).shape == (0, 3)


def test_an_array(client, handle):
    array = da.arange(120, chunks=30).reshape(40, 3)
    scored = handle.double.map_blocks(array, dtype=array.dtype)
    assert np.array_equal(client.compute(scored).result(30), array.compute() * 2)
    scored = handle.plain.map_blocks(array, dtype=array.dtype, drop_axis=1, batch_size=4)
    assert scored.shape == (40,)
    assert list(client.compute(scored).result(30)) == [6 * i for i in range(40)]
    total = handle.total.map_blocks(
        da.ones((6, 2), chunks=(3, 2)), dtype=float, batch_size=None, chunks=((1, 1),), drop_axis=1, enforce_ndim=False
    )
    assert total.ndim == 1


def test_a_bag(client, handle):
    bag = db.from_sequence(range(500), npartitions=5).filter(lambda x: x % 3)
    scored = handle.one.map_bag(bag, offset=1)
    assert isinstance(scored, db.Bag)
    assert client.compute(scored).result(30) == [2 * x + 1 for x in range(500) if x % 3]


def test_the_model_is_never_asked_what_comes_out(handle):
    with pytest.raises(serve.ConfigError, match=r"needs meta=.*call the model"):
        handle.plain.map_partitions(frame())
    with pytest.raises(serve.ConfigError, match=r"needs dtype="):
        handle.double.map_blocks(da.ones(3))
    sizes(handle)
    handle.plain.map_partitions(frame(), meta=("s", "int64")).optimize()
    handle.double.map_blocks(da.ones((4, 2)), dtype=float)
    handle.double.map_partitions(frame().index, meta=frame().index)
    assert sizes(handle) == []


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "all"])
def test_bad_sizes(handle, size):
    with pytest.raises(serve.ConfigError, match="batch_size"):
        handle.plain.map_partitions(frame(), meta=("s", "int64"), batch_size=size)


def test_other_kinds(handle):
    with pytest.raises(serve.ConfigError, match=r"takes a Dask dataframe.*pandas DataFrame"):
        handle.plain.map_partitions(pd.DataFrame({"x": [1]}), meta=("s", "int64"))
    with pytest.raises(serve.ConfigError, match=r"takes a Dask array.*numpy ndarray"):
        handle.plain.map_blocks(np.ones(3), dtype=float)
    with pytest.raises(serve.ConfigError, match=r"takes a Dask bag"):
        handle.plain.map_bag([1])
    with pytest.raises(serve.ConfigError, match="stream=True"):
        handle.options(stream=True).plain.map_partitions(frame(), meta=("s", "int64"))


def test_errors_name_the_partition(client, handle):
    scored = handle.fail_at.map_partitions(frame(), 600, meta=("s", "int64"), batch_size=100)
    with pytest.raises(serve.ScoringError) as caught:
        client.compute(scored).result(30)
    error = caught.value
    assert error.partition == 2
    assert error.deployment == "scoring/Model"
    assert isinstance(error.__cause__, ValueError)
    for part in ("partition 2 of", "from 500 on", "rows 100 to 200", "'scoring/Model'", "'fail_at'", "600 is bad"):
        assert part in str(error)
    blocks = handle.fail_at.map_blocks(da.arange(40, chunks=40).reshape(20, 2).rechunk((5, 2)), 11, dtype=int)
    with pytest.raises(serve.ScoringError, match=r"block \(1, 0\) of"):
        client.compute(blocks).result(30)
    with pytest.raises(serve.ScoringError, match=r"partition 1 of .*item 0 could not.*minus one"):
        client.compute(handle.one.map_bag(db.from_sequence([1, -1], npartitions=2))).result(30)


def test_a_method_that_returns_other_rows(client, handle):
    with pytest.raises(serve.ScoringError, match=r"returned a .* for .* rows; with batch_size=None"):
        client.compute(handle.total.map_blocks(da.ones(10, chunks=5), dtype=float)).result(30)


def test_no_such_method(client, handle):
    with pytest.raises(serve.ScoringError, match=r"partition 0 of .*has no method 'nothing'"):
        client.compute(handle.nothing.map_partitions(frame(10, 1), meta=("s", "int64"))).result(30)


def test_tokens(handle):
    ddf = frame()
    same = [handle.plain.map_partitions(ddf, meta=("s", "int64"))._name for _ in range(2)]
    again = pickle.loads(pickle.dumps(handle)).plain.map_partitions(ddf, meta=("s", "int64"))._name
    assert same[0] == same[1] == again
    assert tokenize(handle) != tokenize(handle.plain) != tokenize(handle.options(retries_on_loss=1))
    others = {
        handle.listed.map_partitions(ddf, meta=("s", "int64"))._name,
        handle.plain.map_partitions(ddf, meta=("s", "int64"), batch_size=5)._name,
        handle.plain.map_partitions(ddf, meta=("t", "int64"))._name,
    }
    assert len({*others, same[0]}) == 4
    array = da.ones((4, 2))
    names = {handle.double.map_blocks(array, dtype=float).name for _ in range(2)}
    assert len(names) == 1


def test_outside_of_the_cluster(handle):
    ddf = frame(100, 2)
    with dask.config.set(scheduler="threads"):
        assert list(handle.plain.map_partitions(ddf, meta=("s", "int64")).compute()) == [2 * x for x in range(100)]


def test_partitions_go_to_the_replica_beside_them(client, handle):
    workers = list(client.scheduler_info()["workers"])
    parts = [
        client.submit(pd.DataFrame, {"x": np.arange(64.0)}, workers=[worker], pure=False, key=f"part-{number}")
        for number, worker in enumerate(workers * 4)
    ]
    ddf = dd.from_delayed(parts, meta=pd.DataFrame({"x": [1.0]}), verify_meta=False)
    scored = handle.worker.map_partitions(ddf, meta=("s", object), batch_size=8)
    found = client.compute(scored).result(30)
    assert set(found) == set(workers)
    near = sum(
        len([worker for worker in found[64 * n : 64 * n + 64] if worker == workers[n % 2]]) for n in range(len(parts))
    )
    assert near / len(found) > 0.8


def test_methods_that_need_the_pool(client, handle):
    """All threads of the cluster have tasks that wait for a method which submits one more."""
    ddf = frame(64, 8)
    scored = handle.nested.map_partitions(ddf, meta=("s", "int64"), batch_size=None)
    assert list(client.compute(scored).result(60)) == [2 * x for x in range(64)]


def test_more_than_may_wait_is_no_error(client):
    deployment = Model.options(max_queued_requests=1, request_timeout_s=0.02, max_ongoing_requests=1)
    handle = serve.run(deployment.bind(), name="narrow", route_prefix=None, client=client)
    scored = handle.slow.map_partitions(frame(64, 8), meta=("s", "int64"), batch_size=4)
    assert list(client.compute(scored).result(60)) == list(range(64))
    serve.delete("narrow", client=client)


def test_cancelled_tasks_do_not_wait_for_ever(client):
    handle = serve.run(Model.bind(), name="gone", route_prefix=None, client=client)
    never = handle.slow.map_partitions(frame(4000, 4), meta=("s", "int64"), batch_size=1)
    future = client.compute(never)
    wait_until(lambda: any(client.processing().values()))
    future.cancel()
    wait_until(lambda: not any(client.run(executing).values()))
    serve.delete("gone", client=client)


def executing(dask_worker: Any) -> int:
    return dask_worker.state.executing_count + len(dask_worker.state.long_running)


def test_a_worker_is_killed():
    """Only what it had is done again."""
    with embedded_client(3, 1) as client:
        handle = serve.run(Model.options(num_replicas=2).bind(), name="killed", route_prefix=None, client=client)
        pids = {handle.seen.remote().result(20)[2] for _ in range(50)}
        assert len(pids) == 2
        ddf = frame(1000, 10)
        future = client.compute(handle.slow.map_partitions(ddf, meta=("s", "int64"), batch_size=25))
        online: list[Exception | None] = []

        def call() -> None:
            while not future.done():
                online.append(handle.options(retries_on_loss=2).double.remote(1).exception(30))

        caller = threading.Thread(target=call)
        caller.start()
        wait_until(lambda: any(client.processing().values()))
        time.sleep(0.3)
        os.kill(pids.pop(), signal.SIGKILL)
        assert list(future.result(60)) == list(range(1000))
        caller.join(30)
        serve.shutdown(client=client)


def test_example(client, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    from examples import batch_scoring

    run = serve.run
    monkeypatch.setattr(serve, "run", lambda *args, **kwargs: run(*args, client=client, **kwargs))
    with client.as_current():
        seen = batch_scoring.main(rows=2_000)
    assert 0 < seen["count"] < 2_000
    assert seen["requests"] >= 1
    assert seen["single"] == 200
    assert "2,000 customers scored" in capsys.readouterr().out
