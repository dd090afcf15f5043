"""Promotion: refs that become Dask tasks, with holders that are busy, paused or dead, and sessions that leave."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any
from unittest import mock

import pytest
from distributed import Client, Future, wait
from distributed.utils_test import gen_cluster, inc
from helpers import stored, until, wait_until

import dask_serve as serve
from dask_serve.controller import promises
from dask_serve.exceptions import ReplicaLostError, RequestCancelledError, RequestError
from dask_serve.replica.process import ServeProcess
from dask_serve.routing import promotion
from dask_serve.routing.session import Session

LARGE = 100_000


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()

    def __call__(self, x):
        return x

    async def gate(self, value):
        await self.open.wait()
        return value

    async def unlock(self):
        self.open.set()

    async def after(self, delay, value):
        await asyncio.sleep(delay)
        return value

    def large(self, n=LARGE):
        return b"x" * n

    def array(self, n):
        import numpy as np

        return np.arange(n)

    def fail(self, text):
        raise ValueError(text)


def stored_on(client: Client) -> int:
    """Results in the stores of all workers."""
    return sum(client.run(stored).values())


def holder_of(client: Client, app: str = "default") -> str:
    """The worker of the only replica."""
    (deployment,) = serve.status(client=client).applications[app].deployments.values()
    (replica,) = deployment.replicas
    return replica.worker


def others_of(client: Client) -> list[str]:
    holder = holder_of(client)
    return [address for address in client.nthreads() if address != holder]


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose two workers are processes with one thread each."""
    yield serve.run(Model.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


# -- what is left ------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_nothing_is_left(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    await handle.remote(1)
    tasks, futures = set(s.tasks), set(c.futures)

    def nothing_left() -> bool:
        return (
            set(s.tasks) == tasks
            and set(c.futures) == futures
            and not a.data
            and not b.data
            and not stored()
            and all(not visitor.stored for door in ServeProcess.doors() for visitor in door.connections)
        )

    # Finished: small, large, failed.
    refs = [handle.remote(1), handle.large.remote(), handle.fail.remote("x")]
    await wait(refs)
    promoted = [ref.key for ref in refs]
    assert len(promoted) == 3
    assert await c.submit(len, refs[1]) == LARGE
    await wait([Future(key, c) for key in promoted])
    del refs
    await until(nothing_left)

    # Under way; the promise is kept for a minute, but holds nothing large.
    refs = [handle.after.remote(0.05, 1), handle.after.remote(0.05, b"x" * LARGE)]
    assert await c.submit(inc, refs[0]) == 2
    assert await c.submit(len, refs[1]) == LARGE
    del refs
    await until(nothing_left)
    assert len(s.plugins["dask-serve"].promises) <= 2

    # A temporary, dropped right after the submit.
    assert await c.submit(len, handle.large.remote()) == LARGE
    ref = handle.large.remote()
    await wait(ref)
    future = c.submit(len, ref)
    del ref
    assert await future == LARGE
    del future
    await until(nothing_left)

    # Promoted and dropped before the task could run.
    ref = handle.large.remote()
    await wait(ref)
    ref.key  # noqa: B018
    del ref
    await handle.remote(1)
    await until(nothing_left)

    # Dropped while it is under way.
    ref = handle.gate.remote(b"x" * LARGE)
    ref.key  # noqa: B018
    del ref
    await handle.unlock.remote()
    await until(nothing_left)

    # Used by Dask and by another call at once.
    ref = handle.large.remote()
    await wait(ref)
    other = handle.after.remote(0.05, ref)
    future = c.submit(len, ref)
    del ref
    assert await future == LARGE
    assert len(await other) == LARGE
    del future, other
    await until(nothing_left)

    # Released by hand, before and after the promotion.
    for promote in (False, True):
        ref = handle.large.remote()
        await wait(ref)
        if promote:
            assert await c.submit(len, ref) == LARGE
        ref.release()
        ref.release()
        await until(nothing_left)


@gen_cluster(client=True)
async def test_harmless_things_promote_nothing(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.large.remote()
    await wait(ref)
    repr(ref), str(ref), ref._repr_html_(), hash(ref), ref.status, ref.type, ref.done(), ref.cancelled()
    ref.release()
    assert ref._inner is None
    assert not [key for key in s.tasks if key.startswith("serve-large")]
    await until(lambda: not stored())


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_pending_refs_hold_no_thread(c, s, a):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    futures = [c.submit(inc, handle.gate.remote(i)) for i in range(5)]
    # The only thread is free for others meanwhile.
    assert await asyncio.wait_for(c.submit(inc, 1), 5) == 2
    assert all(future.status == "pending" for future in futures)
    await handle.unlock.remote()
    assert await c.gather(futures) == [1, 2, 3, 4, 5]


@gen_cluster(client=True)
async def test_cancelled_and_failed_after_promotion(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.gate.remote(1)
    future = c.submit(inc, ref)
    ref.cancel()
    with pytest.raises(RequestCancelledError):
        await future
    ref = handle.after.options(request_timeout_s=0.1).remote(30, 1)
    with pytest.raises(TimeoutError):
        await c.submit(inc, ref)
    # Dask's way of cancelling a future.
    ref = handle.gate.remote(1)
    await c.cancel([ref])
    with pytest.raises(RequestCancelledError):
        await ref


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_promoted_and_forgotten_before_the_task_could_run(c, s, a):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    await handle.remote(1)
    blocker = c.submit(time.sleep, 1.5, pure=False)
    await until(lambda: blocker.key in s.tasks and s.tasks[blocker.key].state == "processing")
    finished = handle.large.remote()
    await wait(finished)
    running = handle.after.remote(0.1, b"x" * LARGE)
    futures = [c.submit(len, finished), c.submit(len, running)]
    keys = [finished.key, running.key, *(future.key for future in futures)]
    await until(lambda: all(key in s.tasks for key in keys))
    del finished, running, futures
    await until(lambda: not any(key in s.tasks for key in keys))
    assert not blocker.done()
    await until(lambda: not stored())
    await until(lambda: not Session.of(c).leftovers)


# -- holders -----------------------------------------------------------------------------------------------------------


def test_holder_with_a_busy_thread(own_client):
    """Work stealing moves the task within a moment, and the value comes through the door."""
    handle = serve.run(Model.bind(), route_prefix=None, client=own_client)
    holder = holder_of(own_client)
    handle.remote(1).result()
    ref = handle.large.remote()
    wait(ref)
    blocker = own_client.submit(time.sleep, 6, workers=[holder], pure=False)
    wait_until(lambda: own_client.processing()[holder])
    begun = time.monotonic()
    assert own_client.submit(len, ref).result(5) == LARGE
    took = time.monotonic() - begun
    assert took < 3, took
    assert not blocker.done()
    # It is a task of the other worker now, and the ref goes on.
    (where,) = own_client.who_has([ref]).values()
    assert holder not in where
    assert len(ref.result()) == LARGE
    wait_until(lambda: not stored_on(own_client))


def test_paused_holder(own_client):
    handle = serve.run(Model.bind(), route_prefix=None, client=own_client)
    holder = holder_of(own_client)
    refs = [handle.large.remote() for _ in range(2)]
    wait(refs)

    def pause(dask_worker: Any) -> None:
        # For good: the worker looks at its memory again and again.
        dask_worker.memory_manager.memory_pause_fraction = 1e-6

    own_client.run(pause, workers=[holder])
    wait_until(lambda: own_client.scheduler_info(-1)["workers"][holder]["status"] == "paused")
    assert len(refs[0].result(5)) == LARGE
    assert own_client.submit(len, refs[1]).result(5) == LARGE


def test_holder_killed(own_client):
    handle = serve.run(Model.bind(), route_prefix=None, client=own_client)
    holder = holder_of(own_client)
    pid = own_client.run(os.getpid, workers=[holder])[holder]
    refs = [handle.large.remote() for _ in range(5)]
    running = [handle.gate.remote(1), handle.gate.remote(2)]
    dependent = own_client.submit(inc, running[1])
    wait(refs)
    # It belongs to Dask, and to the other worker, before the holder dies.
    (elsewhere,) = others_of(own_client)
    moved = own_client.submit(len, refs[4], workers=[elsewhere])
    assert moved.result(5) == LARGE
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    for attempt in (
        lambda: refs[0].result(10),
        lambda: own_client.gather([refs[1]]),
        lambda: own_client.submit(len, refs[2]).result(10),
        lambda: running[0].result(10),
        lambda: dependent.result(10),
    ):
        with pytest.raises(ReplicaLostError):
            attempt()
    # The service goes on, on the worker that is left.
    assert handle.remote(1).result(10) == 1
    with pytest.raises(ReplicaLostError):
        handle.remote(refs[3]).result(10)
    assert time.monotonic() - begun < 10


def test_value_moves_from_worker_to_worker(client, handle):
    (elsewhere,) = others_of(client)
    ref = handle.array.remote(200_000)
    wait(ref)
    assert client.submit(lambda x: int(x.sum()), ref, workers=[elsewhere]).result(10) == sum(range(200_000))
    wait_until(lambda: not stored_on(client))


# -- sessions that leave -----------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_the_session_leaves_before_its_call_ends(c, s, a, b):
    await serve.run(Model.bind(), route_prefix=None, client=c)
    other = await Client(s.address, asynchronous=True, set_as_default=False)
    handle = await serve.get_app_handle(client=other)
    ref = handle.gate.remote(1)
    await other.publish_dataset(ref, name="d")
    held = Future(ref.key, c)
    dependent = c.submit(inc, held)
    await asyncio.sleep(0)
    await until(lambda: s.tasks[ref.key].who_wants and len(s.tasks[ref.key].who_wants) >= 2)
    await other.close()
    for future in (held, dependent, await c.get_dataset("d")):
        with pytest.raises(ReplicaLostError, match="session"):
            await asyncio.wait_for(future, 5)


@gen_cluster(client=True)
async def test_the_session_leaves_after_its_call(c, s, a, b):
    """What is published outlives the session."""
    await serve.run(Model.bind(), route_prefix=None, client=c)
    async with Client(s.address, asynchronous=True, set_as_default=False) as other:
        handle = await serve.get_app_handle(client=other)
        finished = handle.large.remote()
        await wait(finished)
        await other.publish_dataset(finished, name="finished")
        await other.publish_dataset(handle.after.remote(0.05, b"x" * LARGE), name="pending")
        await wait(await other.get_dataset("pending"))
    for name in ("finished", "pending"):
        assert len(await (await c.get_dataset(name))) == LARGE
        await c.unpublish_dataset(name)
    await until(lambda: not stored())


@gen_cluster(client=True)
async def test_a_promise_that_nobody_opened(c, s, a, b):
    """The session died between the two messages of a promotion: its task ends with an error."""
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    await handle.remote(1)
    with mock.patch.object(promotion, "POLL", 0.1), mock.patch.object(promises, "UNOPENED", 0.05):
        future = c.submit(promotion.take_pending, "k", "unknown-promise", key="k", pure=False)
        with pytest.raises(ReplicaLostError):
            await asyncio.wait_for(future, 5)


@gen_cluster(client=True)
async def test_shutdown_ends_promoted_calls(c, s, a, b):
    handle = await serve.run(Model.options(graceful_shutdown_timeout_s=0.1).bind(), route_prefix=None, client=c)
    ref = handle.gate.remote(1)
    future = c.submit(inc, ref)
    await until(lambda: ref.key in s.tasks and s.tasks[ref.key].state == "processing")
    await serve.shutdown(client=c)
    for waiting in (future, ref):
        with pytest.raises(RequestError):
            await asyncio.wait_for(waiting, 5)
