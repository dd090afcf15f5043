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

    def shapes(self, rows: Any, *args: Any, **named: Any) -> list[Any]:
        found = [one.shape[0] if np.ndim(one) else one for one in (*args, *named.values())]
        return [" ".join(map(str, [rows.shape[0], *found]))] * rows.shape[0]

    def label(self, rows: Any) -> Any:
        return pd.Series(pd.Categorical([str(x) for x in rows["x"]]), index=rows.index)

    def renamed(self, rows: Any) -> Any:
        return rows.rename(columns={"x": "other"})

    def twice(self, rows: Any) -> Any:
        return np.stack([rows, rows], axis=-1)

    def product(self, rows: Any) -> Any:
        return rows * 2

    def row_sums(self, rows: Any) -> Any:
        return np.asarray(rows.sum(axis=1)).ravel()

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


def test_more_arguments_by_name(client, handle):
    """What is partitioned as the frame is cut with it, also by name; the rest arrives as a value."""
    ddf = frame(40, 2)
    scored = handle.add.map_partitions(ddf, more=ddf.y, meta=("s", "int64"), batch_size=7)
    expected = ddf.compute()
    assert list(client.compute(scored).result(30)) == list(expected.x + expected.y)
    options = {"meta": ("s", object), "batch_size": 20}
    scored = handle.shapes.map_partitions(ddf, client.submit(len, "ab"), total=ddf.y.sum(), more=ddf.y, **options)
    assert set(client.compute(scored).result(30)) == {f"20 2 {expected.y.sum()} 20"}


def test_a_table_beside_a_frame_of_one_partition(client, handle):
    """Its rows are others, so it is not cut, and need not have as many."""
    table = dd.from_pandas(pd.DataFrame({"z": range(5)}), npartitions=1)
    whole = handle.shapes.map_partitions(frame(20, 1), table, meta=("s", object), batch_size=None)
    assert set(client.compute(whole).result(30)) == {"20 5"}
    pieces = handle.shapes.map_partitions(frame(20, 1), table, meta=("s", object), batch_size=10)
    assert set(client.compute(pieces).result(30)) == {"10 5"}
    same = handle.shapes.map_partitions(frame(20, 1), frame(20, 1).y, meta=("s", object), batch_size=10)
    assert set(client.compute(same).result(30)) == {"10 10"}


def test_categories_of_pieces_are_put_together(client, handle):
    meta = pd.Series([], dtype="category", name="label")
    scored = client.compute(handle.label.map_partitions(frame(20, 2), meta=meta, batch_size=3)).result(30)
    assert scored.dtype == "category"
    assert list(scored) == [str(x) for x in range(20)]


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


def test_arrays_that_have_the_same_rows(client, handle):
    """By position or by name, with other columns, of unknown length: what Dask brings with a block is cut with it."""
    array, column = da.ones((20, 3), chunks=(10, 3)), da.arange(20, chunks=10)[:, None]
    options = {"dtype": object, "drop_axis": 1, "batch_size": 4}
    for more in ({"args": (column,)}, {"column": column}):
        scored = handle.shapes.map_blocks(array, *more.pop("args", ()), **more, **options)
        assert set(client.compute(scored).result(30)) == {"4 4", "2 2"}
    unknown = dd.from_dask_array(array).to_dask_array()
    scored = handle.shapes.map_blocks(unknown, unknown + 1, unknown.sum(), **options)
    assert set(client.compute(scored).result(30)) == {"4 4 60.0", "2 2 60.0"}


def test_masked_blocks(client, handle):
    """What is masked stays masked, however many pieces there are."""
    array = da.ma.masked_greater(da.arange(24, chunks=12), 20)
    scored = client.compute(handle.double.map_blocks(array, dtype=int, batch_size=5)).result(30)
    assert scored.mask.sum() == 3
    assert scored.sum() == 2 * sum(range(21))


def test_sparse_blocks(client, handle):
    sparse = pytest.importorskip("scipy.sparse")
    array = da.ones((20, 3), chunks=(5, 3)).map_blocks(sparse.csr_matrix, dtype=float, meta=sparse.csr_matrix((0, 0)))
    sums = handle.row_sums.map_blocks(array, dtype=float, drop_axis=1, batch_size=2)
    assert isinstance(sums._meta, np.ndarray)
    assert list(client.compute(sums).result(30)) == [3.0] * 20
    doubled = handle.product.map_blocks(array, meta=sparse.csr_matrix((0, 0), dtype=float), batch_size=2)
    found = client.compute(doubled).result(30)
    assert sparse.issparse(found)
    assert found.toarray().tolist() == [[2.0] * 3] * 20


def test_empty_blocks_have_the_axes_that_come_out(client, handle):
    array = da.arange(24, chunks=6)
    array = array[array > 10]
    scored = handle.twice.map_blocks(array, dtype=int, new_axis=1, chunks=(array.chunks[0], (2,)), batch_size=2)
    assert client.compute(scored).result(30).tolist() == [[x, x] for x in range(11, 24)]


def test_empty_blocks_whose_rows_are_not_kept(client, handle):
    """They are sent, as Dask does: what comes of no rows only the method knows."""
    array = da.ones((6, 3), chunks=(3, 3))
    array = array[array[:, 0] > 1]
    sums = handle.total.map_blocks(array, dtype=float, drop_axis=(0, 1), enforce_ndim=False)
    assert client.gather([client.compute(part) for part in sums.to_delayed().ravel()]) == [0.0]


def test_what_is_said_to_be_partitioned_as_the_frame_and_is_not(client, handle):
    ddf = frame(40, 2)
    other = frame(40, 4).repartition(divisions=[0, 10, 39])
    with pytest.raises(serve.ScoringError, match=r"argument 'more' has \d+ rows and the partition 20"):
        client.compute(handle.add.map_partitions(ddf, more=other.y, meta=("s", "int64"))).result(30)


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


def test_a_method_that_returns_other_columns(client, handle):
    with pytest.raises(serve.ScoringError, match=r"(?s)partition [0-3] of .*do not match.*other"):
        client.compute(handle.renamed.map_partitions(frame(40, 4), meta=frame())).result(30)
    with pytest.raises(serve.ScoringError, match=r"returned a DataFrame, and meta is a Series"):
        client.compute(handle.renamed.map_partitions(frame(10, 1), meta=("s", float))).result(30)
    free = handle.renamed.map_partitions(frame(10, 1), meta=frame(), enforce_metadata=False)
    assert list(client.compute(free).result(30).columns) == ["other", "y"]


def test_arguments_that_cannot_be_cut_name_the_partition(client, handle):
    rows = da.ones((6, 2), chunks=(3, 2)).map_blocks(lambda block: Uncut(block), dtype=float)
    with pytest.raises(serve.ScoringError, match=r"block \(0, 0\) of .*rows 0 to 1 .*no cutting"):
        client.compute(handle.double.map_blocks(rows, dtype=float, batch_size=1)).result(30)


class Uncut:
    """Rows that refuse to be cut, as sparse matrices of some formats do."""

    def __init__(self, block: Any) -> None:
        self.shape, self.ndim, self.dtype = block.shape, block.ndim, block.dtype

    def __getitem__(self, _: Any) -> Any:
        raise TypeError("no cutting")


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
