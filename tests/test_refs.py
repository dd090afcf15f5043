"""Refs: their state across threads and loops, and what Dask's own functions make of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import uvloop
from distributed import Client, Future, Queue, Variable, as_completed, wait
from distributed.utils_test import captured_logger, gen_cluster
from helpers import Graphs, stored, until

import dask_serve as serve
from dask_serve import response
from dask_serve.exceptions import RequestCancelledError, ServeError
from dask_serve.routing.engine import Engine
from dask_serve.routing.outcome import Outcome
from dask_serve.routing.session import Session
from dask_serve.routing.state import RefState
from dask_serve.wire import payloads

LARGE = 100_000


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()

    def __call__(self, x):
        return x + 1

    async def after(self, delay, value):
        await asyncio.sleep(delay)
        return value

    async def gate(self, value):
        await self.open.wait()
        return value

    async def unlock(self):
        self.open.set()

    def large(self, n=LARGE):
        return b"x" * n

    def fail(self, text):
        raise ValueError(text)

    def fail_because(self, text):
        try:
            self.fail(text)
        except ValueError as error:
            raise KeyError(text) from error


def inc(x):
    return x + 1


def settled(value: Any) -> Outcome:
    return Outcome(parts=payloads.dumps(value))


def new_state() -> RefState:
    return RefState("method", (), "id")


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Run a function in many threads at once and return what it returned or raised."""
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait(10)
        try:
            results[number] = function(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@contextlib.contextmanager
def counted(scheduler: Any) -> Iterator[Graphs]:
    graphs = Graphs()
    scheduler.add_plugin(graphs)
    try:
        yield graphs
    finally:
        scheduler.remove_plugin(name="graphs")


# -- the state ---------------------------------------------------------------------------------------------------------


def test_state_is_settled_once_whoever_tries():
    for _ in range(50):
        state = new_state()
        calls: list[int] = []
        state.on_done(lambda calls=calls: calls.append(1))
        won = in_threads(4, lambda number, state=state: state.settle("finished", settled(number)))
        assert sorted(won) == [False, False, False, True]
        assert calls == [1]
        assert payloads.loads(state.outcome.parts) == won.index(True)


def test_callbacks_run_exactly_once_when_they_race_with_settling():
    for _ in range(100):
        state = new_state()
        calls: list[int] = []

        def act(number: int, state: RefState = state, calls: list[int] = calls) -> None:
            if number:
                state.on_done(lambda: calls.append(number))
            else:
                state.settle("finished", settled(0))

        in_threads(4, act)
        assert sorted(calls) == [1, 2, 3]


def test_a_failing_callback_hides_the_outcome_from_nobody():
    state = new_state()
    calls: list[int] = []
    state.on_done(lambda: 1 / 0)
    state.on_done(lambda: calls.append(1))
    with captured_logger("dask_serve.refs", level=logging.ERROR) as log:
        assert state.settle("finished", settled(1))
    assert calls == [1]
    assert "ZeroDivisionError" in log.getvalue()


def test_sixteen_threads_wait_for_one_state():
    state = new_state()
    timer = threading.Timer(0.1, state.settle, ("finished", settled(1)))
    timer.start()
    assert in_threads(16, lambda number: state.wait_in_thread(10)) == [True] * 16


def test_waiting_in_slices_leaves_nothing_behind():
    state = new_state()
    for _ in range(100):
        assert not state.wait_in_thread(0.0001)
    assert len(state._callbacks) < 3


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_state_is_settled_from_a_foreign_thread_while_the_loop_idles(new_loop):
    state = new_state()
    loop = new_loop()

    async def main() -> float:
        # The loop of the router is the running one, and the thread that settles is another.
        state.home = asyncio.get_running_loop()
        threading.Timer(0.05, state.settle, ("finished", settled(1))).start()
        begun = time.monotonic()
        await state.wait(10)
        return time.monotonic() - begun

    try:
        assert loop.run_until_complete(main()) < 2
    finally:
        loop.close()


def test_one_state_awaited_in_three_loops_at_once():
    state = new_state()
    kinds = [asyncio.new_event_loop, uvloop.new_event_loop, asyncio.new_event_loop]

    def run(number: int) -> float:
        if number == 3:
            time.sleep(0.1)
            state.settle("finished", settled(1))
            return 0.0
        loop = kinds[number]()
        begun = time.monotonic()
        try:
            loop.run_until_complete(state.wait(10))
        finally:
            loop.close()
        return time.monotonic() - begun

    for took in in_threads(4, run):
        assert took < 2


def test_a_loop_closed_while_it_waits_harms_nobody():
    state = new_state()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(state.wait())
    loop.run_until_complete(asyncio.sleep(0))
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(waiting)
    again = loop.create_task(state.wait())
    loop.run_until_complete(asyncio.sleep(0))
    # Closed the hard way, with the task still waiting.
    again._log_destroy_pending = False
    loop.close()
    done: list[int] = []
    state.on_done(lambda: done.append(1))
    assert state.settle("finished", settled(1))
    assert done == [1]
    assert state.wait_in_thread(0)


def test_timeout_of_a_wait_ends_the_wait_only():
    state = new_state()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await state.wait(0.01)

    asyncio.run(main())
    assert not state.wait_in_thread(0.01)
    assert state.status == "pending"
    state.settle("finished", settled(1))
    assert state.wait_in_thread(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_interrupts_a_wait():
    state = new_state()
    threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        state.wait_in_thread(None)
    assert time.monotonic() - begun < 2
    state.settle("finished", settled(1))


# -- an asynchronous client --------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_a_ref_is_a_future_and_costs_the_scheduler_nothing(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    with counted(s) as graphs:
        ref = handle.remote(1)
        assert isinstance(ref, Future)
        assert not ref.done()
        assert ref.status == "pending"
        assert await ref == 2
        assert await ref.result() == 2
        assert await ref.result(timeout="1s") == 2
        assert await ref.exception() is None
        assert await ref.traceback() is None
        assert ref.done()
        assert ref.status == "finished"
        assert not ref.cancelled()
        assert ref.request_id in repr(ref)
        assert "finished" in ref._repr_html_()
        assert str(ref) == repr(ref)
        assert hash(ref) == hash(ref)
        assert len({ref, handle.remote(1)}) == 2
        assert dask.base.tokenize(ref) == dask.base.tokenize(ref)
        # Chained, small and large.
        assert await handle.remote(handle.remote(handle.remote(1))) == 4
        assert len(await handle.after.remote(0, handle.large.remote())) == LARGE
        await wait([handle.remote(1) for _ in range(20)])
        async for done in as_completed([handle.remote(1) for _ in range(3)]):
            assert await done == 2
        ref.release()
        assert graphs.count == 0


@gen_cluster(client=True)
async def test_wait_and_as_completed(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    with counted(s) as graphs:
        refs = [handle.after.remote(0.1 * (3 - i), i) for i in range(3)]
        done, not_done = await wait(refs, return_when="FIRST_COMPLETED")
        assert refs[2] in done
        assert refs[0] in not_done
        done, not_done = await wait(refs)
        assert done == set(refs)
        assert not not_done

        refs = [handle.after.remote(0.1 * (3 - i), i) for i in range(3)]
        assert [await ref async for ref in as_completed(refs)] == [2, 1, 0]
        refs = [handle.after.remote(0.1 * (3 - i), i) for i in range(3)]
        assert [value async for _, value in as_completed(refs, with_results=True)] == [2, 1, 0]

        with pytest.raises(asyncio.TimeoutError):
            await wait([handle.gate.remote(1)], timeout=0.05)

        found = []
        refs = [handle.fail.remote("x"), handle.remote(1)]
        async for ref, value in as_completed(refs, with_results=True, raise_errors=False):
            found.append((ref.status, value if ref.status == "finished" else type(value[1])))
        assert sorted(found) == [("error", ValueError), ("finished", 2)]
        with pytest.raises(ValueError, match="bad"):
            async for _ in as_completed([handle.fail.remote("bad")], with_results=True):
                pass
        assert graphs.count == 0


@gen_cluster(client=True, clean_kwargs={"threads": False})  # Dask's thread for callbacks stays
async def test_add_done_callback(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    seen: list[Any] = []
    pending = handle.gate.remote(1)
    finished = handle.remote(1)
    failed = handle.fail.remote("x")
    await wait([finished, failed])
    for ref in (pending, finished, failed):
        ref.add_done_callback(seen.append)
        ref.add_done_callback(lambda ref: 1 / 0)
    await until(lambda: len(seen) == 2)
    await handle.unlock.remote()
    await until(lambda: len(seen) == 3)
    assert set(seen) == {pending, finished, failed}
    await failed.exception()


@gen_cluster(client=True)
async def test_gather_submit_map_delayed(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    refs = [handle.remote(i) for i in range(3)]
    assert await c.gather(refs) == [1, 2, 3]
    nested = {"a": [handle.remote(1), handle.after.remote(0.1, "late")], "b": (handle.large.remote(), 5)}
    values = await c.gather(nested)
    assert values["a"] == [2, "late"]
    assert values["b"] == (b"x" * LARGE, 5)

    assert await c.submit(inc, handle.remote(1)) == 3
    assert await c.submit(inc, handle.after.remote(0.1, 1)) == 2
    assert await c.submit(sum, [handle.remote(1), handle.after.remote(0.05, 1)]) == 3
    assert await c.submit(len, handle.large.remote()) == LARGE
    assert await c.submit(lambda d: d["x"][0], {"x": [handle.remote(1)]}) == 2
    assert await c.gather(c.map(inc, [handle.remote(i) for i in range(3)])) == [2, 3, 4]
    assert await c.gather(c.map(inc, [handle.after.remote(0.05, i) for i in range(3)])) == [1, 2, 3]

    ref = handle.large.remote()
    assert await c.compute(dask.delayed(len)(ref)) == LARGE
    assert await c.compute(dask.delayed(lambda box: len(box["r"][0]))({"r": [ref]})) == LARGE
    assert await c.compute(dask.delayed(inc)(handle.after.remote(0.05, 1))) == 2

    # One task a ref, however often it is used.
    with counted(s) as graphs:
        ref = handle.remote(1)
        key = ref.key
        assert ref.key == key
        assert graphs.count <= 1
        assert await c.submit(inc, ref) == 3
        assert await c.submit(inc, ref, pure=False) == 3
        assert graphs.count == 3


@gen_cluster(client=True)
async def test_gather_of_failures(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    done = handle.fail.remote("done")
    await wait(done)
    for ref in (done, handle.fail.remote("on its way")):
        with pytest.raises(ValueError):
            await c.gather([ref])
        with pytest.raises(ValueError):
            await c.submit(inc, ref)
    assert await c.gather([handle.remote(1), handle.fail.remote("x")], errors="skip") == [2]


@gen_cluster(client=True)
async def test_variables_and_published_data_sets(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    async with Client(s.address, asynchronous=True, set_as_default=False) as other:
        variable = Variable("v", client=c)
        await variable.set(handle.large.remote())
        future = await Variable("v", client=other).get()
        assert len(await other.gather(future)) == LARGE

        await c.publish_dataset(handle.after.remote(0.1, "late"), name="d")
        assert await (await other.get_dataset("d")) == "late"
        await c.unpublish_dataset("d")


@gen_cluster(client=True)
async def test_queues_and_collections(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    async with Client(s.address, asynchronous=True, set_as_default=False) as other:
        queue, theirs = Queue("q", client=c), Queue("q", client=other)
        for ref in (handle.remote(1), handle.large.remote(), handle.after.remote(0.05, "late")):
            await queue.put(ref)
        values = [await (await theirs.get(timeout=5)) for _ in range(3)]
        assert values == [2, b"x" * LARGE, "late"]
    # Blocks of an array: one that is here, one that is under way.
    refs = [handle.after.remote(0, np.arange(20_000)), handle.after.remote(0.05, np.arange(20_000))]
    blocks = [dask.array.from_delayed(dask.delayed(ref), (20_000,), int) for ref in refs]
    assert await c.compute(dask.array.concatenate(blocks).sum()) == 2 * sum(range(20_000))
    assert await c.gather(c.map(lambda x, y: x + y, [handle.remote(i) for i in range(3)], y=handle.remote(9))) == [
        11,
        12,
        13,
    ]


@gen_cluster(client=True)
async def test_traceback(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    made = await handle.fail.remote("x").traceback()
    last = traceback.extract_tb(made)[-1]
    assert (last.name, last.line) == ("fail", "raise ValueError(text)")
    assert last.filename == __file__
    assert "in fail" in "".join(traceback.format_tb(made))
    # Of an exception with a cause, its own.
    made = await handle.fail_because.remote("x").traceback()
    assert traceback.extract_tb(made)[-1].name == "fail_because"
    cancelled = handle.gate.remote(1)
    cancelled.cancel()
    assert await cancelled.traceback() is None
    # What text it may be, it does no harm.
    assert payloads.load_traceback("") is None
    assert payloads.load_traceback("Traceback (most recent call last):\nnonsense") is None


@gen_cluster(client=True)
async def test_a_ref_goes_on_after_its_promotion(c, s, a, b):
    """The value belongs to Dask then, and the ref reads it there."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    for make in (lambda: handle.large.remote(), lambda: handle.after.remote(0.1, b"x" * LARGE)):
        for first_wait in (False, True):
            ref = make()
            if first_wait:
                await ref._local.wait()
            assert await c.submit(len, ref) == LARGE
            assert len(await ref) == LARGE
            assert len(await ref.result()) == LARGE
            assert len(await c.gather(ref)) == LARGE
            assert await ref.exception() is None
            del ref
    # Promoted while the call runs, and awaited at once.
    ref = handle.after.remote(0.1, b"x" * LARGE)
    assert ref.key
    assert len(await ref) == LARGE
    # As an argument of another call.
    for first_wait in (False, True):
        ref = handle.after.remote(0.05, b"x" * LARGE)
        if first_wait:
            await ref._local.wait()
        assert ref.key
        assert len(await handle.after.remote(0, ref)) == LARGE
        assert len(await handle.after.remote(0, ref)) == LARGE


@gen_cluster(client=True)
async def test_awaited_elsewhere_after_promotion(c, s, a, b):
    """In other event loops and threads than the client's."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.large.remote()
    assert await c.submit(len, ref) == LARGE

    async def read() -> int:
        return len(await ref)

    assert await asyncio.to_thread(asyncio.run, read()) == LARGE


@gen_cluster(client=True)
async def test_errors_are_new_each_time_and_keep_no_frame_alive(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)

    class Canary:
        pass

    async def attempt() -> tuple[Any, BaseException, BaseException]:
        canary = Canary()
        ref = handle.fail.remote("no")
        errors = []
        for _ in range(2):
            with pytest.raises(ValueError, match="no") as caught:
                await ref
            errors.append(caught.value)
        assert "raise ValueError(text)" in str(errors[0].__cause__)
        return weakref.ref(canary), *errors

    canary, first, second = await attempt()
    assert first is not second
    del first, second
    gc.collect()
    assert canary() is None


@gen_cluster(client=True)
async def test_unread_errors_are_logged_once(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    with captured_logger("dask_serve.refs", level=logging.WARNING) as log:
        ref = handle.fail.remote("nobody looked")
        await wait(ref)
        del ref
        dropped = handle.fail.remote("dropped at once")
        del dropped
        await until(lambda: "dropped at once" in log.getvalue())
        read = handle.fail.remote("somebody looked")
        assert isinstance(await read.exception(), ValueError)
        del read
        cancelled = handle.gate.remote(1)
        cancelled.cancel()
        del cancelled
        await handle.remote(1)
        gc.collect()
    assert log.getvalue().count("Traceback") == 2
    assert "nobody looked" in log.getvalue()
    assert "somebody looked" not in log.getvalue()


@gen_cluster(client=True)
async def test_timeouts_never_cancel(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.gate.remote(7)
    for wait_for in (ref.result(timeout=0.02), ref.result("20ms"), ref.result(timeout_s=0.02), ref.exception(0.02)):
        with pytest.raises(asyncio.TimeoutError):
            await wait_for
    assert ref.status == "pending"
    await handle.unlock.remote()
    assert await ref == 7


@gen_cluster(client=True)
async def test_a_ref_cannot_be_retried(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.remote(1)
    with pytest.raises(ServeError, match="call"):
        ref.retry()
    assert await ref == 2


@gen_cluster(client=True)
async def test_dropped_refs_leave_nothing(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    before = set(s.tasks)
    held = [handle.large.remote() for _ in range(5)]
    await wait(held)
    assert stored() == 5
    del held
    await until(lambda: stored() == 0)
    # Dropped while they run.
    for _ in range(5):
        handle.large.remote()
    await handle.remote(1)
    await until(lambda: stored() == 0)
    # In a cycle, so that the collector does it.
    loop: list[Any] = [handle.large.remote()]
    loop.append(loop)
    await wait(loop[0])
    del loop
    gc.collect()
    await until(lambda: stored() == 0)
    assert set(s.tasks) == before


# -- a synchronous client ----------------------------------------------------------------------------------------------


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose workers are processes."""
    yield serve.run(Model.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


def graphs_of(client: Client) -> int:
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["graphs"].count)


def test_results_in_a_script(client, handle):
    client.register_plugin(Graphs())
    begun = graphs_of(client)
    ref = handle.remote(1)
    assert ref.result() == 2
    assert ref.result(timeout=1) == 2
    assert ref.exception() is None
    assert ref.traceback() is None
    failed = handle.fail.remote("x")
    assert isinstance(failed.exception(), ValueError)
    assert traceback.extract_tb(failed.traceback())[-1].name == "fail"
    with pytest.raises(ValueError, match="x"):
        handle.fail.remote("x").result()
    slow = handle.gate.remote(7)
    for arguments in ({"timeout": 0.02}, {"timeout": "20 ms"}, {"timeout_s": 0.02}):
        with pytest.raises(TimeoutError, match="goes on"):
            slow.result(**arguments)
    handle.unlock.remote().result()
    assert slow.result(5) == 7
    assert len(handle.large.remote().result()) == LARGE
    done, not_done = wait([handle.remote(i) for i in range(100)])
    assert len(done) == 100
    assert not not_done
    refs = [handle.after.remote(0.15 * (3 - i), i) for i in range(3)]
    assert [ref.result() for ref in as_completed(refs)] == [2, 1, 0]
    refs = [handle.after.remote(0.15 * (3 - i), i) for i in range(3)]
    assert [value for _, value in as_completed(refs, with_results=True)] == [2, 1, 0]
    with pytest.raises(ValueError, match="bad"):
        list(as_completed([handle.fail.remote("bad")], with_results=True))
    event = threading.Event()
    handle.remote(1).add_done_callback(lambda ref: event.set())
    assert event.wait(5)
    repr(slow), slow._repr_html_(), hash(slow), slow.release()
    assert graphs_of(client) == begun


def test_sixteen_threads_read_one_ref(client, handle):
    for ref in (handle.after.remote(0.2, "v"), handle.after.remote(0.2, b"x" * LARGE)):
        values = in_threads(16, lambda number, ref=ref: ref.result(10))
        assert len(set(values)) == 1
        assert values[0] in {"v", b"x" * LARGE}


def test_sixteen_threads_call(client, handle):
    def call(number: int) -> list[int]:
        return [handle.remote(i).result(10) for i in range(50)]

    assert in_threads(16, call) == [list(range(1, 51))] * 16


def test_one_ref_in_three_loops(client, handle):
    for value in ("v", b"x" * LARGE):
        ref = handle.after.remote(0.2, value)

        async def read(ref: Any = ref) -> Any:
            return await ref

        def act(number: int, read: Any = read, ref: Any = ref) -> Any:
            if number == 3:
                return ref.result(10)
            return uvloop.run(read()) if number == 1 else asyncio.run(read())

        assert in_threads(4, act) == [value] * 4


def test_dask_functions_from_a_script(client, handle):
    assert client.gather([handle.remote(1), handle.after.remote(0.1, 5)]) == [2, 5]
    assert client.gather({"a": [handle.large.remote()]}) == {"a": [b"x" * LARGE]}
    assert client.submit(inc, handle.remote(1)).result() == 3
    assert client.submit(inc, handle.after.remote(0.1, 1)).result() == 2
    assert client.submit(len, handle.large.remote()).result() == LARGE
    assert client.gather(client.map(inc, [handle.remote(i) for i in range(3)])) == [2, 3, 4]
    assert dask.delayed(inc)(handle.remote(1)).compute() == 3
    ref = handle.large.remote()
    assert client.submit(len, ref).result() == LARGE
    assert len(ref.result()) == LARGE
    with pytest.raises(ValueError):
        client.submit(inc, handle.fail.remote("x")).result()
    Variable("v").set(handle.remote(1))
    client.publish_dataset(handle.large.remote(), name="d")
    with Client(client.scheduler.address, set_as_default=False) as other:
        assert Variable("v", client=other).get().result() == 2
        assert len(other.get_dataset("d").result()) == LARGE
    client.unpublish_dataset("d")
    Queue("q").put(handle.remote(1))
    assert Queue("q").get(timeout=5).result() == 2
    block = dask.array.from_delayed(dask.delayed(handle.after.remote(0.05, np.arange(3))), (3,), int)
    assert block.sum().compute() == 3
    found = as_completed([handle.after.remote(0.2, 1), handle.fail.remote("x")], with_results=True, raise_errors=False)
    assert [ref.status for ref, _ in found] == ["error", "finished"]


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_refs_come_and_go(client, handle, count):
    """The collector may run anywhere, also in a thread that holds one of our locks, or one of somebody else's."""
    session = handle._session or Session.of(client)
    handle.remote(1).result()
    stop = threading.Event()
    mutex = threading.Lock()

    def collect() -> None:
        while not stop.is_set():
            with mutex, session._lock, Engine._lock, response._promotion:
                gc.collect(1)
                box: list[Any] = []
                box.append(box)
            time.sleep(0.001)

    thread = threading.Thread(target=collect)
    thread.start()
    thresholds = gc.get_threshold()
    gc.set_threshold(200, 5, 5)
    try:
        for number in range(20):
            refs: list[Any] = [handle.remote(i) for i in range(count)]
            if number % 2:
                wait(refs)
            if number % 3 == 0:
                refs.append(refs)
            with mutex:
                refs = []
        assert handle.remote(1).result(30) == 2
    finally:
        gc.set_threshold(*thresholds)
        stop.set()
        thread.join(10)
    del refs
    for number in range(100):
        refs = [handle.large.remote() for _ in range(5)]
        if number % 2:
            refs.append(refs)
            wait(refs[0])
        del refs
    gc.collect()
    (router,) = session.engine()[1].routers.values()
    deadline = time.monotonic() + 30
    while router.in_flight or router.queued:
        assert time.monotonic() < deadline, router
        time.sleep(0.01)
    assert router.answered == 20 * count + 502
    assert not router.failed
    gc.collect()
    assert not [left for left in gc.get_objects() if isinstance(left, (serve.DeploymentResponse, RefState))]
    while any(client.run(stored).values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_cancelled_refs(client, handle):
    ref = handle.gate.remote(1)
    ref.cancel()
    with pytest.raises(RequestCancelledError):
        ref.result(5)
    assert ref.cancelled()
    assert ref.status == "cancelled"
    ref.cancel()
    done = handle.remote(1)
    assert done.result() == 2
    done.cancel()
    assert done.result() == 2
    assert handle.remote(1).result(5) == 2
