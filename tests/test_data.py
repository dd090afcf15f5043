"""Large results and data among arguments: who has them, where they go, and what they may take."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import dask
import dask.array as da
import dask.bag as db
import psutil
import pytest
from distributed import Client, Event, Future, Nanny, futures_of, wait
from distributed.utils_test import gen_cluster
from helpers import embedded_client, until, wait_until

import dask_serve as serve
from dask_serve.exceptions import ConfigError, PayloadError, ReplicaLostError, ServeError
from dask_serve.replica.execution import Answer, Execution
from dask_serve.replica.process import ServeProcess
from dask_serve.replica.room import FRACTION, limit_for
from dask_serve.routing.state import RefState
from dask_serve.routing.store import ResultStore, stores
from dask_serve.session.collections import future_behind
from dask_serve.wire.connection import CallerConnection, Connection
from dask_serve.wire.messages import Call, Kind

LARGE = 100_000


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.runs = 0

    def __call__(self, *values):
        self.runs += 1
        return values[0] if len(values) == 1 else values

    def count(self):
        return self.runs

    def shape(self, value):
        """The types and lengths of what came, at any depth."""
        if isinstance(value, (list, tuple, set)):
            return type(value)(map(self.shape, value))
        if isinstance(value, dict):
            return {name: self.shape(content) for name, content in value.items()}
        if dataclasses.is_dataclass(value):
            return self.shape(vars(value))
        if isinstance(value, Box):
            return self.shape(value.content)
        return len(value) if isinstance(value, bytes) else value

    async def gate(self, value):
        await self.open.wait()
        return value

    async def unlock(self):
        self.open.set()

    def large(self, n=LARGE):
        return b"x" * n

    async def nap(self, seconds, n=LARGE):
        await asyncio.sleep(seconds)
        return b"x" * n

    def size(self, *values):
        return sum(map(len, values))

    def type_of(self, value):
        return type(value).__module__.split(".")[0], type(value).__name__

    def computed(self, collection, *others):
        return float(collection.sum().compute())

    def pid(self, *values):
        return os.getpid()

    def fail(self, text):
        raise ValueError(text)


class Box:
    """An object of a class of the user's."""

    def __init__(self, content: Any) -> None:
        self.content = content


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


def inc(x):
    return x + 1


def held() -> int:
    """Bytes in all stores of this process."""
    return sum(store.nbytes for store in stores.values())


def set_limit(limit: int | None) -> int | None:
    """Change the limit of this process, and return the one before."""

    async def change(door: Any) -> int | None:
        before, door.store.limit = door.store.limit, limit
        door.room.look()
        return before

    return max((door.run(change(door)).result(5) for door in ServeProcess.doors()), default=None)


@contextlib.contextmanager
def limited(client: Client, limit: int) -> Iterator[None]:
    """Give all workers a limit for a while."""
    before = client.run(set_limit, limit)
    yield
    for address, its in before.items():
        client.run(set_limit, its, workers=[address])


# -- arguments at any depth --------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_refs_and_futures_at_any_depth(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    (scattered,) = await c.scatter([b"x" * 7])
    small, large = handle.remote("small"), handle.large.remote()
    future = c.submit(inc, 1)
    sent = {
        "list": [small, [large, (future,)]],
        "dict": {"a": {"b": large}},
        "set": {small, "other"},
        "pair": Pair(scattered, [Box(future), Box({"deep": [large]})]),
        "same": (large, large),
    }
    assert await handle.shape.remote(sent) == {
        "list": ["small", [LARGE, (2,)]],
        "dict": {"a": {"b": LARGE}},
        "set": {"small", "other"},
        "pair": {"left": 7, "right": [2, {"deep": [LARGE]}]},
        "same": (LARGE, LARGE),
    }
    assert await handle.shape.remote(value=[[[[[[small]]]]]]) == [[[[[["small"]]]]]]


@gen_cluster(client=True)
async def test_persisted_collections_of_one_key_are_their_value(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    array = da.arange(16, chunks=4).reshape(4, 4).rechunk((2, 2))
    array = c.persist(array)
    one = c.persist(da.ones(5, chunks=5))
    bag = c.persist(db.from_sequence([1, 2, 3], npartitions=1))
    delayed = c.persist(dask.delayed(inc)(1))
    await wait([array, one, bag, delayed])
    tasks = set(s.tasks)
    assert await handle.remote(delayed) == 2
    assert (await handle.remote([{"x": array.blocks[1, 0]}]))[0]["x"].tolist() == [[8, 9], [12, 13]]
    assert (await handle.remote(one)).tolist() == [1.0] * 5
    assert await handle.type_of.remote(array.blocks[0, 1]) == ("numpy", "ndarray")
    assert list(await handle.remote(bag)) == [1, 2, 3]
    # A future of a persisted collection has a key that is a tuple.
    (future,) = futures_of(one)
    assert isinstance(future.key, tuple)
    assert (await handle.remote(future)).tolist() == [1.0] * 5
    assert set(s.tasks) == tasks


@gen_cluster(client=True)
async def test_partitions_of_a_persisted_frame(c, s, a, b):
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe")
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    frame = c.persist(frames.from_pandas(pandas.DataFrame({"x": range(10)}), npartitions=3))
    part = await handle.remote(frame.partitions[1])
    assert isinstance(part, pandas.DataFrame)
    assert part.x.tolist() == [4, 5, 6]
    assert await handle.type_of.remote(frame) == ("dask", "DataFrame")
    # What is still to be computed is a recipe, and of one partition only by chance.
    assert future_behind(frame.partitions[1].x) is None


@gen_cluster(client=True)
async def test_other_collections_are_recipes(c, s, a, b):
    """They are not computed behind anybody's back; the replica may do that."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    lazy = da.ones(8, chunks=4)
    tasks = set(s.tasks)
    assert await handle.type_of.remote(lazy) == ("dask", "Array")
    assert await handle.type_of.remote([lazy.sum()]) == ("builtins", "list")
    assert await handle.type_of.remote(dask.delayed(inc)(1)) == ("dask", "Delayed")
    assert set(s.tasks) == tasks
    assert await handle.computed.remote(lazy) == 8
    persisted = c.persist(da.ones(8, chunks=4))
    assert await handle.type_of.remote(persisted) == ("dask", "Array")
    assert await handle.computed.remote(persisted) == 8
    # The caller lets go of it while the call waits.
    occupied = [handle.gate.remote(1) for _ in range(99)]
    reference = handle.computed.remote(persisted, occupied[0])
    keys = {future.key for future in futures_of(persisted)}
    del persisted
    gc.collect()
    await asyncio.sleep(0.1)
    assert keys <= set(s.tasks)
    await handle.unlock.remote()
    assert await reference == 8
    await until(lambda: not keys & set(s.tasks))


@gen_cluster(client=True)
async def test_persisted_chunks_stay_where_they_are_in_a_recipe(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    persisted = c.persist(da.ones(400_000, chunks=100_000))
    await wait(persisted)
    sent = 0
    send = Connection.send

    def counting(self: Any, kind: int, request: int, header: bytes, parts: Any = ()) -> None:
        nonlocal sent
        sent += sum(map(len, parts))
        send(self, kind, request, header, parts)

    with mock.patch.object(Connection, "send", counting):
        assert await handle.computed.remote(persisted) == 400_000
    assert sent < 100_000


@gen_cluster(client=True)
async def test_what_fails_upstream_fails_downstream_which_does_not_run(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    bad_ref, bad_future = handle.fail.remote("of the ref"), c.submit(int, "of the future")
    for value, message in ((bad_ref, "of the ref"), (bad_future, "of the future")):
        for nested in (value, [{"deep": (value,)}]):
            with pytest.raises(ValueError, match=message):
                await handle.remote(nested)
    assert await handle.count.remote() == 0


@gen_cluster(client=True)
async def test_pending_ones_are_waited_for(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    slow = c.submit(lambda: time.sleep(0.2) or "late")
    downstream = handle.remote([handle.gate.remote("open"), {"x": slow}])
    assert await slow == "late"
    assert downstream.status == "pending"
    await handle.unlock.remote()
    assert await downstream == ["open", {"x": "late"}]


@gen_cluster(client=True)
async def test_cancelled_and_lost_futures_are_clear_errors(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    event = Event("test", client=c)
    future = c.submit(lambda: event.wait(30))
    downstream = handle.remote([future])
    await until(lambda: a.state.executing_count or b.state.executing_count)
    await future.cancel()
    await event.set()
    with pytest.raises(PayloadError, match=f"{future.key}.*cancelled.*again"):
        await downstream
    with pytest.raises(PayloadError, match="cancelled"):
        await handle.remote(future)
    # Scattered, and gone with its only holder while the call was on its way.
    (scattered,) = await c.scatter(["value"], workers=[a.address], hash=False)
    with mock.patch.object(c.scheduler, "who_has", mock.AsyncMock(return_value={})):
        unit = next(unit for worker in (a, b) for unit in ServeProcess.units_of(worker))
        with pytest.raises(ServeError, match="no longer on the cluster"):
            await unit._value_of("never there")
    assert await handle.remote(scattered) == "value"
    assert await handle.count.remote() == 1


@gen_cluster(client=True, nthreads=[("", 1)] * 3)
async def test_a_key_that_is_computed_again_is_waited_for(c, s, a, b, d):
    """Its worker died; Dask computes it again, and the call gets it."""
    handle = await serve.run(Model.options(workers=[a.address]).bind(), route_prefix=None, client=c)
    future = c.submit(lambda: time.sleep(0.3) or "again", workers=[b.address, d.address], allow_other_workers=False)
    await wait(future)
    holder = b if future.key in b.data else d
    await holder.close(nanny=False)
    assert await handle.remote([future]) == ["again"]


# -- routing to data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(client):
    """A client, and a handle of a deployment with one replica in each of two processes."""
    app = Model.options(num_replicas=2, max_replicas_per_worker=1).bind()
    yield client, serve.run(app, route_prefix=None, client=client)
    serve.shutdown(client=client)


def served(dask_worker: Any) -> int:
    return sum(door.served for door in ServeProcess.doors())


def outgoing(dask_worker: Any) -> int:
    return dask_worker.transfer_outgoing_bytes_total


@contextlib.contextmanager
def traffic(client: Client) -> Iterator[dict[str, int]]:
    """Count the bytes that go from door to door, from worker to worker, and through this process."""
    counts = {"doors": -sum(client.run(served).values()), "workers": -sum(client.run(outgoing).values()), "caller": 0}
    receive, send = CallerConnection.data_received, CallerConnection.send

    def receiving(self: Any, data: bytes) -> None:
        counts["caller"] += len(data)
        receive(self, data)

    def sending(self: Any, kind: int, request: int, header: bytes, parts: Any = ()) -> None:
        counts["caller"] += len(header) + sum(map(len, parts))
        send(self, kind, request, header, parts)

    with (
        mock.patch.object(CallerConnection, "data_received", receiving),
        mock.patch.object(CallerConnection, "send", sending),
    ):
        yield counts
    counts["doors"] += sum(client.run(served).values())
    counts["workers"] += sum(client.run(outgoing).values())


def test_a_call_goes_to_the_process_that_has_its_argument(two):
    client, handle = two
    upstream = [handle.large.remote(10 * LARGE) for _ in range(20)]
    wait(upstream)
    assert len({ref._local.outcome.stored.process for ref in upstream}) == 2
    with traffic(client) as moved:
        assert [handle.size.remote([ref], ref, b"small").result(10) for ref in upstream]
        assert sum(ref.result(10) for ref in [handle.size.remote(ref) for ref in upstream]) == 200 * LARGE
    assert moved["doors"] == moved["workers"] == 0
    assert moved["caller"] < 50_000
    # The largest one decides.
    here, there = (
        next(ref for ref in upstream if ref._local.outcome.stored.process == process)
        for process in {ref._local.outcome.stored.process for ref in upstream}
    )
    larger = [handle.large.remote(11 * LARGE) for _ in range(10)]
    wait(larger)
    with traffic(client) as moved:
        for ref in larger:
            other = there if ref._local.outcome.stored.process == here._local.outcome.stored.process else here
            assert handle.size.remote(other, ref).result(10) == 21 * LARGE
    assert 100 * LARGE <= moved["doors"] < 101 * LARGE
    assert moved["caller"] < 50_000


def test_one_move_from_worker_to_worker_otherwise(two):
    client, handle = two
    ref = handle.large.remote(10 * LARGE)
    wait(ref)
    holder = ref._session.worker_of(ref._local.outcome.stored.process)
    (other,) = [address for address in client.nthreads() if address not in holder]
    far = serve.run(Model.options(workers=[other]).bind(), name="far", route_prefix=None, client=client)
    with traffic(client) as moved:
        assert far.shape.remote({"x": ref}).result(10) == {"x": 10 * LARGE}
    assert 10 * LARGE <= moved["doors"] < 10 * LARGE + 1000
    assert moved["workers"] == 0
    assert moved["caller"] < 5000


def test_keys_attract_calls_too(two):
    client, handle = two
    places = list(client.nthreads())
    futures = [client.submit(bytes, 10 * LARGE + i, workers=[places[i % 2]]) for i in range(10)]
    wait(futures)
    pids = client.run(os.getpid)
    with traffic(client) as moved:
        found = [handle.pid.remote([future]).result(10) for future in futures]
    assert found == [pids[places[i % 2]] for i in range(10)]
    assert moved["workers"] == moved["doors"] == 0
    assert moved["caller"] < 50_000
    # A promoted ref is such a key.
    ref = handle.large.remote(10 * LARGE)
    wait(ref)
    process = ref._session.worker_of(ref._local.outcome.stored.process)[0]
    assert client.submit(len, ref).result(10) == 10 * LARGE
    holders = client.who_has([ref])[ref.key]
    with traffic(client) as moved:
        assert handle.pid.remote(ref).result(10) in {pids[address] for address in holders}
    assert process in pids
    assert moved["doors"] == moved["workers"] == 0


def test_a_call_goes_elsewhere_when_that_replica_is_full(client):
    app = Model.options(num_replicas=2, max_replicas_per_worker=1, max_ongoing_requests=1).bind()
    handle = serve.run(app, route_prefix=None, client=client)
    ref = handle.large.remote(10 * LARGE)
    wait(ref)
    occupied = handle.gate.remote(ref)
    time.sleep(0.1)
    assert handle.size.remote(ref).result(10) == 10 * LARGE
    assert not occupied.done()
    occupied.cancel()
    serve.shutdown(client=client)


# -- the threshold -----------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_threshold_is_changed_in_place(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    replica = await handle.pid.remote()

    async def is_stored(n: int) -> bool:
        ref = handle.large.remote(n)
        await wait(ref)
        return ref._local.outcome.stored is not None

    assert not await is_stored(60_000)
    assert await is_stored(70_000)
    before = (await serve.status(client=c)).applications["default"].deployments["Model"].replicas
    for threshold, small, large in ((1000, 900, 1100), (1_000_000, 900_000, 1_100_000), (0, None, 0)):
        await serve.run(Model.options(inline_result_bytes=threshold).bind(), route_prefix=None, client=c)
        if small is not None:
            assert not await is_stored(small)
        assert await is_stored(large)
    assert (await serve.status(client=c)).applications["default"].deployments["Model"].replicas == before
    assert await handle.pid.remote() == replica
    with pytest.raises(ConfigError, match="inline_result_bytes"):
        Model.options(inline_result_bytes=-1)


# -- the limit ---------------------------------------------------------------------------------------------------------


def test_store_adds_up_from_all_threads():
    store = ResultStore(limit=100)
    names = [store.put([b"x" * 10, b"y"]) for _ in range(5)]
    assert (len(store), store.nbytes, store.settle(), store.tight) == (5, 55, 55, True)
    freed = []
    store.freed = lambda: freed.append(1)
    for name in [*names, *names]:
        store.drop(name)
    assert (len(store), store.nbytes, len(freed), store.tight) == (0, 0, 5, False)


@gen_cluster(nthreads=[("", 1)], worker_kwargs={"memory_limit": "1 GiB"})
async def test_limit_is_read_from_dasks_configuration(s, a):
    assert limit_for(a) == int(FRACTION * 2**30)
    for setting, limit in (("0.5", 2**29), (0.5, 2**29), ("100 MB", 10**8), (12345, 12345), (0, None), ("0", None)):
        with dask.config.set({"serve.results-limit": setting}):
            assert limit_for(a) == limit
    for setting in ("much", -5, [1]):
        with dask.config.set({"serve.results-limit": setting}), pytest.raises(ConfigError, match="results-limit"):
            limit_for(a)
    a.memory_manager.memory_limit = None
    assert limit_for(a) > 0


class Peak:
    """The most bytes that stores held, by looking often."""

    def __init__(self) -> None:
        self.bytes = 0
        self.task = asyncio.create_task(self.watch())

    async def watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, held())
            await asyncio.sleep(0.001)


@gen_cluster(client=True)
async def test_results_wait_for_room_at_the_router(c, s, a, b):
    """The caller keeps all refs and fetches one after the other: each value moves to its ref, and makes room."""
    handle = await serve.run(Model.options(max_ongoing_requests=5).bind(), route_prefix=None, client=c)
    set_limit(10 * LARGE)
    peak = Peak()
    refs = [handle.large.remote() for _ in range(200)]
    await until(lambda: held() > 9 * LARGE)
    await asyncio.sleep(0.3)
    assert sum(ref.done() for ref in refs) < 20
    assert [len(await ref) for ref in refs] == [LARGE] * 200
    assert peak.bytes < 20 * LARGE
    # Most values are here now, and can be used again.
    assert held() <= 6 * LARGE
    assert sum(ref._local.outcome.stored is None for ref in refs) > 150
    assert await handle.size.remote(*refs) == 200 * LARGE
    assert sum(await c.gather(c.map(len, refs[:10]))) == 10 * LARGE
    peak.task.cancel()


def test_results_wait_for_room_between_processes(two):
    client, handle = two
    limit = 10 * LARGE
    with limited(client, limit):
        refs = [handle.large.remote() for _ in range(300)]
        assert [len(ref.result(30)) for ref in refs] == [LARGE] * 300
        # The first hundred of each replica were admitted before anybody knew how large results are.
        assert sum(client.run(held).values()) <= limit
        again = [handle.large.remote() for _ in range(300)]
        wait_until(lambda: sum(client.run(held).values()) > limit)
        time.sleep(0.3)
        assert all(nbytes <= limit + 2 * LARGE for nbytes in client.run(held).values())
        assert [len(ref.result(30)) for ref in again] == [LARGE] * 300
        del refs, again
        wait_until(lambda: not sum(client.run(held).values()))


@gen_cluster(client=True)
async def test_values_are_copied_while_there_is_room(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    set_limit(100 * LARGE)
    refs = [handle.large.remote() for _ in range(20)]
    assert sum([len(await ref) for ref in refs]) == 20 * LARGE
    assert held() >= 20 * LARGE


@gen_cluster(client=True)
async def test_a_single_result_may_be_larger_than_the_limit(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    set_limit(LARGE)
    refs = [handle.large.remote(5 * LARGE) for _ in range(5)]
    assert [len(await ref) for ref in refs] == [5 * LARGE] * 5
    peak = Peak()
    refs = [handle.large.remote(5 * LARGE) for _ in range(20)]
    assert [len(await ref) for ref in refs] == [5 * LARGE] * 20
    # Each alone.
    assert peak.bytes < 11 * LARGE
    peak.task.cancel()


@gen_cluster(client=True)
async def test_promotion_makes_room(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    set_limit(5 * LARGE)
    refs = [handle.large.remote() for _ in range(200)]
    assert sum(map(len, await c.gather(refs))) == 200 * LARGE
    assert held() == 0


@pytest.mark.slow
@gen_cluster(client=True)
async def test_chains_get_through(c, s, a, b):
    """What takes a result for the first time makes room, and goes before what would need more of it."""
    for options in ({}, {"max_ongoing_requests": 1}, {"num_replicas": 2, "max_ongoing_requests": 3}):
        app = Model.options(**options).bind()
        handle = await serve.run(app, name=f"app{len(options)}", route_prefix=None, client=c)
        set_limit(5 * LARGE)
        # The same deployment: those that wait for room stand in the same queue as those that make it.
        begun = time.monotonic()
        sizes = [handle.size.remote(handle.large.remote()) for _ in range(150)]
        assert [await size for size in sizes] == [LARGE] * 150
        steps = [handle.remote(handle.remote(handle.large.remote())) for _ in range(60)]
        assert sum([len(await step) for step in steps]) == 60 * LARGE
        # Nobody waited for the second after which one is let in.
        assert time.monotonic() - begun < 15
        del sizes, steps
        await until(lambda: not held())


@serve.deployment
class Caller:
    """Calls another deployment while it runs, and waits for that."""

    def __init__(self, model) -> None:
        self.model = model

    async def both(self, n):
        inner = await self.model.large.remote(n)
        return inner + await self.model.large.remote(n)

    async def __call__(self, request):
        inner = await self.model.large.remote(LARGE)
        return str(len(inner))


@gen_cluster(client=True)
async def test_requests_that_wait_for_others_get_through(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    set_limit(5 * LARGE)
    refs = [handle.both.remote(LARGE) for _ in range(100)]
    begun = time.monotonic()
    assert sum([len(await ref) for ref in refs]) == 200 * LARGE
    assert time.monotonic() - begun < 15
    del refs
    await until(lambda: not held())


def test_http_is_not_refused(client):
    import urllib.request

    handle = serve.run(Caller.bind(Model.bind()), client=client)
    model = serve.get_deployment_handle("Model", "default", client=client)
    assert len(model.large.remote().result(10)) == LARGE
    with limited(client, LARGE):
        refs = [model.large.remote(3 * LARGE) for _ in range(10)]
        wait_until(lambda: any(ref.done() for ref in refs))
        url = serve.status(client=client).url
        for _ in range(5):
            begun = time.monotonic()
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.read() == str(LARGE).encode()
            assert time.monotonic() - begun < 0.9
        assert not all(ref.done() for ref in refs)
        assert sum(len(ref.result(10)) for ref in refs) == 30 * LARGE
        assert len(handle.both.remote(LARGE).result(10)) == 2 * LARGE
    serve.shutdown(client=client)


@pytest.mark.slow
@gen_cluster(client=True)
async def test_nothing_stands_still_for_ever(c, s, a, b):
    """The caller waits for all, and fetches none: one after the other is let in, and the log says why."""
    from distributed.utils_test import captured_logger

    handle = await serve.run(Model.options(max_ongoing_requests=2).bind(), route_prefix=None, client=c)
    await handle.large.remote()
    set_limit(2 * LARGE)
    with captured_logger("dask_serve.door") as log:
        refs = [handle.large.remote() for _ in range(6)]
        await asyncio.wait_for(wait(refs), 30)
    assert "serve.results-limit" in log.getvalue()
    assert log.getvalue().count("\n") == 1
    assert held() > 5 * LARGE
    # As soon as there is room nothing is held back any more.
    del refs
    refs = [handle.large.remote() for _ in range(20)]
    begun = time.monotonic()
    assert sum([len(await ref) for ref in refs]) == 20 * LARGE
    assert time.monotonic() - begun < 5


@gen_cluster(client=True)
async def test_small_results_are_not_held_back(c, s, a, b):
    """Of a deployment that never left a large result in the store."""
    full = await serve.run(Model.bind(), name="full", route_prefix=None, client=c)
    light = await serve.run(Model.bind(), name="light", route_prefix=None, client=c)
    kept = full.large.remote()
    await wait(kept)
    set_limit(LARGE // 2)
    await asyncio.wait_for(c.gather([light.remote(i) for i in range(50)]), 5)


@gen_cluster(client=True)
async def test_one_value_fetched_by_many_at_once(c, s, a, b):
    """While it moves to its ref."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    for _ in range(10):
        ref = handle.large.remote()
        await wait(ref)
        set_limit(1)

        async def read(ref: Any = ref) -> int:
            return len(await ref)

        elsewhere = [asyncio.to_thread(asyncio.run, read()) for _ in range(3)]
        chained = [handle.size.remote(ref), c.submit(len, ref)]
        assert await asyncio.gather(read(), *elsewhere, read(), *chained) == [LARGE] * 7
        set_limit(None)
        del ref, read, elsewhere, chained
    await until(lambda: not held())


def test_one_value_fetched_by_many_processes_at_once(two):
    client, handle = two
    for number in range(8):
        ref = handle.large.remote()
        wait(ref)
        client.run(set_limit, 1)
        steps: list[Callable[[], Any]] = [
            lambda ref=ref: handle.size.remote(ref).result(10),
            lambda ref=ref: len(ref.result(10)),
            lambda ref=ref: client.submit(len, ref).result(10),
            lambda ref=ref: asyncio.run(_length(ref)),
        ]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(step) for step in steps[number % 4 :] + steps[: number % 4]]
            assert [future.result() for future in found] == [LARGE] * 4
        client.run(set_limit, None)
    del ref, steps, found
    wait_until(lambda: not sum(client.run(held).values()))


async def _length(ref: Any) -> int:
    return len(await ref)


# -- the status --------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_status_shows_what_is_held(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    refs = [handle.large.remote() for _ in range(3)]
    await wait(refs)

    async def worker() -> Any:
        workers = (await serve.status(client=c)).workers
        return workers[0] if workers else None

    deadline = time.monotonic() + 10
    while (found := await worker()) is None or found.results != 3:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
    assert 3 * LARGE < found.result_bytes < 3 * LARGE + 1000
    assert found.limit == limit_for(a)
    assert found.address in {a.address, b.address}
    assert found.promoted == 0
    assert f"worker {found.address} holds 3 results" in str(await serve.status(client=c))
    assert len((await c.gather(refs))[0]) == LARGE
    del refs
    while (found := await worker()).results or found.promoted != 3:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
    assert found.result_bytes == 0


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait_first", [True, False])
def test_what_a_killed_worker_held_is_lost_at_once(wait_first):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, worker_class=Nanny, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        address, survivor = client.nthreads()
        handle = serve.run(Model.options(workers=[address]).bind(), route_prefix=None, client=client)
        far = serve.run(Model.options(workers=[survivor]).bind(), name="far", route_prefix=None, client=client)
        refs = [handle.large.remote() for _ in range(6)]
        promoted = handle.large.remote()
        wait([*refs, promoted])
        kept = far.large.remote()
        wait(kept)
        pid = handle.pid.remote().result(10)
        if not wait_first:
            waiting = far.remote([refs[4], far.gate.remote(1)])
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        attempts: list[Callable[[], Any]] = [
            lambda: refs[0].result(10),
            lambda: asyncio.run(_length(refs[1])),
            lambda: far.size.remote([refs[2]]).result(10),
            lambda: client.gather(refs[3]),
            lambda: client.submit(len, refs[5]).result(10),
        ]
        if not wait_first:
            far.unlock.remote().result(10)
            attempts.append(lambda: waiting.result(10))
        for attempt in attempts:
            with pytest.raises(ReplicaLostError):
                attempt()
        assert time.monotonic() - begun < 5
        assert len(kept.result(10)) == LARGE
        serve.shutdown(client=client)


@gen_cluster(client=True)
async def test_the_end_of_a_replica_loses_no_result(c, s, a, b):
    first = await serve.run(Model.options(num_replicas=2).bind(), route_prefix=None, client=c)
    other = await serve.run(Model.bind(), name="other", route_prefix=None, client=c)

    async def results(count: int = 8) -> list[Any]:
        refs = [first.large.remote() for _ in range(count)]
        await wait(refs)
        return refs

    async def all_there(refs: list[Any]) -> None:
        direct, chained, gathered, promoted = (refs[i::4] for i in range(4))
        assert [len(await ref) for ref in direct] == [LARGE] * len(direct)
        assert [await other.size.remote(ref) for ref in chained] == [LARGE] * len(chained)
        assert list(map(len, await c.gather(gathered))) == [LARGE] * len(gathered)
        assert await c.gather(c.map(len, promoted)) == [LARGE] * len(promoted)

    refs = await results()
    await serve.run(Model.options(num_replicas=1).bind(), route_prefix=None, client=c)
    await all_there(refs)
    refs = await results()
    await serve.run(Model.options(version="2").bind(), route_prefix=None, client=c)
    await all_there(refs)
    refs = await results()
    await serve.delete("default", client=c)
    await all_there(refs)


@pytest.mark.parametrize(
    ("left", "closed", "answered", "stays"),
    [(False, False, False, True), (True, False, True, False), (False, True, True, True), (False, True, False, False)],
)
def test_results_that_come_late_stay_only_for_those_who_know_of_them(left, closed, answered, stays):
    """What a user thread hands over after its request was answered as cancelled, or its replica was stopped."""

    def late() -> int | None:
        async def on_mail(door: Any, core: Any) -> int:
            (connection,) = door.connections
            call = Call(core.id, "large", "id", None, False)
            execution = Execution(core, connection, 99_999, call, (), time.monotonic())
            core.admission.admit(connection, False)
            core._active += 1
            execution.left, execution.answered, core.closed = left, answered, closed
            name = door.store.put([b"x" * LARGE])
            door._on_mail((execution, Answer(Kind.RESULT, stored=name, nbytes=LARGE)))
            assert (name in connection.stored) == bool(len(door.store))
            return len(door.store)

        for door in ServeProcess.doors():
            for core in door.replicas.values():
                return door.run(on_mail(door, core)).result(5)
        return None

    # It is harmed: the request that is put there never ends by itself.
    with embedded_client(1, 1) as client:
        impatient = Model.options(graceful_shutdown_timeout_s=0.5)
        handle = serve.run(impatient.bind(), route_prefix=None, client=client)
        assert handle.remote(1).result(10) == 1
        assert [count for count in client.run(late).values() if count is not None] == [stays]
        serve.shutdown(client=client)


def test_the_end_of_all_replicas_of_a_process_loses_no_result(two):
    client, handle = two
    refs = [handle.large.remote() for _ in range(10)]
    wait(refs)
    serve.delete("default", client=client)
    assert [len(ref.result(10)) for ref in refs[:5]] == [LARGE] * 5
    assert client.gather(client.map(len, refs[5:])) == [LARGE] * 5
    del refs
    wait_until(lambda: not sum(client.run(held).values()))


# -- what is left ------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process has, after what is garbage has gone."""
    gc.collect()
    return psutil.Process().memory_info().rss


def left_over() -> dict[str, int]:
    """What this process has of requests and results."""
    gc.collect()
    kinds = (serve.DeploymentResponse, RefState, Execution, Future)
    objects = [type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds)]
    counts = {name: objects.count(name) for name in set(objects)}
    doors = ServeProcess.doors()
    counts["stored"] = sum(len(store) for store in stores.values())
    counts["owned"] = sum(len(store._owners) for store in stores.values())
    counts["running"] = sum(core.admission.running for door in doors for core in door.replicas.values())
    counts["executions"] = sum(len(connection.executions) for door in doors for connection in door.connections)
    return {name: count for name, count in counts.items() if count}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hundred_thousand_calls_leave_nothing(two):
    """Small results, large ones, promoted ones and errors: neither objects nor memory, in any of the processes."""
    client, handle = two

    def some(count: int) -> None:
        refs = [handle.remote(i) for i in range(count * 90 // 100)]
        refs += [handle.large.remote() for _ in range(count * 4 // 100)]
        failed = [handle.fail.remote("x" * 1000) for _ in range(count * 5 // 100)]
        promoted = [handle.remote(1), handle.large.remote()] * (count // 200)
        assert len(client.gather(client.map(_length_or_one, promoted, pure=False))) == len(promoted)
        wait(refs)
        assert sum(len(ref.result()) for ref in refs[-10:]) == 10 * LARGE
        assert handle.size.remote(*refs[-10:]).result() == 10 * LARGE
        for ref in failed:
            with contextlib.suppress(ValueError):
                ref.result()

    def memory() -> dict[str, int]:
        workers = {f"worker {i}": used for i, used in enumerate(client.run(resident).values())}
        return {"client": resident(), "scheduler": client.run_on_scheduler(resident), **workers}

    some(10_000)
    tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    for _ in range(4):
        some(2500)
    before = memory()
    for _ in range(32):
        some(2500)
    # The ends of promoted refs are looked after once a second.
    wait_until(lambda: not left_over())
    wait_until(lambda: not any(client.run(left_over).values()))
    wait_until(lambda: client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) <= tasks)
    assert not client.futures
    after = memory()
    grown = {name: (after[name] - before[name]) / 2**20 for name in before}
    print("\nMiB, and what 80,000 calls added:", {name: (before[name] >> 20, round(grown[name], 1)) for name in before})
    assert max(grown.values()) < 25, grown


def _length_or_one(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else 1
