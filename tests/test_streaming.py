"""Streams: generators of deployments, iterated by their callers, from the first item to every way they can end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import pickle
import signal
import threading
import time
import weakref
from typing import Any

import httpx
import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.utils_test import captured_logger, gen_cluster
from helpers import until
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import StreamingResponse

import dask_serve as serve
from dask_serve.exceptions import (
    ConfigError,
    MethodNotFoundError,
    PayloadError,
    ReplicaLostError,
    RequestCancelledError,
    RequestTimeoutError,
    ServeError,
)
from dask_serve.replica.process import ServeProcess
from dask_serve.routing.session import Session
from dask_serve.wire.chunks import freeze, pack, thaw
from dask_serve.wire.messages import LEAST, WINDOW, WINDOW_STEP
from dask_serve.wire.payloads import RemoteTraceback

#: Small items that a generator may be ahead, and one that it was just yielding.
AHEAD = WINDOW // LEAST + 1


class Brittle:
    """Cannot be unpickled."""

    def __reduce__(self):
        return _fail, ()


def _fail():
    raise LookupError("brittle")


@serve.deployment
class Source:
    def __init__(self) -> None:
        self.made = 0
        self.closed: list[str] = []
        self.go = threading.Event()
        self.open = asyncio.Event()

    # -- generators, each with an `async def` and a `def` form

    async def count(self, n, size=0, pause=None):
        try:
            for i in range(n):
                if pause is not None:
                    await asyncio.sleep(pause)
                self.made += 1
                yield np.full(size, i % 256, np.uint8) if size else i
        except asyncio.CancelledError:
            self.closed.append("cancelled")
            raise
        finally:
            self.closed.append("count")

    def count_blocking(self, n, size=0, pause=None):
        try:
            for i in range(n):
                if pause is not None:
                    time.sleep(pause)
                self.made += 1
                yield np.full(size, i % 256, np.uint8) if size else i
        finally:
            self.closed.append("count")

    async def fail(self, n):
        for i in range(n):
            yield i
        raise KeyError("after", n)

    def fail_blocking(self, n):
        yield from range(n)
        raise KeyError("after", n)

    async def gate(self, before):
        """Yields numbers, and then waits."""
        try:
            for i in range(before):
                yield i
            await self.open.wait()
            yield "opened"
        except asyncio.CancelledError:
            self.closed.append("cancelled")
            raise
        finally:
            self.closed.append("gate")

    def gate_blocking(self, before):
        try:
            yield from range(before)
            self.go.wait(20)
            yield "opened"
        finally:
            self.closed.append("gate")

    async def deaf(self):
        """Does not let itself be cancelled."""
        try:
            for i in itertools.count():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
                yield i
        finally:
            self.closed.append("deaf")

    # -- methods that return generators

    async def made_here(self, n):
        return self.count(n)

    def made_there(self, n):
        return self.count_blocking(n)

    def iterator(self, n):
        return map(str, range(n))

    # -- others

    async def mutating(self):
        shared: list[int] = []
        for i in range(5):
            shared.append(i)
            yield shared

    def objects(self, *objects):
        yield from objects

    async def text(self, n):
        for i in range(n):
            yield f"{i}\n"

    def unpicklable(self):
        yield 1
        yield threading.Lock()

    async def brittle(self):
        yield {"a": 1}
        yield {"b": Brittle()}
        yield {"c": 3}

    async def deadlines(self, pause):
        yield serve.get_request_context().deadline is not None
        await asyncio.sleep(pause)
        yield serve.get_request_context().deadline is not None

    def plain(self, x=None):
        return x

    def names(self, n):
        for _ in range(n):
            yield threading.current_thread().name

    # -- what the tests ask

    async def let_go(self):
        self.go.set()
        self.open.set()

    async def report(self):
        return self.made, list(self.closed)


@serve.deployment
class Relay:
    """Iterates over another deployment's stream, and yields on."""

    def __init__(self, source: Any) -> None:
        self.source = source.options(stream=True)
        self.closed: list[str] = []

    async def refs(self):
        yield 1
        yield self.source.options(stream=False).plain.remote(1)

    async def relay(self, method, *args):
        try:
            async for item in getattr(self.source, method).remote(*args):
                yield [item]
        finally:
            self.closed.append("relay")

    def relay_blocking(self, method, *args):
        try:
            for item in getattr(self.source, method).remote(*args):
                yield [item]
        finally:
            self.closed.append("relay")

    def handed_on(self, method, *args):
        return getattr(self.source, method).remote(*args)

    async def block(self):
        return list(self.source.count.remote(3))

    async def later(self, pause):
        yield "first"
        await asyncio.sleep(pause)
        async for item in self.source.count.remote(2):
            yield item

    async def report(self):
        return 0, list(self.closed)

    async def __call__(self, request):
        n = int(request.query_params["n"])
        lines = self.lines(n)
        match request.query_params["as"]:
            case "response":
                return StreamingResponse(lines)
            case "generator":
                return lines
            case "blocking":
                return (f"{i}\n" for i in self.source.count_blocking.remote(n))
            case "stream":
                return self.source.text.remote(n)

    async def lines(self, n):
        async for i in self.source.count.remote(n, 0, 0.001):
            yield f"{i}\n"


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def report(handle: Any) -> tuple[int, list[str]]:
    return await handle.report.remote()


# -- the wire's form of items ------------------------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
anything = (
    plain
    | st.binary(min_size=500, max_size=5000)
    | st.lists(plain, max_size=3)
    | st.dictionaries(st.text(max_size=3), plain, max_size=3)
    | st.integers(100, 100_000).map(lambda n: np.arange(n))
)


def same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other)


@settings(max_examples=60, deadline=None)
@given(items=st.lists(anything | st.lists(plain, min_size=60, max_size=200).map(tuple), max_size=30))
def test_items_come_out_as_they_went_in(items):
    """In their order, and each side counts the same bytes: whatever the entries and frames they are cut into."""
    sent = received = 0
    entries = []
    for item in items:
        entry, nbytes = freeze(item)
        assert nbytes >= LEAST
        entries.append(entry)
        sent += nbytes
    found = []
    for counts, parts in pack(entries):
        start = 0
        for count in counts:
            stop = start + max(1, count)
            got, nbytes, rest = thaw(count, parts[start:stop])
            assert rest is None
            assert len(got) == (-count if count < 0 else 1)
            # No run is larger than the step in which the window moves.
            assert nbytes <= WINDOW_STEP or len(got) == 1
            found += got
            received += nbytes
            start = stop
        assert start == len(parts)
    assert sent == received
    assert [type(item) for item in found] == [type(item) for item in items]
    assert all(map(same, found, items))


# -- what can be iterated, and how -------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_every_kind_of_generator(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    streams = handle.options(stream=True)
    for method in ("count", "count_blocking", "made_here", "made_there"):
        for n in (0, 1, 5, 3000):
            assert await collect(getattr(streams, method).remote(n)) == list(range(n)), method
    assert await collect(streams.iterator.remote(3)) == ["0", "1", "2"]
    # Refs among the arguments.
    assert await collect(streams.count.remote(handle.plain.remote(4))) == [0, 1, 2, 3]
    # `def` generators run on the replica's own pool.
    assert all("def" in name for name in await collect(streams.names.remote(3)))
    assert (await report(handle))[1].count("count") == 4 * 4 + 1


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_functions_and_calls(c, s, a):
    @serve.deployment
    def numbers(n):
        yield from range(n)

    @serve.deployment
    class Callable:
        async def __call__(self, n):
            for i in range(n):
                yield i

    for target in (numbers, Callable):
        handle = await serve.run(target.bind(), route_prefix=None, client=c)
        assert await collect(handle.options(stream=True).remote(3)) == [0, 1, 2]


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_items_of_every_size(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    items = [1, "x" * 10_000_000, None, np.arange(3_000_000), {"a": np.zeros(5)}, b"", *range(100), 10**5000, (1, 2)]
    found = await collect(handle.options(stream=True).objects.remote(*items))
    assert len(found) == len(items)
    assert all(map(same, found[:4] + found[5:], items[:4] + items[5:]))
    # As after any other call, the caller may write into what it got.
    found[3][:] = 1
    found[4]["a"] += 1


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_items_are_as_they_were_when_they_were_yielded(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    assert await collect(handle.options(stream=True).mutating.remote()) == [list(range(n)) for n in range(1, 6)]


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_options(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    streams = handle.count.options(stream=True)
    assert streams != handle.count
    assert handle.options(stream=True).count == streams
    assert streams.options(request_timeout_s=5) == handle.count.options(stream=True, request_timeout_s=5)
    assert streams.options(stream=False) == handle.count
    copy = pickle.loads(pickle.dumps(streams))
    assert copy == streams
    assert await collect(copy.remote(2)) == [0, 1]
    with pytest.raises(ConfigError, match="stream"):
        handle.options(stream="yes")
    # The asynchronous handle of older code.
    old = handle.options(sync=False, stream=True).count
    assert await collect(await old.remote(2)) == [0, 1]
    with pytest.raises(TypeError, match="async for item in await"):
        await collect(old.remote(2))
    stream = await old.remote(1)
    assert isinstance(stream, serve.DeploymentResponseGenerator)
    assert stream.request_id in repr(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_the_first_item_and_lone_items_leave_at_once(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    for method in ("gate", "gate_blocking"):
        for before in (1, 5, 200):
            stream = handle.options(stream=True, method_name=method).remote(before)
            # The generator waits for ever behind them.
            assert [await asyncio.wait_for(anext(stream), 5) for _ in range(before)] == list(range(before))
            stream.close()
            await handle.let_go.remote()
        assert await collect(handle.options(stream=True, method_name=method).remote(1)) == [0, "opened"]


# -- errors ------------------------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_what_the_generator_raises_comes_behind_its_items(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    for method in ("fail", "fail_blocking"):
        for n in (0, 1, 1000):
            stream = handle.options(stream=True, method_name=method).remote(n)
            with captured_logger("dask_serve.replica"):
                assert [await anext(stream) for _ in range(n)] == list(range(n))
                with pytest.raises(KeyError) as caught:
                    await anext(stream)
            assert caught.value.args == ("after", n)
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert 'KeyError("after", n)' in str(caught.value.__cause__)
            # As with any generator, that was all.
            with pytest.raises(StopAsyncIteration):
                await anext(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_items_that_cannot_be_sent(c, s, a):
    handle = (await serve.run(Source.bind(), route_prefix=None, client=c)).options(stream=True)
    stream = handle.unpicklable.remote()
    assert await anext(stream) == 1
    with pytest.raises(PayloadError, match=r"an item that replica .* yielded, a lock, cannot be pickled"):
        await anext(stream)
    stream = handle.brittle.remote()
    assert await anext(stream) == {"a": 1}
    with pytest.raises(LookupError, match="brittle"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_items_that_are_refs_are_refused_as_results_are(c, s, a):
    handle = await serve.run(Relay.bind(Source.bind()), route_prefix=None, client=c)
    stream = handle.options(stream=True).refs.remote()
    assert await anext(stream) == 1
    with pytest.raises(PayloadError, match=r"yielded, a DeploymentResponse, .*is or holds a ref"):
        await anext(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_misuse_is_told_with_the_repair(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    streams = handle.options(stream=True)
    for method in ("count", "count_blocking", "made_here", "made_there"):
        with pytest.raises(TypeError, match=r"generator, comes in items: .*handle.options\(stream=True\)"):
            await getattr(handle, method).remote(1)
    with pytest.raises(TypeError, match=r"'plain' .* did not return a generator but a int"):
        await anext(streams.plain.remote(1))
    with pytest.raises(MethodNotFoundError, match="nothing"):
        await anext(streams.nothing.remote())
    with pytest.raises(TypeError):
        await anext(streams.count.remote("too", "many", "arguments", "here"))
    with pytest.raises(PayloadError, match="argument 0"):
        await anext(streams.count.remote(threading.Lock()))
    stream = streams.count.remote(1)
    with pytest.raises(TypeError, match="cannot be awaited; iterate"):
        await stream
    with pytest.raises(TypeError, match=r"cannot be asked for its result\(\); iterate"):
        stream.result()
    for arguments in [(stream,), ([stream],), ({"a": (1, [stream])},)]:
        for called in (handle.plain, streams.objects):
            with pytest.raises(TypeError, match=r"argument 0.*is a stream .*pass its items"):
                answer = called.remote(*arguments)
                await (answer if called is handle.plain else collect(answer))
    with pytest.raises(TypeError, match=r"argument 0 .*generator"):
        await handle.plain.remote(i for i in range(3))
    # It is as good as before.
    assert await collect(stream) == [0]
    with pytest.raises(ServeError, match="asynchronous client; use `async for`"):
        next(streams.count.remote(1))


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_one_task_iterates_at_a_time(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    stream = handle.options(stream=True).gate.remote(0)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="already being iterated"):
        await anext(stream)
    await handle.let_go.remote()
    assert await first == "opened"


# -- time --------------------------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_the_deadline_is_for_the_first_item(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    short = handle.options(stream=True, request_timeout_s=0.2)
    for method in ("count", "count_blocking"):
        with pytest.raises(RequestTimeoutError, match="reached its deadline"):
            await collect(getattr(short, method).remote(1, 0, 0.4))
        # The `def` still sleeps, in the only thread.
        await nothing_left()
        assert len(await collect(getattr(short, method).remote(8, 0, 0.05))) == 8
    assert await collect(short.deadlines.remote(0.3)) == [True, False]


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_calls_behind_the_first_item_do_not_inherit_the_deadline(c, s, a):
    handle = await serve.run(Relay.bind(Source.bind()), route_prefix=None, client=c)
    assert await collect(handle.later.options(stream=True, request_timeout_s=0.2).remote(0.3)) == ["first", 0, 1]


# -- ends --------------------------------------------------------------------------------------------------------------


async def _aclose(stream):
    await stream.aclose()


async def _leave(stream):
    async with stream:
        pass


async def _cancel(stream):
    stream.cancel()


async def _drop(stream):
    """The last reference is the test's list."""


@pytest.mark.parametrize("end", [_aclose, _leave, _cancel, _drop])
@pytest.mark.parametrize("method", ["count", "count_blocking", "gate", "made_here", "made_there", "deaf"])
def test_an_early_end_runs_the_generators_finally(method, end):
    """Of one that stands at a `yield` because the window is full, and of one that waits for something else."""

    @gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
    async def check(c, s, a):
        handle = await serve.run(Source.bind(), route_prefix=None, client=c)
        streams = [handle.options(stream=True, method_name=method).remote(*([10**9] if "ga" not in method else [2]))]
        if method == "deaf":
            streams = [handle.options(stream=True).deaf.remote()]
        assert [await anext(streams[0]), await anext(streams[0])] == [0, 1]
        await asyncio.sleep(0.02)
        await end(streams[0])
        if end is _drop:
            streams.clear()
        name = {"gate": "gate", "deaf": "deaf"}.get(method, "count")

        async def closed():
            return name in (await report(handle))[1]

        await until(closed)
        if end is _cancel:
            assert streams[0].cancelled()
            for _ in range(2):
                with pytest.raises(RequestCancelledError):
                    await anext(streams[0])
        elif end is not _drop:
            with pytest.raises(StopAsyncIteration):
                await anext(streams[0])
        await nothing_left()

    check()


async def nothing_left() -> None:
    """No replica runs anything, and no link waits for an answer."""

    def left() -> list[Any]:
        doors = ServeProcess.doors()
        return [
            *[e for door in doors for connection in door.connections for e in connection.executions],
            *[core for door in doors for core in door.replicas.values() if core.admission.running],
        ]

    await until(lambda: not left())


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_def_generator_is_closed_after_its_present_step(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    stream = handle.options(stream=True).gate_blocking.remote(1)
    assert await anext(stream) == 0
    stream.close()
    await asyncio.sleep(0.05)
    assert (await report(handle))[1] == []
    await handle.let_go.remote()

    async def closed():
        return (await report(handle))[1] == ["gate"]

    await until(closed)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_breaking_out_of_a_loop_ends_the_stream(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    async for item in handle.options(stream=True).count.remote(10**9):
        if item == 300:
            break

    async def closed():
        return (await report(handle))[1] == ["count"]

    await until(closed)
    assert (await report(handle))[0] <= 301 + AHEAD


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_cancelling_the_task_that_waits_ends_the_stream(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    stream = handle.options(stream=True).gate.remote(1)
    assert await anext(stream) == 0
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(stream), 0.05)

    async def cancelled():
        return (await report(handle))[1] == ["cancelled", "gate"]

    await until(cancelled)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_stream_that_has_ended_cannot_be_cancelled(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    stream = handle.options(stream=True).count.remote(2)
    assert await collect(stream) == [0, 1]
    stream.cancel()
    assert not stream.cancelled()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_streams_leave_nothing_behind(c, s, a):
    handle = (await serve.run(Source.bind(), route_prefix=None, client=c)).options(stream=True)
    known = []
    for i in range(300):
        stream = handle.count.remote(i % 40 if i % 3 else 10**9)
        known.append(weakref.ref(stream))
        known.append(weakref.ref(stream._local)) if hasattr(stream._local, "__weakref__") else None
        if i % 2:
            await anext(stream, None)
    del stream
    await nothing_left()
    gc.collect()
    assert not [ref for ref in known if ref() is not None]
    [link] = Session.of(c).fabric(asyncio.get_running_loop())._links.values()
    await until(lambda: not link._calls)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_the_end_of_the_replica_ends_the_stream(c, s, a):
    handle = await serve.run(Source.options(graceful_shutdown_timeout_s=0.2).bind(), route_prefix=None, client=c)
    stream = handle.options(stream=True).gate.remote(3)
    assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
    await serve.delete("default", client=c)
    with pytest.raises(ReplicaLostError):
        await asyncio.wait_for(anext(stream), 5)


# -- flow --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["count", "count_blocking"])
@pytest.mark.parametrize(("size", "ahead"), [(0, AHEAD), (50_000, 7), (1_000_000, 1)])
def test_a_slow_consumer_slows_the_generator_down(method, size, ahead):
    @gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
    async def check(c, s, a):
        handle = await serve.run(Source.bind(), route_prefix=None, client=c)
        stream = handle.options(stream=True, method_name=method).remote(10**9, size)
        most = 0
        for consumed in range(1, 700 if not size else 30):
            await anext(stream)
            if consumed < 4 or not consumed % 50 or size:
                # Until it stands still.
                before = -1
                while before != (made := (await report(handle))[0]):
                    before = made
                    await asyncio.sleep(0.005)
                most = max(most, made - consumed)
        # It works ahead, and no further than the window.
        assert max(1, ahead // 2) <= most <= ahead
        # The caller's buffer is bounded by the same window.
        assert sum(-count if count < 0 else 1 for count, _ in stream._local.entries) <= ahead

    check()


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_stalled_generator_holds_no_thread(c, s, a):
    """Its deployment has one thread for `def` methods."""
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)
    streams = [handle.options(stream=True).count_blocking.remote(10**9) for _ in range(5)]
    for stream in streams:
        assert await asyncio.wait_for(anext(stream), 5) == 0
    assert await asyncio.wait_for(handle.plain.remote("free"), 5) == "free"
    for stream in streams:
        assert [await anext(stream) for _ in range(1000)] == list(range(1, 1001))


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_generators_that_never_wait_share_their_thread_and_their_loop(c, s, a):
    handle = await serve.run(Source.bind(), route_prefix=None, client=c)

    async def consume(method):
        async for i in handle.options(stream=True, method_name=method).remote(10**9):
            if not i % 100:
                await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(consume(method)) for method in ("count", "count_blocking") for _ in range(2)]
    for i in range(50):
        assert await asyncio.wait_for(handle.plain.remote(i), 5) == i
        assert await asyncio.wait_for(report(handle), 5)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await nothing_left()


# -- chains ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["relay", "relay_blocking", "handed_on"])
@pytest.mark.parametrize("inner", ["count", "count_blocking"])
def test_items_flow_through_a_chain(method, inner):
    @gen_cluster(client=True, nthreads=[("127.0.0.1", 2), ("127.0.0.1", 2)])
    async def check(c, s, a, b):
        handle = await serve.run(Relay.bind(Source.bind()), route_prefix=None, client=c)
        source = await serve.get_deployment_handle("Source", "default", client=c)
        relay = handle.options(stream=True, method_name=method)
        wrap = (lambda i: i) if method == "handed_on" else lambda i: [i]
        assert await collect(relay.remote(inner, 1000)) == [wrap(i) for i in range(1000)]
        with pytest.raises(KeyError, match="after"), captured_logger("dask_serve.replica"):
            await collect(relay.remote("fail", 3))
        # The first item arrives long before the last is made, and nothing is collected on the way.
        made = (await report(source))[0]
        stream = relay.remote(inner, 10**9)
        assert await anext(stream) == wrap(0)
        await asyncio.sleep(0.1)
        assert (await report(source))[0] - made <= 2 * AHEAD
        closed = len((await report(source))[1])
        stream.cancel()

        async def reached():
            return len((await report(source))[1]) > closed

        await until(reached)
        await nothing_left()

    check()


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_for_in_a_coroutine_of_a_replica_is_refused(c, s, a):
    handle = await serve.run(Relay.bind(Source.bind()), route_prefix=None, client=c)
    with pytest.raises(ServeError, match="would block the event loop of this replica; use `async for`"):
        await handle.block.remote()


# -- synchronous callers, other threads and loops ----------------------------------------------------------------------


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose two workers are processes with one thread each."""
    yield serve.run(Source.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


def test_for_loops(client, handle):
    streams = handle.options(stream=True)
    for method in ("count", "count_blocking"):
        assert list(getattr(streams, method).remote(3000)) == list(range(3000))
    found: list[int] = []
    with pytest.raises(KeyError, match="after"):
        found.extend(streams.fail.remote(3))
    assert found == [0, 1, 2]
    with streams.count.remote(10**9) as stream:
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
    assert list(stream) == []
    for item in streams.count.remote(10**9):
        if item == 3:
            break
    deadline = time.monotonic() + 5
    while handle.report.remote().result()[1].count("count") < 4:
        assert time.monotonic() < deadline
    stream = streams.gate.remote(0)
    threading.Timer(0.05, stream.cancel).start()
    with pytest.raises(RequestCancelledError):
        next(stream)
    assert "pending" not in repr(stream)


def test_async_for_in_any_loop(handle):
    streams = handle.options(stream=True)

    async def check():
        found = [await collect(streams.count.remote(1000)) for _ in range(2)]
        return [*found, await collect(await streams.options(sync=False).count.remote(1000))]

    assert asyncio.run(check()) == [list(range(1000))] * 3

    async def blocks_itself():
        for _ in await streams.options(sync=False).count.remote(1):
            pass

    with pytest.raises(ServeError, match="the event loop that carries the stream; use `async for`"):
        asyncio.run(blocks_itself())


def test_a_loop_that_ends_under_its_stream(handle):
    async def begin():
        stream = await handle.options(sync=False, stream=True).gate.remote(1)
        assert await anext(stream) == 0
        return stream

    stream = asyncio.run(begin())
    with pytest.raises(ServeError, match=r"shut down|was lost"):
        next(stream)


def test_several_threads_share_a_stream(handle):
    for method in ("count", "count_blocking"):
        stream = handle.options(stream=True, method_name=method).remote(5000)
        found: list[int] = []
        threads = [threading.Thread(target=found.extend, args=(stream,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(found) == list(range(5000))


def test_in_dask_tasks(client, handle):
    streams = handle.options(stream=True)
    assert client.submit(lambda h: sum(h.count.remote(100, 0, 0.001)), streams).result(20) == sum(range(100))


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_over_http(client):
    handle = serve.run(Relay.bind(Source.bind()), client=client)
    source = serve.get_deployment_handle("Source", "default", client=client)
    try:
        with httpx.Client(base_url=serve.url(client=client), timeout=20) as http:
            for form in ("response", "generator", "blocking", "stream"):
                answer = http.get("/", params={"as": form, "n": 100})
                assert answer.text == "".join(f"{i}\n" for i in range(100)), form
            before = source.report.remote().result()[1].count("count")
            with http.stream("GET", "/", params={"as": "response", "n": 10**9}) as answer:
                assert next(answer.iter_lines()) == "0"
        # A client that went away reaches the first deployment.
        deadline = time.monotonic() + 5
        while source.report.remote().result()[1].count("count") == before:
            assert time.monotonic() < deadline
        assert handle.report.remote().result() == (0, [])
    finally:
        serve.shutdown(client=client)


# -- deaths ------------------------------------------------------------------------------------------------------------


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Mortal:
    async def __call__(self, before, path):
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        for i in range(before):
            yield i
        await asyncio.sleep(3600)


def test_a_killed_replica(tmp_path):
    """What came is delivered, then the loss; a stream that has not begun may begin again elsewhere."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        handle = serve.run(Mortal.bind(), route_prefix=None, client=client, timeout=60).options(stream=True)
        path = tmp_path / "pids"

        def pids(n):
            deadline = time.monotonic() + 10
            while not path.exists() or len(path.read_text().split()) < n:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return [int(word) for word in path.read_text().split()]

        stream = handle.options(retries_on_loss=5).remote(100, path)
        assert next(stream) == 0
        deadline = time.monotonic() + 10
        while len(stream._ready) + sum(-count for count, _ in stream._local.entries) < 99:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pids(1)[0], signal.SIGKILL)
        began = time.monotonic()
        found: list[int] = []
        with pytest.raises(ReplicaLostError, match="was lost"):
            found.extend(stream)
        assert found == list(range(1, 100))
        assert time.monotonic() - began < 5
        assert len(pids(1)) == 1

        waiting = handle.options(retries_on_loss=1).remote(0, path)
        os.kill(pids(2)[1], signal.SIGKILL)
        assert len(set(pids(3)[1:])) == 2
        waiting.cancel()
        serve.shutdown(client=client)
