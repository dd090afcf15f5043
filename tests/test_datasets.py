"""Requests that refer to published data sets: what user code gets, what strangers are told, and what moves."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import dask.array as da
import dask.bag as db
import httpx
import numpy as np
import pytest
from distributed import futures_of, wait
from helpers import http_client
from hypothesis import given
from hypothesis import strategies as st

import dask_serve as serve
from dask_serve.exceptions import ConfigError, DataNotFoundError, DataReferenceError, ServeError
from dask_serve.policy.references import BadReferenceError, Reference, find, replace
from dask_serve.session.collections import future_behind

pandas = pytest.importorskip("pandas")
frames = pytest.importorskip("dask.dataframe")

MB = 2**20


def inc(x):
    return x + 1


def shape(value: Any) -> Any:
    """What came, in a form that JSON has."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    if isinstance(value, pandas.DataFrame):
        return {"columns": list(value.columns), "sum": int(value.to_numpy().sum())}
    return value.tolist() if hasattr(value, "tolist") else value


@serve.deployment(datasets=["frame", "array", "bag", "one", "list", "lazy", "changing", "never published"])
class Model:
    def identity(self):
        return serve.get_replica_context().replica_id

    async def __call__(self, request):
        return shape(await serve.resolve(await request.json(), most=20))

    def blocking(self, body):
        return shape(serve.resolve(body))

    async def in_another_loop(self, body):
        async def ask() -> Any:
            return shape(await serve.resolve(body))

        return await asyncio.to_thread(asyncio.run, ask())

    async def futures(self, body):
        found = await serve.resolve(body, lazy=True)
        return type(found["x"]).__name__, shape(await found["x"])


@serve.deployment
class Unnamed:
    def __call__(self, request):
        return shape(serve.resolve({"x": {"ref": {"dataset": "frame", "partition": 0}}}))


def as_fastapi() -> Any:
    from fastapi import Body, FastAPI

    app = FastAPI()

    @app.post("/")
    async def root(body=Body()) -> Any:  # noqa: B008
        return shape(await serve.resolve(body))

    return app


@serve.deployment(datasets=["frame"])
@serve.ingress(as_fastapi)
class Web:
    pass


@pytest.fixture
def published(client):
    """Data sets of every kind, and the address of a service that may refer to them."""
    frame = frames.from_pandas(pandas.DataFrame({"x": range(12), "y": range(12)}), npartitions=3)
    data = {
        "frame": client.persist(frame),
        "array": client.persist(da.arange(16).reshape(4, 4).rechunk((2, 2))),
        "bag": client.persist(db.from_sequence([1, 2, 3, 4], npartitions=2)),
        "one": client.submit(inc, 1),
        "list": client.map(inc, [10, 20]),
        "lazy": da.ones(4, chunks=2),
        "secret": client.persist(frame),
    }
    wait([*data.values()])
    client.publish_dataset(**data)
    serve.start(client=client, port=0)
    yield data
    for name in client.list_datasets():
        client.unpublish_dataset(name)
    serve.shutdown(client=client)


def ref(dataset: Any, **place: Any) -> dict[str, Any]:
    return {"ref": {"dataset": dataset, **place}}


def test_over_http(client, published):
    handle = serve.run(Model.bind(), client=client)
    with http_client(serve.url(client=client)) as http:
        body = {
            "deep": [{"frame": ref("frame", partition=2)}],
            "block": ref("array", block=[1, 0]),
            "bag": ref("bag", partition=1),
            "one": ref("one"),
            "second": ref("list", partition=1),
            "also": [ref("one"), {"ref": "no reference"}, {"ref": {"id": 7}}],
        }
        answer = http.post("/", json=body)
        assert answer.status_code == 200, answer.text
        expected = {
            "deep": [{"frame": {"columns": ["x", "y"], "sum": 2 * (8 + 9 + 10 + 11)}}],
            "block": [[8, 9], [12, 13]],
            "bag": [3, 4],
            "one": 2,
            "second": 21,
            "also": [2, {"ref": "no reference"}, {"ref": {"id": 7}}],
        }
        assert answer.json() == expected
        assert http.post("/", json=[1, {"x": None}]).json() == [1, {"x": None}]
        # Errors: JSON with a status of the client's, and nothing about what there is.
        for wrong, status, kind, text in [
            (ref("unknown", partition=0), 404, "DataNotFoundError", "there is no data set 'unknown' for requests"),
            (ref("secret", partition=0), 404, "DataNotFoundError", "there is no data set 'secret' for requests"),
            (ref("never published"), 404, "DataNotFoundError", "there is no data set 'never published' for requests"),
            (ref("lazy", partition=0), 404, "DataNotFoundError", "there is no data set 'lazy' for requests"),
            (ref("frame", partition=3), 404, "DataNotFoundError", "data set 'frame' has no part [3]"),
            (ref("array", block=[0, 2]), 404, "DataNotFoundError", "data set 'array' has no part [0, 2]"),
            (ref("array", block=[0, 0, 0]), 404, "DataNotFoundError", "data set 'array' has no part [0, 0, 0]"),
            (ref("array", block=[0]), 404, "DataNotFoundError", "data set 'array' has no part [0]"),
            (ref("one", partition=0), 404, "DataNotFoundError", "data set 'one' has no part [0]"),
            (ref("frame"), 400, "DataReferenceError", "name one with"),
            (ref("frame", partition=-1), 400, "DataReferenceError", "numbers from 0 on"),
            (ref("frame", partition=True), 400, "DataReferenceError", "numbers from 0 on"),
            (ref("frame", partition="1"), 400, "DataReferenceError", "numbers from 0 on"),
            (ref("frame", partition=0, block=[0]), 400, "DataReferenceError", "members"),
            (ref("frame", part=0), 400, "DataReferenceError", "members"),
            (ref("array", block=[]), 400, "DataReferenceError", "each dimension"),
            (ref(7, partition=0), 400, "DataReferenceError", "a string"),
            ([ref("frame", partition=i) for i in range(21)], 400, "DataReferenceError", "20 parts"),
        ]:
            answer = http.post("/", json={"x": [wrong]})
            found = answer.json()
            assert (answer.status_code, found["type"]) == (status, kind), (wrong, answer.text)
            assert text in found["message"]
            assert "bag" not in answer.text
    # From Python, in a thread of the replica, and in a loop that user code has made.
    assert handle.blocking.remote(body).result(10) == expected
    assert handle.in_another_loop.remote(body).result(10) == expected
    assert handle.futures.remote({"x": ref("array", block=[0, 1])}).result(10) == ("Future", [[2, 3], [6, 7]])
    with pytest.raises(DataNotFoundError, match="no data set 'secret'"):
        handle.blocking.remote(ref("secret")).result(10)
    with pytest.raises(DataReferenceError, match="from 0 on"):
        handle.in_another_loop.remote(ref("frame", partition=-1)).result(10)
    # The option is changed in place.
    instance = handle.identity.remote().result(10)
    handle = serve.run(Model.options(datasets=["secret"]).bind(), client=client)
    assert handle.identity.remote().result(10) == instance
    assert handle.blocking.remote(ref("secret", partition=0)).result(10) == {"columns": ["x", "y"], "sum": 12}
    with pytest.raises(DataNotFoundError):
        handle.blocking.remote(ref("frame", partition=0)).result(10)


def test_nothing_unless_named_and_in_other_applications(client, published):
    serve.run(Unnamed.bind(), name="unnamed", route_prefix="/unnamed", client=client)
    serve.run(Web.bind(), name="web", route_prefix="/web", client=client)
    url = serve.url(client=client)
    answer = httpx.get(f"{url}/unnamed")
    assert (answer.status_code, answer.json()["type"]) == (404, "DataNotFoundError")
    answer = httpx.post(f"{url}/web/", json={"x": ref("frame", partition=0)})
    assert answer.json() == {"x": {"columns": ["x", "y"], "sum": 12}}
    # FastAPI answers what it knows as an exception of HTTP in its own form.
    answer = httpx.post(f"{url}/web/", json={"x": ref("secret", partition=0)})
    assert (answer.status_code, answer.json()) == (404, {"detail": "there is no data set 'secret' for requests"})
    answer = httpx.post(f"{url}/web/", json={"x": ref("frame", partition=-1)})
    assert answer.status_code == 400


def test_another_one_is_published_without_a_lost_request(client, published):
    """Requests get the one or the other while data sets replace each other, and nothing stays behind."""

    def publish(value: int) -> None:
        data = client.persist(da.full(2, value, chunks=1))
        wait(data)
        try:
            client.publish_dataset(changing=data, override=True)
        except TypeError:
            client.unpublish_dataset("changing")
            client.publish_dataset(changing=data)

    publish(0)
    serve.run(Model.bind(), client=client)
    seen = set()
    with http_client(serve.url(client=client)) as http:
        for value in range(1, 4):
            publish(value)
            deadline = time.monotonic() + 10
            while True:
                answer = http.post("/", json=ref("changing", partition=1))
                assert answer.status_code == 200, answer.text
                seen.add(answer.json()[0])
                if answer.json() == [value]:
                    break
                assert time.monotonic() < deadline
    assert max(seen) == 3
    names = {future.key for future in futures_of(client.get_dataset("changing"))}
    deadline = time.monotonic() + 10
    while set(client.run_on_scheduler(_tasks, prefix="full")) != {str(name) for name in names}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _tasks(dask_scheduler: Any, prefix: str) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks if prefix in str(key)]


def _served(dask_worker: Any) -> tuple[int, int]:
    return dask_worker.transfer_outgoing_count_total, dask_worker.transfer_outgoing_bytes_total


def _partition(number: int) -> Any:
    return pandas.DataFrame(np.full((MB, 2), float(number)), columns=["x", "y"])


@serve.deployment
class Sizes:
    def size(self, part):
        return len(part)

    def where(self, part):
        return serve.get_replica_context().worker


@serve.deployment(datasets=["blocks"])
class Passes:
    """Passes what a request refers to on to the deployment behind it, unseen."""

    def __init__(self, sizes: Any) -> None:
        self.sizes = sizes

    async def __call__(self, request):
        body = await serve.resolve(await request.json(), lazy=True)
        return await self.sizes.where.remote(body["x"])


def test_the_call_goes_to_where_the_largest_lies(client):
    """Parts of 16 MB, by handle and over HTTP: nothing moves, or once from worker to worker."""
    one, two = client.nthreads()
    data = {place: client.submit(bytes, 16 * MB, pure=False, workers=[place]) for place in (one, two)}
    wait(data)
    both = Sizes.options(num_replicas=2, max_replicas_per_worker=1).bind()
    handle = serve.run(both, name="both", route_prefix=None, client=client)
    lone = serve.run(Sizes.options(workers=[one]).bind(), name="lone", route_prefix=None, client=client)
    serve.start(client=client, port=0)
    client.publish_dataset(list(data.values()), name="blocks")

    def moved(call: Any) -> tuple[Any, int, int]:
        before = client.run(_served)
        found = call()
        after = client.run(_served)
        counts = [[new - old for new, old in zip(after[at], before[at], strict=True)] for at in (one, two)]
        return found, sum(count for count, _ in counts), sum(size for _, size in counts)

    for place, future in data.items():
        nested = [{"deep": (future,)}]
        assert moved(lambda nested=nested: handle.where.remote(nested).result(20)) == (place, 0, 0)
    array = client.persist(da.random.random((2 * MB, 4), chunks=(MB, 2)))
    frame = client.persist(frames.from_map(_partition, range(4)))
    wait([array, frame])
    parts = [array.blocks[i, j] for i in (0, 1) for j in (0, 1)] + [frame.partitions[i] for i in range(4)]
    holders = [set(client.who_has(future_behind(part)).popitem()[1]) for part in parts]
    assert set.union(*holders) == {one, two}
    for part, places in zip(parts, holders, strict=True):
        found = moved(lambda part=part: handle.where.remote({"x": [part]}).result(20))
        assert found[0] in places
        assert found[1:] == (0, 0)
    far = next(part for part, places in zip(parts, holders, strict=True) if places == {two})
    size, count, nbytes = moved(lambda: lone.size.remote(far).result(20))
    assert (size, count) == (MB, 1)
    assert 16 * MB <= nbytes < 16 * MB + 10_000
    assert moved(lambda: lone.size.remote(data[one]).result(20)) == (16 * MB, 0, 0)
    size, count, nbytes = moved(lambda: lone.size.remote(data[two]).result(20))
    assert (size, count) == (16 * MB, 1)
    assert 16 * MB <= nbytes < 16 * MB + 10_000
    serve.run(Passes.options(workers=[one]).bind(both), name="both", client=client)
    with http_client(serve.url(client=client)) as http:
        for number, place in enumerate(data):
            answer, *counts = moved(lambda number=number: http.post("/", json={"x": ref("blocks", partition=number)}))
            assert (answer.text, counts) == (place, [0, 0])
    client.unpublish_dataset("blocks")
    serve.shutdown(client=client)


def test_outside_of_replicas_and_with_a_wrong_option():
    with pytest.raises(ServeError, match="inside a replica only"):
        serve.resolve({})
    for wrong in ("features", [7], [""]):
        with pytest.raises(ConfigError, match=r"datasets = .*is not valid: it is a list"):
            Model.options(datasets=wrong)


# -- the pure part -----------------------------------------------------------------------------------------------------

_references = st.builds(Reference, st.text(min_size=1, max_size=3), st.lists(st.integers(0, 5), max_size=2).map(tuple))


def _as_json(reference: Reference) -> dict[str, Any]:
    if not reference.place:
        return ref(reference.dataset)
    if len(reference.place) == 1:
        return ref(reference.dataset, partition=reference.place[0])
    return ref(reference.dataset, block=list(reference.place))


_plain = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
_bodies = st.recursive(
    _plain | _references,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["ref", "a", "b"]), inner, max_size=3),
    max_leaves=20,
)


def _map(body: Any, change: Any) -> Any:
    """Apply ``change`` to the references in what Hypothesis made."""
    if isinstance(body, Reference):
        return change(body)
    if isinstance(body, list):
        return [_map(item, change) for item in body]
    return {name: _map(item, change) for name, item in body.items()} if isinstance(body, dict) else body


@given(_bodies)
def test_what_is_found_is_what_is_replaced(body):
    sent = _map(body, _as_json)
    found = find(sent, 1000)
    seen: list[Reference] = []
    _map(body, seen.append)
    assert len(found) == len(set(found))
    assert set(found) == set(seen)
    assert replace(sent, {reference: ("value", reference) for reference in found}) == _map(
        body, lambda reference: ("value", reference)
    )


def test_a_body_that_is_too_deep():
    body: Any = ref("x")
    for _ in range(5000):
        body = [body]
    assert find(body, 1) == [Reference("x")]
    with pytest.raises(BadReferenceError, match="too deep"):
        replace(body, {Reference("x"): 1})
