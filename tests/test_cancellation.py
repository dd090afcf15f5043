"""The end of a request that nobody wants any more: wherever it is, and with everything that it has begun."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import distributed
import httpx
import pytest
from distributed.utils_test import captured_logger, gen_cluster

import dask_serve as serve
from dask_serve.context import RequestContext, request_context
from dask_serve.exceptions import RequestCancelledError, RequestTimeoutError
from dask_serve.handle import DeploymentHandle
from dask_serve.replica.process import ServeProcess


class Happened(list):
    """What happened, and to whom. The replicas of these tests live in this process: theirs is this very list."""

    def __reduce__(self):
        return getattr, (sys, "happened_in_tests_of_cancellation")


happened = sys.happened_in_tests_of_cancellation = Happened()


@pytest.fixture(autouse=True)
def _nothing_happened():
    happened.clear()


@serve.deployment(max_ongoing_requests=100)
class Leaf:
    """The end of the chain."""

    def __init__(self) -> None:
        self.go = threading.Event()

    async def __call__(self, name="leaf"):
        happened.append((name, "began"))
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            happened.append((name, "cancelled"))
            raise

    def block(self, name="block"):
        happened.append((name, "began"))
        self.go.wait(10)
        happened.append((name, "finished"))

    async def let_go(self):
        self.go.set()

    async def quick(self, value=1):
        happened.append(("quick", "answered"))
        return value

    def plain(self, value=1):
        return value

    async def stream(self):
        happened.append(("stream", "began"))
        try:
            yield 1
            await asyncio.sleep(30)
        finally:
            happened.append(("stream", "cancelled"))

    async def large(self):
        return b"x" * 100_000


@serve.deployment(threads=2)
class Middle:
    """Calls the leaf in many ways."""

    def __init__(self, leaf: DeploymentHandle) -> None:
        self.leaf = leaf
        self.kept: list[Any] = []

    def note(self, error: BaseException | None) -> None:
        happened.append(("middle", type(error).__name__))

    async def awaits(self, name="leaf"):
        try:
            return await self.leaf.remote(name)
        except BaseException as error:
            self.note(error)
            raise

    def blocks(self, name="leaf"):
        try:
            return self.leaf.remote(name).result()
        except BaseException as error:
            self.note(error)
            raise

    async def awaits_something_else(self):
        self.kept = [self.leaf.remote("kept"), self.leaf.remote("kept too")]
        self.leaf.remote("dropped")
        await asyncio.sleep(30)

    def waits(self, how):
        refs = [self.leaf.remote("one"), self.leaf.remote("two")]
        try:
            if how == "exception":
                refs[0].exception()
            elif how == "wait":
                distributed.get_client()
                distributed.wait(refs)
            elif how == "as_completed":
                distributed.get_client()
                for ref in distributed.as_completed(refs):
                    ref.result()
            elif how == "timeout":
                refs[0].result(timeout=20)
            elif how == "serve.gather":
                serve.gather({"nested": refs})
        except BaseException as error:
            self.note(error)
            raise
        self.note(refs[0].exception() if how != "exception" else RequestCancelledError())

    def waits_for_anothers(self, how):
        try:
            if how == "gather":
                serve.gather(self.kept)
            elif how == "exception":
                self.kept[0].exception()
            else:
                self.kept[0].result()
        except BaseException as error:
            self.note(error)
            raise

    async def stream(self):
        async for item in self.leaf.options(stream=True).stream.remote():
            yield item

    def stream_blocking(self):
        try:
            yield from self.leaf.options(stream=True).stream.remote()
        except BaseException as error:
            self.note(error)
            raise

    async def forgets_a_stream(self):
        self.kept = [self.leaf.options(stream=True).stream.remote()]
        await asyncio.sleep(30)

    async def keep(self):
        self.kept = [contextvars.Context().run(self.leaf.remote, "another's")]

    async def in_a_thread(self):
        def call() -> None:
            try:
                self.leaf.remote("leaf").result()
            except BaseException as error:
                self.note(error)
                raise

        await asyncio.to_thread(call)

    def goes_on(self):
        """A `def` that was not waiting when it was cancelled."""
        happened.append(("goes_on", "began"))
        context = serve.get_request_context()
        deadline = time.monotonic() + 10
        while not context.cancelled and time.monotonic() < deadline:
            time.sleep(0.005)
        ref = self.leaf.quick.remote()
        self.note(ref.exception(5))

    async def cleans_up(self):
        try:
            happened.append(("cleans_up", "began"))
            await asyncio.sleep(30)
        finally:
            await self.leaf.quick.remote()

    async def outlived(self):
        self.kept = [self.leaf.remote("outlives")]
        while ("outlives", "began") not in happened:
            await asyncio.sleep(0.005)

    def two(self, name):
        happened.append((name, "began"))
        refs = [self.leaf.remote(f"{name} {i}") for i in range(2)]
        return [ref.result() for ref in refs]


@serve.deployment
class Outer:
    """Calls the middle."""

    def __init__(self, middle: DeploymentHandle) -> None:
        self.middle = middle

    async def awaits(self, method, *args):
        return await getattr(self.middle, method).remote(*args)

    def blocks(self, method, *args):
        return getattr(self.middle, method).remote(*args).result()

    async def __call__(self, request):
        return await getattr(self.middle, request.query_params["method"]).remote()


async def until(condition: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met in time; happened: {happened}"
        await asyncio.sleep(0.005)


def router_of(handle: DeploymentHandle) -> Any:
    """Return the router of this loop."""
    return handle._find_router(handle._connect())[1]


def unit_of(deployment: str, *workers: Any) -> Any:
    """Return the one replica of a deployment."""
    (unit,) = [unit for w in workers for unit in ServeProcess.units_of(w) if unit.spec["deployment"] == deployment]
    return unit


async def is_idle(*units: Any) -> None:
    """Wait until the replicas run nothing."""
    await until(lambda: not any(unit.core.admission.running for unit in units))


async def begun_then_cancelled(ref: Any, *names: str) -> None:
    await until(lambda: all((name, "began") in happened for name in names))
    begun = time.monotonic()
    ref.cancel()
    with pytest.raises(RequestCancelledError):
        await ref
    await until(lambda: all((name, "cancelled") in happened for name in names))
    assert time.monotonic() - begun < 3


# -- through the chain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["awaits", "blocks"])
@pytest.mark.parametrize("middle", ["awaits", "blocks"])
def test_through_the_chain(outer, middle):
    @gen_cluster(client=True)
    async def run(c, s, a, b):
        app = Outer.bind(Middle.bind(Leaf.bind()))
        handle = await serve.run(app, route_prefix=None, client=c)
        ref = getattr(handle, outer).remote(middle)
        await begun_then_cancelled(ref, "leaf")
        await until(lambda: any(name == "middle" for name, _ in happened))
        told = "CancelledError" if middle == "awaits" else "RequestCancelledError"
        assert ("middle", told) in happened
        units = [unit_of(name, a, b) for name in ("Outer", "Middle", "Leaf")]
        # The threads are free again.
        await is_idle(*units)
        for unit in units:
            assert unit.core.counts.cancelled == 1
            assert 0 < unit.core.counts.wasted < 10
        # And a deadline does the same.
        happened.clear()
        with pytest.raises(RequestTimeoutError):
            await getattr(handle, outer).options(request_timeout_s=0.3).remote(middle)
        await until(lambda: ("leaf", "cancelled") in happened)
        await is_idle(*units)

    run()


@gen_cluster(client=True)
async def test_calls_that_nobody_awaits(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    await begun_then_cancelled(handle.awaits_something_else.remote(), "kept", "kept too", "dropped")


@gen_cluster(client=True)
async def test_waits_of_a_def(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    middle = unit_of("Middle", a, b)
    for how in ("exception", "wait", "as_completed", "timeout", "serve.gather"):
        happened.clear()
        await begun_then_cancelled(handle.waits.remote(how), "one", "two")
        await until(lambda: ("middle", "RequestCancelledError") in happened)
        await is_idle(middle)


@gen_cluster(client=True)
async def test_a_call_that_another_request_made_goes_on(c, s, a, b):
    """The wait ends, the call does not: it belongs to nobody who was cancelled."""
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    await handle.keep.remote()
    await until(lambda: ("another's", "began") in happened)
    middle = unit_of("Middle", a, b)
    for how in ("result", "exception", "gather"):
        happened.clear()
        ref = handle.waits_for_anothers.remote(how)
        await until(lambda: middle.core.admission.running == 1)
        # One that is cancelled before it waits is told so as well.
        await asyncio.sleep(0.05 if how == "gather" else 0)
        ref.cancel()
        await is_idle(middle)
        assert ("another's", "cancelled") not in happened
        assert happened in ([], [("middle", "RequestCancelledError")])
    middle.user.instance.kept[0].cancel()
    await until(lambda: ("another's", "cancelled") in happened)


@gen_cluster(client=True)
async def test_threads_of_a_coroutine(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    await begun_then_cancelled(handle.in_a_thread.remote(), "leaf")
    await until(lambda: ("middle", "RequestCancelledError") in happened)


@gen_cluster(client=True)
async def test_a_cancelled_def_makes_no_more_calls(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    ref = handle.goes_on.remote()
    await until(lambda: ("goes_on", "began") in happened)
    ref.cancel()
    await until(lambda: ("middle", "RequestCancelledError") in happened)
    assert ("quick", "answered") not in happened


@gen_cluster(client=True)
async def test_a_cancelled_coroutine_may_clean_up(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    ref = handle.cleans_up.remote()
    await until(lambda: ("cleans_up", "began") in happened)
    ref.cancel()
    await until(lambda: ("quick", "answered") in happened)


@gen_cluster(client=True)
async def test_the_normal_end_cancels_nothing(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    await handle.outlived.remote()
    leaf = unit_of("Leaf", a, b)
    # A cancel that comes after the end finds nothing any more.
    ref = handle.outlived.remote()
    await ref
    ref.cancel()
    await until(lambda: leaf.core.admission.running == 2)
    assert ("outlives", "cancelled") not in happened


@gen_cluster(client=True)
async def test_streams(c, s, a, b):
    """Those that a request consumes end with it, and those that it does not; a cancelled stream ends its own."""
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    middle, leaf = unit_of("Middle", a, b), unit_of("Leaf", a, b)
    await begun_then_cancelled(handle.forgets_a_stream.remote(), "stream")
    await is_idle(middle, leaf)
    for method in ("stream", "stream_blocking"):
        happened.clear()
        stream = handle.options(stream=True, method_name=method).remote()
        assert await anext(stream) == 1
        stream.cancel()
        await until(lambda: ("stream", "cancelled") in happened)
        await is_idle(middle, leaf)
    assert ("middle", "RequestCancelledError") in happened


# -- wherever it is ----------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_wherever_it_is(c, s, a, b):
    """At the router, waiting for an argument, waiting in the replica, running: as coroutine and as `def`."""
    leaf = Leaf.options(max_ongoing_requests=2)
    handle = await serve.run(leaf.bind(), route_prefix=None, client=c)
    unit = unit_of("Leaf", a, b)
    router = router_of(handle)
    running = handle.block.remote("running")
    await until(lambda: ("running", "began") in happened)
    # The one thread is taken: admitted, this one waits for it.
    waiting = handle.block.remote("waiting")
    await until(lambda: unit.core.admission.running == 2)
    at_the_router = [handle.block.remote("at the router") for _ in range(3)]
    await until(lambda: router.queued > 0)
    with_argument = handle.block.remote(running)
    for ref in (*at_the_router, with_argument, waiting):
        ref.cancel()
        with pytest.raises(RequestCancelledError):
            await ref
    # It has left its place at once, though the thread is still taken.
    await until(lambda: unit.core.admission.running == 1)
    assert unit.core.counts.cancelled == 0
    running.cancel()
    with pytest.raises(RequestCancelledError):
        await running
    assert await asyncio.wait_for(handle.quick.remote(5), 5) == 5
    await until(lambda: unit.core.admission.running == 1)
    await handle.let_go.remote()
    await is_idle(unit)
    assert unit.core.counts.cancelled == 1
    assert unit.core.counts.wasted > 0
    assert [name for name, what in happened if what == "began"] == ["running"]
    # One never came to the router: it waited for its argument.
    assert router.cancelled == 5
    assert router.queued == router.in_flight == 0
    # What was left behind has harmed no count.
    assert await asyncio.gather(*[handle.plain.remote(i) for i in range(50)]) == list(range(50))
    await is_idle(unit)
    assert unit.core._active == 0


@gen_cluster(client=True)
async def test_a_deadline_wherever_it_is(c, s, a, b):
    handle = await serve.run(Leaf.options(max_ongoing_requests=2).bind(), route_prefix=None, client=c)
    unit = unit_of("Leaf", a, b)
    timed = handle.block.options(request_timeout_s=0.3)
    refs = [timed.remote(str(i)) for i in range(5)]
    refs.append(timed.remote(refs[0]))
    for ref in refs:
        with pytest.raises(RequestTimeoutError):
            await asyncio.wait_for(ref, 5)
    await until(lambda: unit.core.admission.running == 1)
    await handle.let_go.remote()
    await is_idle(unit)
    assert [what for _, what in happened].count("began") == 1
    assert unit.core.counts.cancelled == 1


@gen_cluster(client=True)
async def test_cancelled_in_every_moment(c, s, a, b):
    """Whenever the cancel comes, the call is answered once and the counts are right."""
    handle = await serve.run(Leaf.options(max_ongoing_requests=8, threads=3).bind(), route_prefix=None, client=c)
    unit = unit_of("Leaf", a, b)
    router = router_of(handle)
    loop = asyncio.get_running_loop()
    for turn in range(40):
        refs = [(handle.plain if i % 2 else handle.quick).remote(i) for i in range(20)]
        for number, ref in enumerate(refs[::2]):
            loop.call_later(turn * 1e-4 + number * 5e-5, ref.cancel)
        for number, ref in enumerate(refs):
            try:
                assert await asyncio.wait_for(ref, 10) == number
            except RequestCancelledError:
                assert number % 2 == 0
    await until(lambda: router.in_flight == 0)
    await is_idle(unit)
    assert router.queued == 0
    await is_idle(unit)
    assert unit.core._active == 0


@gen_cluster(client=True)
async def test_a_client_that_goes_away(c, s, a, b):
    app = Outer.bind(Middle.bind(Leaf.bind()))
    await serve.start(client=c, port=0)
    await serve.run(app, client=c)
    url = httpx.URL(await serve.url(client=c))
    units = [unit_of(name, a, b) for name in ("Outer", "Middle", "Leaf")]
    for method in ("awaits", "blocks", "awaits_something_else"):
        happened.clear()
        with socket.create_connection((url.host, url.port)) as sock:
            sock.sendall(f"GET /?method={method} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await until(lambda: any(what == "began" for _, what in happened))
        await until(lambda: any(what == "cancelled" for _, what in happened))
        await is_idle(*units)
    assert all(unit.core.counts.cancelled >= 3 for unit in units)
    text = (await asyncio.to_thread(httpx.get, url.join("/-/metrics"))).text
    assert 'dask_serve_router_requests_total{application="default",deployment="Outer",outcome="cancelled"} 3' in text


@gen_cluster(client=True)
async def test_work_for_nobody_is_counted(c, s, a, b):
    """Heartbeats carry it to the scheduler."""
    handle = await serve.run(Leaf.bind(), route_prefix=None, client=c)
    ref = handle.remote()
    await until(lambda: ("leaf", "began") in happened)
    ref.cancel()
    unit = unit_of("Leaf", a, b)
    await until(lambda: unit.core.counts.cancelled == 1)
    worker = unit._worker
    await worker.heartbeat()
    (status,) = [one for one in (await serve.status(client=c)).workers if one.address == worker.address]
    counts = status.replicas[unit.id]
    assert counts["dropped"] == 1
    assert counts["seconds_wasted"] == unit.core.counts.wasted > 0


# -- books -------------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_nothing_is_left_of_calls_that_ended(c, s, a, b):
    handle = await serve.run(Leaf.bind(), route_prefix=None, client=c)
    assert await handle.quick.remote() == 1
    context = RequestContext("id")
    token = request_context.set(context)
    try:
        assert context._under_way is None
        for _ in range(3):
            refs = [handle.quick.remote(i) for i in range(50)]
            assert len(context._under_way) == 50
            assert await asyncio.gather(*refs) == list(range(50))
            assert not context._under_way
        # A ref that is dropped, an argument that cannot be pickled, and one that is cancelled.
        handle.quick.remote()
        with pytest.raises(TypeError):
            await handle.quick.remote(threading.Lock())
        handle.remote().cancel()
        await until(lambda context=context: not context._under_way)
        # Threads that wait with a time-out, again and again.
        gate = handle.remote("gate")
        for _ in range(3):
            assert not await asyncio.to_thread(gate._wait_in_thread, 0.01)
        assert list(context._under_way) == [gate._local]
        del gate
        context.cancel(refuse=True)
        await until(lambda: ("gate", "cancelled") in happened)
        assert not context._under_way
        refused = handle.quick.remote()
        assert refused.cancelled()
        with pytest.raises(RequestCancelledError):
            await refused
        assert not context._under_way
    finally:
        request_context.reset(token)


def _note(barrier: threading.Barrier, context: RequestContext, number: int, cancelled: list[int]) -> None:
    barrier.wait(5)
    context.note(number, lambda: cancelled.append(number))


def _cancel(barrier: threading.Barrier, context: RequestContext) -> None:
    barrier.wait(5)
    context.cancel(refuse=True)


def test_noting_and_cancelling_at_once():
    """From many threads: whatever is noted in a request that refuses is cancelled, before or after."""
    for _ in range(200):
        context = RequestContext("id")
        cancelled: list[int] = []
        barrier = threading.Barrier(4)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            done = [pool.submit(_note, barrier, context, i, cancelled) for i in range(3)]
            done.append(pool.submit(_cancel, barrier, context))
            for future in done:
                future.result(5)
        assert set(cancelled) == {0, 1, 2}


@gen_cluster(client=True)
async def test_a_cancelled_request_is_no_error_in_the_log(c, s, a, b):
    handle = await serve.run(Middle.bind(Leaf.bind()), route_prefix=None, client=c)
    with captured_logger("dask_serve") as log:
        await begun_then_cancelled(handle.blocks.remote(), "leaf")
        await is_idle(unit_of("Middle", a, b))
    assert "failed" not in log.getvalue()
