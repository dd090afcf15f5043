"""Batches: of plain functions, and in real replicas."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import random
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest
from distributed import Client
from helpers import local_client

import dask_serve as serve
from dask_serve.context import RequestContext, request_context
from dask_serve.exceptions import ArgumentsError, BatchError, ConfigError
from dask_serve.replica.host import Host, enter_host
from dask_serve.replica.pool import Pool


def gather(*awaitables, **kwargs):
    async def run():
        return await asyncio.wait_for(asyncio.gather(*[make() for make in awaitables], **kwargs), 30)

    return asyncio.run(run())


# -- plain functions ---------------------------------------------------------------------------------------------------


class Recorder:
    """Methods of all kinds, and the batches that they got."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    @serve.batch(max_batch_size=8)
    def double(self, values):
        self.batches.append(list(values))
        self.gate.wait(10)
        if "poison" in values:
            raise ValueError("poison")
        return [value * 2 for value in values]

    @serve.batch(max_batch_size=8)
    async def adouble(self, values):
        self.batches.append(list(values))
        await asyncio.sleep(0.005)
        if "poison" in values:
            raise ValueError("poison")
        return [value * 2 for value in values]

    @serve.batch(bisect=False)
    async def together(self, values):
        self.batches.append(list(values))
        raise ValueError("all")

    @serve.batch
    async def scaled(self, values, scale, *, shift=None):
        self.batches.append((list(values), list(scale), shift))
        return [value * factor for value, factor in zip(values, scale, strict=True)]


@pytest.mark.parametrize("method", ["double", "adouble"])
def test_calls_of_a_tick_share_batches(method):
    recorder = Recorder()
    call = getattr(recorder, method)

    async def run():
        assert await asyncio.gather(*[call(i) for i in range(20)]) == [2 * i for i in range(20)]
        return call.get_batch_counts()

    counts = asyncio.run(run())
    assert [len(batch) for batch in recorder.batches] == [8, 8, 4]
    assert (counts["calls"], counts["batches"], counts["largest"], counts["waiting"]) == (20, 3, 8, 0)


@pytest.mark.parametrize("method", ["double", "adouble"])
def test_one_poisoned_call_fails_alone(method):
    recorder = Recorder()
    call = getattr(recorder, method)
    values = [0, 1, 2, "poison", 4, 5, 6, 7]
    found = gather(*[lambda value=value: call(value) for value in values], return_exceptions=True)
    assert repr(found.pop(3)) == "ValueError('poison')"
    assert found == [0, 2, 4, 8, 10, 12, 14]
    assert [len(batch) for batch in recorder.batches] == [8, 4, 2, 2, 1, 1, 4]


def test_all_of_a_batch_fail_without_bisection():
    recorder = Recorder()
    found = gather(*[lambda i=i: recorder.together(i) for i in range(3)], return_exceptions=True)
    assert [str(error) for error in found] == ["all"] * 3
    assert len(recorder.batches) == 1


def test_threads_run_batches_themselves():
    recorder = Recorder()
    recorder.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(recorder.double, 0)
        deadline = time.monotonic() + 10
        while not recorder.batches and time.monotonic() < deadline:
            time.sleep(0.001)
        others = [pool.submit(recorder.double, i) for i in range(1, 9)]
        while recorder.double.get_batch_counts()["waiting"] < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        recorder.gate.set()
        assert [call.result(10) for call in [first, *others]] == [2 * i for i in range(9)]
    assert [len(batch) for batch in recorder.batches] == [1, 8]


def test_parameters():
    recorder = Recorder()
    calls = [lambda: recorder.scaled(1, 2), lambda: recorder.scaled(scale=3, values=4, shift=5)]
    assert gather(*calls) == [2, 12]
    assert gather(lambda: recorder.scaled(1, 2)) == [2]
    assert recorder.batches == [([1, 4], [2, 3], [None, 5]), ([1], [2], None)]
    with pytest.raises(ArgumentsError, match=r"scaled cannot be called so: missing .*'scale'"):
        gather(lambda: recorder.scaled(1))


@serve.batch
def wrong(values):
    kind = values[0]
    return {"short": [1], "none": None, "set": {1, 2}, "dict": {0: 1, 1: 2}, "text": "ab"}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "given 2 calls and returned 1 results"),
        ("none", "not a NoneType"),
        ("set", "says nothing of whose"),
        ("dict", "says nothing of whose"),
        ("text", "not a str"),
    ],
)
def test_wrong_results_are_nobodys(kind, message):
    found = gather(lambda: wrong(kind), lambda: wrong(kind), return_exceptions=True)
    assert all(isinstance(error, BatchError) and message in str(error) for error in found)


@pytest.mark.parametrize("empty", [(), {}])
@pytest.mark.parametrize("stack", [True, "rows"])
def test_results_with_nothing_in_them_are_nobodys(stack, empty):
    @serve.batch(stack=stack)
    def nothing(x):
        return empty

    found = gather(*[lambda: nothing(np.ones(1))] * 2, return_exceptions=True)
    assert all(isinstance(error, BatchError) and "returned an empty" in str(error) for error in found)
    assert nothing.get_batch_counts()["waiting"] == 0


def test_frames_are_no_lists_of_rows():
    pandas = pytest.importorskip("pandas")

    @serve.batch
    def frame(values):
        return pandas.DataFrame({"a": values, "b": values})

    found = gather(lambda: frame(1), lambda: frame(2), return_exceptions=True)
    assert all(isinstance(error, BatchError) and "entries are its columns" in str(error) for error in found)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_ends_programs_ends_no_loop(kind):
    @serve.batch
    async def leave(values):
        raise kind(3)

    @serve.batch
    async def stream(values):
        raise kind(3)
        yield values

    async def first(stream):
        return await anext(stream)

    async def caught(awaitable):
        try:
            await awaitable
        except kind as error:
            return type(error)

    assert gather(lambda: caught(leave(1)), lambda: caught(leave(2)), lambda: caught(first(stream(3)))) == [kind] * 3


def test_all_callers_get_the_same_short_traceback():
    @serve.batch(bisect=False)
    async def fail(values):
        raise ValueError(values)

    async def depth():
        try:
            await fail(1)
        except ValueError as error:
            return len(traceback.extract_tb(error.__traceback__))

    assert len(set(gather(*[depth] * 20))) == 1


def test_a_batch_cannot_wait_for_itself():
    """Nor by way of another one; outside of requests as well."""

    @serve.batch
    def itself(values):
        return [itself(value) for value in values]

    with pytest.raises(serve.ServeError, match="would wait for itself"):
        itself(1)

    @serve.batch
    async def there(values):
        return [await back(value) for value in values]

    @serve.batch
    async def back(values):
        return [await there(value) for value in values]

    errors = gather(lambda: there(1), lambda: there(2), return_exceptions=True)
    assert ["would wait for itself" in str(error) for error in errors] == [True, True]


@pytest.mark.parametrize("in_thread", [True, False])
def test_who_has_a_deadline_waits_for_others_for_half_of_the_time(in_thread):
    @serve.batch(batch_wait_timeout_s=60)
    def size(values):
        return [len(values)] * len(values)

    def late():
        request_context.set(RequestContext("late", time.monotonic() + 1))
        return size(1)

    async def run():
        host = Host(asyncio.get_running_loop(), Pool(1, "pool"))
        enter_host(host)
        context = contextvars.copy_context()
        begun = time.monotonic()
        call = host.pool.run(lambda: context.run(late)) if in_thread else late()
        assert await asyncio.wait_for(call, 5) == 1
        assert 0.4 < time.monotonic() - begun < 0.95
        host.pool.stop()

    asyncio.run(run())


def test_waiting_for_others_and_other_settings():
    recorder = Recorder()
    call = recorder.adouble

    async def two_at_a_distance():
        first = asyncio.ensure_future(call(1))
        await asyncio.sleep(0.01)
        return await asyncio.gather(first, call(2))

    call.set_batch_wait_timeout_s(0.2)

    async def settings():
        began = time.monotonic()
        assert await two_at_a_distance() == [2, 4]
        assert 0.15 < time.monotonic() - began < 5
        recorder.adouble.set_max_batch_size(2)
        began = time.monotonic()
        assert await two_at_a_distance() == [2, 4]
        assert time.monotonic() - began < 0.15

    asyncio.run(settings())
    assert recorder.batches == [[1, 2]] * 2
    with pytest.raises(ConfigError, match="max_batch_size = 0 is not valid"):
        call.set_max_batch_size(0)


def test_sizes_of_calls():
    sizes = []

    @serve.batch(max_batch_size=10, batch_size_fn=lambda texts: sum(map(len, texts)))
    async def lengths(texts):
        sizes.append([len(text) for text in texts])
        return [len(text) for text in texts]

    assert gather(*[lambda n=n: lengths("x" * n) for n in (4, 6, 20, 3, 3)]) == [4, 6, 20, 3, 3]
    assert sizes == [[4, 6], [20], [3, 3]]


@pytest.mark.parametrize("size", [None, -1, float("nan"), float("inf"), "much"])
def test_sizes_that_are_none(size):
    ran = []

    @serve.batch(batch_size_fn=lambda values: size)
    async def sized(values):
        ran.append(values)
        return values

    with pytest.raises(ConfigError, match=r"batch_size_fn of sized returned .* a number, 0 or more"):
        gather(lambda: sized(1))
    assert not ran


def test_arrays_are_stacked_and_split():
    shapes = []

    @serve.batch(stack=True)
    def total(x, weight):
        shapes.append(x.shape)
        return {"sum": (x.sum(axis=1) * weight), "first": x[:, 0]}

    found = gather(*[lambda n=n: total(np.full(1 + n % 2, n), 2.0) for n in range(4)])
    assert [(float(one["sum"]), int(one["first"])) for one in found] == [(0, 0), (4, 1), (4, 2), (12, 3)]
    assert sorted(shapes) == [(2, 1), (2, 2)]

    @serve.batch(stack="rows", max_batch_size=6)
    def rows(x):
        shapes.append(x.shape)
        return x + 1, x[:, 0]

    shapes.clear()
    found = gather(*[lambda n=n: rows(np.full((n, 2), n)) for n in (1, 2, 3, 4)])
    for n, (whole, column) in zip((1, 2, 3, 4), found, strict=True):
        np.testing.assert_array_equal(whole, np.full((n, 2), n + 1))
        np.testing.assert_array_equal(column, np.full(n, n))
    assert shapes == [(6, 2), (4, 2)]


# -- methods that take rows anyway -------------------------------------------------------------------------------------


def rows_method(batch, **options):
    """The same code, with batches and without."""
    sizes = []

    @serve.method(batch=batch, **options)
    async def lengths(texts, unit="chars"):
        sizes.append((len(texts), unit))
        await asyncio.sleep(0.01)
        if "poison" in texts:
            raise ValueError("poison")
        return {"n": [len(text) for text in texts], "array": np.arange(len(texts))}

    return lengths, sizes


@pytest.mark.parametrize("batch", [False, True])
def test_callers_do_not_see_whether_calls_share_batches(batch):
    lengths, sizes = rows_method(batch, max_batch_size=8)
    calls = [["a"], ["bb", "ccc"], [], ["dddd"]]
    found = gather(*[lambda texts=texts: lengths(texts) for texts in calls], lambda: lengths(["e"], unit="words"))
    assert [one["n"] for one in found] == [[1], [2, 3], [], [4], [1]]
    assert [len(one["array"]) for one in found] == [1, 2, 0, 1, 1]
    expected = [(4, "chars"), (1, "words")] if batch else [(1, "chars"), (2, "chars"), (0, "chars"), (1, "chars")]
    assert sizes[: len(expected)] == expected


def test_a_call_with_more_rows_than_a_batch_takes():
    lengths, sizes = rows_method(True, max_batch_size=8)
    found = gather(lambda: lengths([str(i) for i in range(20)]))[0]
    assert found["n"] == [len(str(i)) for i in range(20)]
    assert [size for size, _ in sizes] == [6, 7, 7]

    @serve.method(batch=True, max_batch_size=8)
    def double(x):
        sizes.append(len(x))
        return 2 * x

    sizes.clear()
    # Not in an event loop: in this thread.
    np.testing.assert_array_equal(double(np.arange(20)), 2 * np.arange(20))
    assert sizes == [6, 7, 7]


def test_a_poisoned_call_with_rows_fails_alone():
    lengths, _ = rows_method(True)
    calls = [["a"], ["bb", "poison"], ["ccc", "d"]]
    found = gather(*[lambda texts=texts: lengths(texts) for texts in calls], return_exceptions=True)
    assert isinstance(found.pop(1), ValueError)
    assert [one["n"] for one in found] == [[1], [3, 1]]


def test_frames_share_batches():
    pd = pytest.importorskip("pandas")
    sizes = []

    @serve.method(batch=True)
    def score(frame, threshold):
        sizes.append(len(frame))
        return frame["x"] * 2, frame[frame.columns[:1]]

    frames = [pd.DataFrame({"x": range(n), "y": "a"}, index=range(10, 10 + n)) for n in (1, 3)]
    found = gather(*[lambda frame=frame: score(frame, 0.5) for frame in frames])
    for frame, (doubled, x) in zip(frames, found, strict=True):
        pd.testing.assert_series_equal(doubled, frame["x"] * 2)
        pd.testing.assert_frame_equal(x, frame[["x"]])
    assert sizes == [4]


def test_calls_without_rows_are_told():
    lengths, _ = rows_method(True)

    @serve.method(batch=True)
    async def short(values, weights):
        return values[1:] if weights else len(values)

    for call, error, message in [
        (lambda: lengths("text"), ArgumentsError, r"brings no rows \(str\): give a list"),
        (lambda: short([1, 2], [1]), ArgumentsError, "brings 1 and 2 rows"),
        (lambda: short([1, 2], 1), BatchError, "given 2 rows of 1 calls and returned 1"),
        (lambda: short([1, 2], 0), BatchError, "must return rows"),
    ]:
        with pytest.raises(error, match=message):
            gather(call)


def test_declarations_of_methods():
    def plain(values):
        return values

    def stream(values):
        yield values

    assert serve.method(batch=False)(plain) is plain
    with pytest.raises(ConfigError, match="batch = 'yes' is not valid"):
        serve.method(batch="yes")
    with pytest.raises(ConfigError, match="max_batch_size = 0"):
        serve.method(max_batch_size=0)
    with pytest.raises(ConfigError, match="takes a function or a method"):
        serve.method(batch=True)(3)
    with pytest.raises(ConfigError, match="streams of several callers"):
        serve.method(batch=True)(stream)


def test_tensors_are_stacked():
    torch = pytest.importorskip("torch")

    @serve.batch(stack=True)
    def total(x):
        return x.sum(dim=1)

    found = gather(*[lambda n=n: total(torch.full((3,), float(n))) for n in range(4)])
    assert [float(one) for one in found] == [0, 3, 6, 9]

    @serve.method(batch=True)
    def double(x):
        return 2 * x, len(x)

    @serve.method(batch=True)
    def rows(x):
        return 2 * x, [len(x)] * len(x)

    with pytest.raises(BatchError, match="must return rows"):
        gather(lambda: double(torch.zeros(2)))
    found = gather(*[lambda n=n: rows(torch.full((n, 2), float(n))) for n in (1, 2)])
    assert [(one.shape, float(one.sum()), sizes) for one, sizes in found] == [((1, 2), 4, [3]), ((2, 2), 16, [3, 3])]


def test_batched_generators():
    closed = []

    @serve.batch(max_batch_size=4)
    async def count(values):
        try:
            for step in range(3):
                await asyncio.sleep(0)
                # The first caller's stream ends early.
                yield [StopIteration if step == 2 and i == 0 else value + step for i, value in enumerate(values)]
        finally:
            closed.append(len(values))

    @serve.batch
    def plain(values):
        for step in range(200):
            yield [value + step for value in values]

    @serve.batch
    async def short(values):
        yield values
        yield values[:1]

    async def collect(stream):
        return [value async for value in stream]

    async def first_two(stream):
        found = [await anext(stream), await anext(stream)]
        await stream.aclose()
        return found

    async def run():
        found = await asyncio.gather(*[collect(count(10 * i)) for i in range(3)])
        assert found == [[0, 1], [10, 11, 12], [20, 21, 22]]
        assert closed == [3]
        assert await asyncio.gather(collect(plain(0)), first_two(plain(5))) == [list(range(200)), [5, 6]]
        errors = await asyncio.gather(collect(short(1)), collect(short(2)), return_exceptions=True)
        assert [type(error) for error in errors] == [BatchError] * 2

    asyncio.run(run())


def test_objects_with_batches_are_copied_and_pickled():
    recorder = Recorder()
    assert gather(lambda: recorder.adouble(1)) == [2]
    other = copy.copy(recorder)
    other.batches = []
    assert gather(lambda: other.adouble(1), lambda: recorder.adouble(2)) == [2, 4]
    assert (other.batches, recorder.batches) == ([[1]], [[1], [2]])
    recorder.gate = None
    again = pickle.loads(pickle.dumps(recorder))
    assert gather(lambda: again.adouble(3)) == [6]
    assert gather(lambda: cloudpickle.loads(cloudpickle.dumps(wrong))("short")) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size = 0"),
        ({"batch_wait_timeout_s": -1}, "batch_wait_timeout_s = -1"),
        ({"max_concurrent_batches": 1.5}, "max_concurrent_batches = 1.5"),
        ({"stack": "columns"}, "stack = 'columns'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        serve.batch(**options)


def test_class_methods_cannot_be_batched():
    class Owner:
        @classmethod
        @serve.batch
        def shared(cls, values):
            return values

    if sys.version_info < (3, 13):
        with pytest.raises(ConfigError, match="class methods of Owner"):
            Owner.shared(1)


def test_declarations():
    with pytest.raises(ConfigError, match="takes a function or a method"):
        serve.batch(3)
    with pytest.warns(UserWarning, match="they will never be full"):
        serve.deployment(max_ongoing_requests=5)(Recorder)
    starred = serve.batch(lambda *values: values)
    with pytest.raises(ConfigError, match="have no list"):
        starred(1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("concurrent", [1, 2])
def test_no_call_is_lost(threads, concurrent):
    """Coroutines, threads of the pool, cancellations, deadlines and failures at once: each call ends, with its own."""
    source = random.Random(threads * 10 + concurrent)
    most = []

    @serve.batch(max_batch_size=5, max_concurrent_batches=concurrent)
    def double(values):
        most.append(len(values))
        time.sleep(source.choice([0, 0, 0.001, 0.003]))
        if any(value % 50 == 7 for value in values):
            raise ValueError("seven")
        return [2 * value for value in values]

    async def run():
        host = Host(asyncio.get_running_loop(), Pool(threads, "pool"))
        enter_host(host)
        ends: Counter[str] = Counter()

        async def one(value):
            await asyncio.sleep(source.random() * 0.3)
            timeout = source.choice([None, None, 0.002, 0.05])
            deadline = None if timeout is None else time.monotonic() + timeout
            request_context.set(RequestContext(str(value), deadline))
            in_thread = value % 3 == 0
            context = contextvars.copy_context()
            call = host.pool.run(lambda: context.run(double, value)) if in_thread else double(value)
            try:
                assert await asyncio.wait_for(call, 20 if value % 11 or in_thread else 0.005) == 2 * value
                ends["answered"] += 1
            except ValueError:
                assert value % 50 == 7
                ends["failed"] += 1
            except serve.RequestTimeoutError:
                assert timeout is not None
                ends["late"] += 1
            except asyncio.TimeoutError:
                ends["cancelled"] += 1

        await asyncio.wait_for(asyncio.gather(*[one(value) for value in range(400)]), 40)
        assert sum(ends.values()) == 400
        assert ends["answered"] > 100
        counts = double.get_batch_counts()
        assert counts["waiting"] == 0
        # Nothing is left that keeps the next one from its turn.
        assert await double(1) == 2
        host.pool.stop()

    asyncio.run(run())
    assert max(most) == 5


# -- replicas ----------------------------------------------------------------------------------------------------------


@serve.deployment(max_ongoing_requests=200)
class Model(Recorder):
    def __init__(self):
        super().__init__()
        self.ids = []
        self.ran_on = set()

    @serve.batch(max_batch_size=8)
    def slow(self, values):
        self.batches.append(list(values))
        self.ran_on.add(threading.current_thread().name)
        time.sleep(0.02)
        return values

    @serve.batch
    async def who(self, values):
        context = serve.get_request_context()
        model = serve.get_multiplexed_model_id()
        await asyncio.sleep(0.01)
        return [(context.request_ids, model)] * len(values)

    @serve.method(batch=True)
    def doubled(self, values):
        time.sleep(0.02)
        self.batches.append(len(values))
        return [2 * value for value in values]

    @serve.batch
    def count(self, values):
        for step in range(3):
            yield [value + step for value in values]

    @serve.batch
    def __call__(self, requests):
        self.batches.append(len(requests))
        return [request.query_params["x"] for request in requests]

    @serve.batch
    async def recursive(self, values):
        return [await self.recursive(value) for value in values]

    async def through_coroutine(self, value):
        return await self.slow(value), await self.double(value)

    def through_thread(self, value):
        return self.slow(value)

    def plain(self, value):
        return value

    @serve.batch
    async def leave(self, values):
        raise SystemExit(3)

    async def loses_a_task(self):
        async def leave():
            raise SystemExit(3)

        asyncio.get_running_loop().create_task(leave())
        await asyncio.sleep(0.01)
        return "goes on"

    async def stops_the_loop(self):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return "goes on"

    async def take_batches(self):
        taken, self.batches = self.batches, []
        return taken


@serve.deployment
@serve.batch(max_batch_size=4)
def negate(values):
    return [-value for value in values]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(1, 2) as client:
        yield client


@pytest.fixture(scope="module")
def handle(client):
    serve.start(port=0, client=client)
    return serve.run(Model.bind(), client=client)


@pytest.fixture
def batches(handle):
    handle.take_batches.remote().result(20)
    return lambda: handle.take_batches.remote().result(20)


def test_a_batch_fills_while_another_one_runs(handle, batches):
    refs = [handle.slow.remote(i) for i in range(33)]
    assert [ref.result(20) for ref in refs] == list(range(33))
    sizes = [len(batch) for batch in batches()]
    assert sum(sizes) == 33
    assert len(sizes) <= 8


def test_callers_with_lists_of_their_own(handle, batches):
    refs = [handle.doubled.remote([i] * (i + 1)) for i in range(5)]
    assert [ref.result(20) for ref in refs] == [[2 * i] * (i + 1) for i in range(5)]
    sizes = batches()
    assert sum(sizes) == 15
    assert len(sizes) <= 3


def test_waiting_calls_hold_no_threads(handle):
    """One thread: while forty calls wait for their batches another `def` gets its turn between two of them."""
    refs = [handle.slow.remote(i) for i in range(40)]
    assert handle.plain.remote(1).result(20) == 1
    assert not all(ref.done() for ref in refs)
    assert [ref.result(20) for ref in refs] == list(range(40))


def test_from_user_code(handle, batches):
    refs = [handle.through_coroutine.remote(i) for i in range(4)] + [handle.through_thread.remote(i) for i in range(4)]
    assert [ref.result(20) for ref in refs] == [(i, 2 * i) for i in range(4)] + list(range(4))


def test_poison_travels_alone(handle):
    refs = [handle.double.remote(value) for value in [1, 2, "poison", 4, 5, 6, 7, 8]]
    with pytest.raises(ValueError, match="poison"):
        refs.pop(2).result(20)
    assert [ref.result(20) for ref in refs] == [2, 4, 8, 10, 12, 14, 16]


def test_a_replica_outlives_what_ends_programs(handle):
    with pytest.raises(serve.UserCodeError, match="SystemExit: 3"):
        handle.leave.remote(1).result(10)
    assert handle.loses_a_task.remote().result(10) == "goes on"
    assert handle.stops_the_loop.remote().result(10) == "goes on"
    assert handle.plain.remote(1).result(10) == 1


def test_requests_of_a_batch_are_known(handle):
    with_ids = [handle.who.options(request_id=f"id-{i}").remote(i) for i in range(3)]
    models = [handle.who.options(multiplexed_model_id=name).remote(0) for name in ["a", "b", "a"]]
    found = [ref.result(20) for ref in with_ids]
    assert {id for ids, _ in found for id in ids} == {"id-0", "id-1", "id-2"}
    assert [ref.result(20)[1] for ref in models] == ["a", "b", "a"]


def test_cancelled_and_late_calls_are_left_out(handle, batches):
    first = [handle.slow.remote("first") for _ in range(8)]
    second = [handle.slow.remote("second") for _ in range(8)]
    cancelled = [handle.slow.remote("cancelled") for _ in range(4)]
    late = [handle.slow.options(request_timeout_s=0.01).remote("late") for _ in range(4)]
    for ref in cancelled:
        ref.cancel()
    for ref in late:
        # Refused when it came, where it is known already how long such a call takes.
        with pytest.raises((serve.RequestTimeoutError, serve.BackPressureError)):
            ref.result(20)
    assert {ref.result(20) for ref in first + second} == {"first", "second"}
    taken = [value for batch in batches() for value in batch]
    assert taken.count("cancelled") + taken.count("late") <= 1  # the very first batch may have begun with one
    assert handle.slow.remote("next").result(20) == "next"


def test_streams_of_batches(handle):
    streams = [handle.count.options(stream=True).remote(10 * i) for i in range(3)]
    assert [list(stream) for stream in streams] == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(3)]


def test_http_requests_share_batches(client, handle, batches):
    url = serve.url(client=client)

    def get(i: int) -> str:
        with urllib.request.urlopen(f"{url}/?x={i}", timeout=20) as answer:
            return answer.read().decode()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(get, range(16))) == [str(i) for i in range(16)]
    assert sum(batches()) == 16


def test_batched_function_as_deployment(client):
    handle = serve.run(negate.bind(), name="negate", route_prefix=None, client=client)
    assert [ref.result(20) for ref in [handle.remote(i) for i in range(6)]] == [-i for i in range(6)]


def test_a_batch_that_calls_itself(handle):
    with pytest.raises(serve.ServeError, match="would wait for itself"):
        handle.recursive.remote(1).result(20)


def test_example(client):
    pytest.importorskip("sklearn")
    from examples.batched_digits import app
    from examples.digits import split

    handle = serve.run(app, name="digits", route_prefix=None, client=client)
    _, images, _, labels = split()
    refs = [handle.predict.remote(image) for image in images[:100]]
    right = sum(ref.result(30)["digit"] == label for ref, label in zip(refs, labels, strict=False))
    assert right >= 95


def test_status_tells_of_batches(client, handle):
    handle.slow.remote(1).result(20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [counts for worker in serve.status(client=client).workers for counts in worker.batches.values()]
        if any("slow" in counts and counts["slow"]["waiting"] == 0 for counts in found):
            break
        time.sleep(0.05)
    counts = next(counts["slow"] for counts in found if "slow" in counts)
    assert counts["calls"] >= counts["batches"] > 0
    assert "batches slow" in str(serve.status(client=client))
