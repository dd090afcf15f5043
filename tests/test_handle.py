"""Handles: everywhere they are used, with everything they are given, and all that can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import threading
import time
import warnings
from typing import Any

import cloudpickle
import psutil
import pytest
import uvloop
from distributed import Client, LocalCluster, get_client, wait
from distributed.utils_test import captured_logger, gen_cluster, inc
from helpers import stored, until

import dask_serve as serve
from dask_serve.exceptions import (
    DeploymentUnavailableError,
    MethodNotFoundError,
    NotRunningError,
    PayloadError,
    RequestCancelledError,
    RequestTimeoutError,
    ServeError,
    UserCodeError,
)
from dask_serve.handle import DeploymentHandle
from dask_serve.replica.process import ServeProcess
from dask_serve.routing.session import Session

LARGE = 100_000


class NotPicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class NotUnpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.seen: list[str] = []
        self.go = threading.Event()

    def __call__(self, x):
        return x + 1

    async def gate(self, value):
        self.seen.append("began")
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        return value

    async def unlock(self):
        self.open.set()

    def block(self, value):
        self.seen.append("began")
        self.go.wait(10)
        self.seen.append("finished")
        return value

    async def let_go(self):
        self.go.set()

    async def what_happened(self):
        return list(self.seen)

    async def after(self, delay, value):
        await asyncio.sleep(delay)
        return value

    def kind(self, value):
        return type(value).__name__

    def large(self, n=LARGE):
        return b"x" * n

    def size(self, *values, **named):
        return [len(value) for value in [*values, *named.values()]]

    def fail(self, text):
        raise ValueError(text)

    def fail_with(self, kind):
        raise NotPicklable("a lock") if kind == "pickle" else NotUnpicklable("one", "two")

    def lock(self):
        return threading.Lock()

    async def remaining(self):
        deadline = serve.get_request_context().deadline
        return None if deadline is None else deadline - time.monotonic()


@serve.deployment
class Caller:
    """Calls another deployment."""

    def __init__(self, other: DeploymentHandle) -> None:
        self.other = other
        self.outcome: Any = None

    async def asynchronous(self, x):
        return await self.other.remote(x)

    def synchronous(self, x):
        return self.other.remote(x).result(timeout=10)

    async def result_in_a_coroutine(self, x):
        return self.other.remote(x).result()

    def in_a_thread(self, x):
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(self.other.remote(x).result(10)))
        thread.start()
        thread.join(10)
        return found[0]

    async def in_a_loop_of_its_own(self, x):
        async def call():
            return await self.other.remote(x)

        return await asyncio.to_thread(asyncio.run, call())

    async def large(self):
        ref = self.other.large.remote()
        return len(await ref), await self.other.size.remote(ref)

    async def hand_back(self):
        return await self.other.large.remote()

    def fail(self):
        self.other.fail.remote("deep").result()

    async def child_deadline(self):
        return await self.other.remaining.remote()

    async def slow_child(self):
        try:
            return await self.other.gate.remote(1)
        except BaseException as error:
            self.outcome = type(error).__name__
            raise

    async def what_came(self):
        return self.outcome

    async def forward(self, handle, x):
        return await handle.remote(x)


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose two workers are processes with one thread each."""
    yield serve.run(Model.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


# -- where handles are used --------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_a_handle_can_be_pickled(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    chosen = handle.after.options(request_timeout_s=5, retries_on_loss=1)
    for dumps in (pickle.dumps, cloudpickle.dumps):
        for original in (handle, chosen):
            copy = pickle.loads(dumps(original))
            assert copy == original
            assert hash(copy) == hash(original)
            assert repr(copy) == repr(original)
        assert await pickle.loads(dumps(handle)).remote(1) == 2
        assert await pickle.loads(dumps(chosen)).remote(0, "x") == "x"
    assert chosen != handle
    assert handle.after == handle.options(method_name="after")


def test_in_threads(client, handle):
    results: dict[int, list[int]] = {}

    def call(number: int) -> None:
        results[number] = [handle.remote(i).result(10) for i in range(20)]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {number: list(range(1, 21)) for number in range(8)}


def test_in_dask_tasks(client, handle):
    assert client.submit(lambda h: h.remote(1).result(), handle).result(10) == 2
    assert client.gather(client.map(lambda x, h: h.remote(x).result(), range(5), h=handle)) == [1, 2, 3, 4, 5]

    async def coroutine(h):
        return await h.remote(1)

    assert client.submit(coroutine, handle).result(10) == 2

    def in_a_thread(h):
        found = []
        thread = threading.Thread(target=lambda: found.append(h.remote(1).result(10)))
        thread.start()
        thread.join(10)
        return found

    assert client.submit(in_a_thread, handle).result(10) == [2]
    # A ref that is made in a task and returned by it.
    assert client.submit(lambda h: h.large.remote().result(), handle).result(10) == b"x" * LARGE

    def with_its_own_client(h):
        return h.remote(get_client().submit(inc, 1)).result(10)

    # Both threads of the cluster wait for tasks that need one: a task that waits gives its own back.
    futures = [client.submit(with_its_own_client, handle, pure=False) for _ in range(4)]
    assert client.gather(futures) == [3] * 4


@gen_cluster(client=True)
async def test_in_replicas(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    assert await handle.asynchronous.remote(1) == 2
    assert await handle.synchronous.remote(1) == 2
    with pytest.raises(ServeError, match="await"):
        await asyncio.wait_for(handle.result_in_a_coroutine.remote(1), 5)
    assert await handle.in_a_thread.remote(1) == 2
    assert await handle.in_a_loop_of_its_own.remote(1) == 2
    assert await handle.large.remote() == (LARGE, [LARGE])
    assert len(await handle.hand_back.remote()) == LARGE
    model = await serve.get_deployment_handle("Model", client=c)
    assert await handle.forward.remote(model, 1) == 2
    with pytest.raises(ValueError, match="deep") as caught:
        await handle.fail.remote()
    assert "self.other.fail.remote" in str(caught.value.__cause__)
    gc.collect()
    await until(lambda: stored() == 0)


def sockets() -> int:
    """Connections of this process."""
    return len(psutil.Process().net_connections("tcp"))


def test_many_loops_one_after_the_other(client, handle):
    """Each leaves nothing behind, neither here nor in the replica's process."""
    handle = handle.options(sync=False)

    async def main(count: int) -> int:
        first = await (await handle.remote(1))
        assert [await ref for ref in [await handle.remote(i) for i in range(count)]] == list(range(1, count + 1))
        assert len(await (await handle.large.remote())) == LARGE
        return first

    assert asyncio.run(main(3)) == 2
    session = Session.of(client)
    before = sockets()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            assert (uvloop.run if number % 2 else asyncio.run)(main(3)) == 2
            assert not session._fabrics
        gc.collect()
    assert sockets() <= before


def test_a_loop_that_ends_before_its_calls(client, handle):
    """Nobody waits for them any more: they are cancelled, also those that were made in the last step."""
    handle = handle.options(sync=False)

    async def at_once() -> Any:
        return await handle.gate.remote(1)

    async def later() -> Any:
        ref = await handle.gate.remote(1)
        await (await handle.remote(1))
        return ref

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for main in (at_once, later):
            ref = asyncio.run(main())
            with pytest.raises(ServeError):
                ref.result(5)
        gc.collect()
    assert not Session.of(client)._fabrics


def test_many_loops_at_once(client, handle):
    shared = handle.options(sync=False)
    failed: list[BaseException] = []

    async def main() -> None:
        for i in range(100):
            assert await (await shared.remote(i)) == i + 1
            if i % 10 == 0:
                refs = [await shared.remote(n) for n in range(5)]
                assert [await ref for ref in refs] == [1, 2, 3, 4, 5]

    def run(number: int) -> None:
        try:
            (uvloop.run if number % 2 else asyncio.run)(main())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed


def test_a_synchronous_client_in_a_loop(client, handle):
    """As in a notebook: the background loop carries the calls, `result` blocks and `await` works."""

    async def main() -> tuple[int, int]:
        return handle.remote(1).result(5), await handle.remote(1)

    assert asyncio.run(main()) == (2, 2)


def test_sync_false_outside_a_loop(client, handle):
    with pytest.raises(ServeError, match="sync=True"):
        handle.options(sync=False).remote(1)
    with pytest.raises(ServeError, match="sync=True"):
        Model.get_handle(sync=False).remote(1)


@gen_cluster(client=True)
async def test_sync_false_with_an_asynchronous_client(c, s, a, b):
    handle = (await serve.run(Model.bind(), route_prefix=None, client=c)).options(sync=False)
    ref = await handle.remote(1)
    assert isinstance(ref, serve.DeploymentResponse)
    assert await ref == 2
    assert await (await handle.remote(await handle.remote(1))) == 3
    # What was not awaited for the ref is taken as an argument all the same.
    assert await (await handle.remote(handle.remote(1))) == 3


# -- refs and Dask futures as arguments --------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_refs_as_arguments(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    tasks = set(s.tasks)
    assert await handle.remote(handle.after.remote(0.05, 1)) == 2
    finished = handle.remote(1)
    await finished
    assert await handle.remote(finished) == 3
    assert await handle.remote(x=finished) == 3
    large, pending = handle.large.remote(), handle.after.remote(0.05, b"x" * LARGE)
    await wait(large)
    assert await handle.size.remote(large, pending, large, named=large) == [LARGE] * 4
    nested = {"a": [handle.after.remote(0.05, 5), (finished,)], "b": {"c": large}}
    assert await handle.after.remote(0, nested) == {"a": [5, (2,)], "b": {"c": b"x" * LARGE}}
    assert await handle.kind.remote(finished) == "int"
    # Something beside it that only cloudpickle can pickle.
    assert await handle.after.remote(0, [finished, lambda: 1, large]) is not None
    chain = handle.remote(0)
    for _ in range(20):
        chain = handle.remote(chain)
    assert await chain == 21
    assert set(s.tasks) == tasks
    del large, pending, nested
    gc.collect()
    await until(lambda: stored() == 0)


@gen_cluster(client=True)
async def test_dask_futures_as_arguments(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    finished = c.submit(inc, 1, workers=[b.address])
    await finished
    assert await handle.remote(finished) == 3
    assert await handle.remote(c.submit(inc, 5)) == 7
    assert await handle.after.remote(0, {"x": [c.submit(inc, 1), handle.remote(1)]}) == {"x": [2, 2]}
    (scattered,) = await c.scatter([b"x" * LARGE])
    assert await handle.size.remote(scattered) == [LARGE]
    # It lives as long as the call, whoever drops it.
    ref = handle.after.remote(0.1, c.submit(inc, 1))
    gc.collect()
    assert await ref == 2

    with pytest.raises(ZeroDivisionError):
        await handle.remote(c.submit(lambda: 1 / 0))
    cancelled = c.submit(time.sleep, 0.1)
    await cancelled.cancel()
    with pytest.raises(Exception, match="cancel"):
        await asyncio.wait_for(handle.remote(cancelled), 5)


@gen_cluster(client=True)
async def test_a_failed_argument_fails_the_call(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    failed = handle.fail.remote("upstream")
    with pytest.raises(ValueError, match="upstream") as caught:
        await handle.gate.remote(failed)
    assert "raise ValueError" in str(caught.value.__cause__)
    # It does not wait for the others.
    with pytest.raises(ValueError, match="early"):
        await asyncio.wait_for(handle.gate.remote([handle.gate.remote(1), handle.fail.remote("early")]), 5)
    cancelled = handle.gate.remote(1)
    dependent = handle.remote(cancelled)
    cancelled.cancel()
    with pytest.raises(RequestCancelledError):
        await dependent
    assert (await handle.what_happened.remote()).count("began") <= 2


@gen_cluster(client=True)
async def test_cancelled_while_it_waits_for_arguments(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    assert await handle.remote(1) == 2
    pending = handle.gate.remote(1)
    dependent = handle.remote(pending)
    again = handle.remote(dependent)
    await asyncio.sleep(0)
    dependent.cancel()
    for ref in (dependent, again):
        with pytest.raises(RequestCancelledError):
            await asyncio.wait_for(ref, 5)
    assert not pending.done()
    # The router has not lost count.
    (router,) = Session.of(c).fabric(asyncio.get_running_loop()).routers.values()
    assert router.queued == 0
    await handle.unlock.remote()
    assert await pending == 1
    assert await asyncio.gather(*[handle.remote(i) for i in range(200)]) == list(range(1, 201))
    with pytest.raises(RequestTimeoutError, match="argument"):
        await handle.options(request_timeout_s=0.1).remote(handle.after.remote(1, 1))


def test_arguments_from_threads_and_loops(client, handle):
    """The one that settles an argument is not the one that carries the call."""
    asynchronous = handle.options(sync=False)
    pending = handle.after.remote(0.2, 1)
    large = handle.after.remote(0.2, b"x" * LARGE)

    async def main() -> tuple[int, list[int]]:
        ref = await asynchronous.remote(pending)
        size = await asynchronous.size.remote(large)
        mine = await asynchronous.remote(1)
        assert await asyncio.to_thread(lambda: handle.remote(mine).result(5)) == 3
        return await ref, await size

    assert asyncio.run(main()) == (2, [LARGE])
    assert handle.size.remote(large).result(5) == [LARGE]
    future = client.submit(inc, 1)
    assert handle.remote(future).result(5) == 3
    slow = client.submit(lambda: time.sleep(0.2) or 1)

    async def other() -> int:
        return await (await asynchronous.remote(slow))

    assert asyncio.run(other()) == 2
    moved = client.submit(len, large)
    assert handle.size.remote(large).result(5) == [LARGE]
    assert moved.result(5) == LARGE


# -- cancelling --------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_cancel(c, s, a, b):
    model = Model.options(max_ongoing_requests=1)
    handle = await serve.run(model.bind(), route_prefix=None, client=c)
    running = handle.gate.remote(1)
    # One may be admitted ahead; the last certainly waits.
    queued = [handle.gate.remote(i) for i in range(3)]
    (router,) = Session.of(c).fabric(asyncio.get_running_loop()).routers.values()
    (unit,) = ServeProcess.units_of(a) + ServeProcess.units_of(b)
    await until(lambda: unit.user.instance.seen)
    queued[-1].cancel()
    with pytest.raises(RequestCancelledError):
        await queued[-1]
    running.cancel()
    with pytest.raises(RequestCancelledError):
        await running
    for ref in queued:
        ref.cancel()
    await until(lambda: not router.in_flight and not router.queued)
    seen = await asyncio.wait_for(handle.what_happened.remote(), 5)
    assert "cancelled" in seen
    assert seen.count("began") == seen.count("cancelled") <= 3


@gen_cluster(client=True)
async def test_cancel_of_a_def(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.block.remote(1)
    seen: list[str] = []

    async def happened(what: str) -> bool:
        seen[:] = await handle.what_happened.remote()
        return what in seen

    await until(lambda: happened("began"))
    ref.cancel()
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 2)
    await handle.let_go.remote()
    await until(lambda: happened("finished"))
    assert await handle.remote(1) == 2


@gen_cluster(client=True)
async def test_an_awaiting_task_is_cancelled(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    model = await serve.get_deployment_handle("Model", client=c)

    async def begun() -> bool:
        return "began" in await model.what_happened.remote()

    task = asyncio.ensure_future(handle.slow_child.remote())
    await until(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def through() -> bool:
        return "cancelled" in await model.what_happened.remote()

    # The replica's coroutine is cancelled where it awaits, and cancels its own call in turn.
    await until(through)
    assert await handle.what_came.remote() == "CancelledError"
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(model.gate.remote(1), 0.05)

    async def twice() -> bool:
        return (await model.what_happened.remote()).count("cancelled") == 2

    await until(twice)


def test_cancel_from_another_thread(client, handle):
    asynchronous = handle.options(sync=False)

    async def main() -> None:
        refs = [await asynchronous.gate.remote(i) for i in range(20)]
        await (await asynchronous.remote(1))
        await asyncio.to_thread(lambda: [ref.cancel() for ref in refs])
        for ref in refs:
            with pytest.raises(RequestCancelledError):
                await asyncio.wait_for(ref, 5)
        assert await (await asynchronous.remote(1)) == 2

    asyncio.run(main())
    # Cancelled in the same breath.
    refs = [handle.gate.remote(1) for _ in range(100)]
    for ref in refs:
        ref.cancel()
    for ref in refs:
        with pytest.raises(RequestCancelledError):
            ref.result(5)
    assert [handle.remote(i).result(5) for i in range(5)] == [1, 2, 3, 4, 5]


# -- deadlines ---------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_deadlines(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.options(max_ongoing_requests=2).bind()), route_prefix=None, client=c)
    model = await serve.get_deployment_handle("Model", client=c)
    assert await model.remaining.remote() is None
    assert 0 < await model.remaining.options(request_timeout_s=5).remote() < 5
    # Running.
    with pytest.raises(RequestTimeoutError, match="deadline"):
        await model.gate.options(request_timeout_s=0.1).remote(1)
    # Queued.
    holding = [model.gate.remote(i) for i in range(4)]
    with pytest.raises(RequestTimeoutError, match="waiting at the router"):
        await asyncio.gather(*[model.gate.options(request_timeout_s=0.2).remote(i) for i in range(5)])
    for ref in holding:
        ref.cancel()
    # Inherited, and no longer than its own.
    assert 0 < await handle.child_deadline.options(request_timeout_s=5).remote() < 5
    assert await handle.child_deadline.remote() is None
    begun = time.monotonic()
    with pytest.raises(RequestTimeoutError):
        await handle.slow_child.options(request_timeout_s=0.2).remote()
    assert time.monotonic() - begun < 2
    with pytest.raises(TimeoutError):
        await model.gate.options(request_timeout_s=0.05).remote(1)


# -- errors ------------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_errors_of_user_code(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.fail.remote("no")
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="no") as caught:
            await ref
        assert "raise ValueError(text)" in str(caught.value.__cause__)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert await ref.exception() is not errors[0]
    for kind, text in (("pickle", "NotPicklable: a lock"), ("unpickle", "NotUnpicklable: one")):
        with pytest.raises(UserCodeError, match=text) as caught:
            await handle.fail_with.remote(kind)
        assert "fail_with" in str(caught.value)


@gen_cluster(client=True)
async def test_what_cannot_be_pickled_fails_its_own_call(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    good = handle.after.remote(0.1, 1)
    with pytest.raises(PayloadError, match="lock"):
        await handle.remote(threading.Lock())
    with pytest.raises(PayloadError, match="lock"):
        await handle.remote([good, threading.Lock()])
    with pytest.raises(PayloadError, match="result"):
        await handle.lock.remote()
    assert await good == 1


@gen_cluster(client=True)
async def test_unknown_methods_and_options(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    with pytest.raises(MethodNotFoundError, match=r"no method 'predcit'.*__call__.*after.*gate"):
        await handle.predcit.remote(1)
    with pytest.raises(AttributeError):
        handle._private  # noqa: B018
    with pytest.raises(serve.ConfigError, match="no option 'timeout'"):
        handle.options(timeout=1)
    for wrong in (0, -1):
        with pytest.raises(serve.ConfigError, match="request_timeout_s"):
            handle.options(request_timeout_s=wrong)
    with pytest.raises(serve.ConfigError, match="retries_on_loss"):
        handle.options(retries_on_loss=-1)


@gen_cluster(client=True)
async def test_deleted_and_deployed_again(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    assert await handle.remote(1) == 2
    await serve.delete("default", client=c)
    for _ in range(2):
        with pytest.raises(DeploymentUnavailableError, match=r"default/Model.*serve\.run"):
            await asyncio.wait_for(handle.remote(1), 5)
    await serve.run(Model.bind(), route_prefix=None, client=c)
    assert await asyncio.wait_for(handle.remote(1), 5) == 2


@gen_cluster(client=True)
async def test_an_ended_replica_leaves_its_object(c, s, a, b):
    """What it began for its calls lives on in the process: the session, connections, timers."""
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    assert await handle.asynchronous.remote(1) == await handle.synchronous.remote(1) == 2
    assert await handle.large.remote() == (LARGE, [LARGE])

    def objects() -> list[Any]:
        gc.collect()
        return [found for found in gc.get_objects() if type(found).__name__ in {"Caller", "Model"}]

    assert len(objects()) == 2
    await serve.delete("default", client=c)
    await until(lambda: not objects())


@gen_cluster(client=True)
async def test_no_service_on_the_cluster(c, s, a, b):
    handle = DeploymentHandle("default", "Model", s.address, client=c)
    begun = time.monotonic()
    with captured_logger("distributed.core"):
        with pytest.raises(DeploymentUnavailableError, match="does not run"):
            await asyncio.wait_for(handle.remote(1), 10)
        assert time.monotonic() - begun < 5

        # Another loop, later.
        async def call() -> Any:
            with pytest.raises(DeploymentUnavailableError, match="does not run"):
                await asyncio.wait_for(handle.options(sync=False).remote(1).ref, 5)

        await asyncio.to_thread(asyncio.run, call())
        # The service comes, and the same handle works.
        await serve.run(Model.bind(), route_prefix=None, client=c)
        await until(lambda: _answers(handle))


async def _answers(handle: DeploymentHandle) -> bool:
    with contextlib.suppress(DeploymentUnavailableError):
        return await handle.remote(1) == 2
    return False


def test_no_client():
    with pytest.raises(NotRunningError, match=r"tcp://127\.0\.0\.1:1"):
        DeploymentHandle("default", "Model", "tcp://127.0.0.1:1").remote(1)


def test_a_closed_client(client, handle):
    with Client(client.scheduler.address, set_as_default=False) as other:
        its = serve.get_app_handle(client=other)
        pending = its.gate.remote(1)
        done = its.remote(1)
        assert done.result(5) == 2
    with pytest.raises(ServeError):
        pending.result(5)
    assert done.result(5) == 2
    # Another client of the same cluster takes over.
    assert its.remote(1).result(5) == 2


# -- two clusters ------------------------------------------------------------------------------------------------------


def test_two_clusters(loop):
    options = {
        "n_workers": 1,
        "threads_per_worker": 2,
        "processes": False,
        "dashboard_address": ":0",
        "protocol": "tcp",
        "host": "127.0.0.1",
    }
    with LocalCluster(loop=loop, **options) as one, LocalCluster(loop=loop, **options) as two:
        with Client(one, set_as_default=False, loop=loop) as c1, Client(two, loop=loop) as c2:
            first = serve.run(Model.bind(), route_prefix=None, client=c1)
            second = serve.run(Model.bind(), name="other", route_prefix=None, client=c2)
            assert first.remote(1).result(5) == 2
            assert second.remote(1).result(5) == 2
            # The default client is the second's: a handle is not swayed by it.
            copy = pickle.loads(pickle.dumps(first))
            assert copy.remote(1).result(5) == 2
            # Refs and futures of one as arguments of the other.
            assert first.remote(second.remote(1)).result(5) == 3
            assert first.size.remote(second.large.remote()).result(5) == [LARGE]
            future = c2.submit(inc, 1)
            with pytest.raises(PayloadError, match="another cluster"):
                first.remote(future).result(5)
            assert c1.submit(lambda h: h.remote(1).result(), first).result(5) == 2
            # A scheduler has several names; the workers know it by another one than this session does.
            with Client(one.scheduler_address.replace("127.0.0.1", "localhost"), set_as_default=False, loop=loop) as c3:
                third = serve.get_app_handle(client=c3)
                assert c3.submit(lambda h: h.remote(2).result(5), third).result(10) == 3
            serve.shutdown(client=c1)
            serve.shutdown(client=c2)
