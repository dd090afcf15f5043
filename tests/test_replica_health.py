"""What replicas call by themselves, and how they tell that they are not well, or stuck, or merely busy."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from distributed import Client
from distributed.utils_test import gen_cluster

import dask_serve as serve
from dask_serve.controller.status import DeploymentStatus, decode_status
from dask_serve.exceptions import DeploymentFailedError
from dask_serve.replica import health

ONE = [("127.0.0.1", 2)]
TWO = [("127.0.0.1", 2)] * 2


def shared() -> Any:
    """What user code and tests share: this module travels to replicas by value, though they run in this process."""
    return sys.modules["dask_serve_shared"]


#: What user code leaves behind; set to let it go on; by replica, what ``check_health`` is to do.
sys.modules["dask_serve_shared"] = types.SimpleNamespace(noted=[], gate=threading.Event(), orders={})


@pytest.fixture(autouse=True)
def fresh():
    shared().noted.clear()
    shared().orders.clear()
    shared().gate.clear()
    yield
    shared().gate.set()


async def deployment_of(client: Client, app: str = "default") -> DeploymentStatus:
    (deployment,) = (
        decode_status((await client.scheduler.serve_status())["status"]).applications[app].deployments.values()
    )
    return deployment


async def until(client: Client, met: Callable[[DeploymentStatus], Any], timeout: float = 15.0) -> DeploymentStatus:
    deadline = time.monotonic() + timeout
    while not met(found := await deployment_of(client)):
        assert time.monotonic() < deadline, f"not met after {timeout} s: {found}"
        await asyncio.sleep(0.02)
    return found


async def run(client: Client, application: serve.Application) -> Any:
    return await serve.run(application, route_prefix=None, client=client)


# -- before it is ready


def here() -> tuple[str, ...]:
    return serve.get_replica_context().deployment, threading.current_thread().name.rsplit("-", 1)[1]


@gen_cluster(client=True, nthreads=ONE)
async def test_warm_up_comes_before_the_first_request(c, s, a):
    @serve.deployment
    class Plain:
        def __init__(self):
            self.steps = ["init", serve.get_replica_context().servable_object]

        def reconfigure(self, user_config):
            self.steps.append(user_config)

        def warm_up(self):
            self.steps.append(here())
            self.steps.append(serve.get_replica_context().servable_object is self)

        async def __call__(self):
            return self.steps

    @serve.deployment
    class Asynchronous(Plain.func_or_class):
        async def warm_up(self):
            await asyncio.sleep(0)
            self.steps.append(here())

    handle = await run(c, Plain.options(user_config=1).bind())
    # A `def` runs on a thread of the pool, as requests do.
    assert await handle.remote() == ["init", None, 1, ("Plain", "0"), True]
    handle = await run(c, Asynchronous.options(user_config=1).bind())
    assert await handle.remote() == ["init", None, 1, ("Asynchronous", "user")]


@gen_cluster(client=True, nthreads=ONE)
async def test_warm_up_that_raises_fails_the_start(c, s, a):
    @serve.deployment
    class Cold:
        def warm_up(self):
            raise RuntimeError("no kernel for this device")

    with pytest.raises(DeploymentFailedError, match="RuntimeError: no kernel for this device"):
        await run(c, Cold.bind())


@gen_cluster(client=True, nthreads=ONE)
async def test_replica_that_is_never_healthy_fails_the_start(c, s, a):
    @serve.deployment
    class Ill:
        def check_health(self):
            raise OSError("no database")

    with pytest.raises(
        DeploymentFailedError, match=r"not healthy from the start: check_health\(\) raised OSError: no data"
    ):
        await run(c, Ill.bind())


# -- health


def checker(kind: str) -> serve.Deployment:
    class Checked:
        def __call__(self):
            shared().gate.wait(30)
            return serve.get_replica_context().replica_id

        async def block(self):
            shared().gate.wait(30)

        async def who(self):
            return serve.get_replica_context().replica_id

    def answer(self):
        shared().noted.append(serve.get_replica_context().replica_id)
        order = shared().orders.get(shared().noted[-1])
        if isinstance(order, Exception):
            raise order
        if order == "wait":
            shared().gate.wait(30)
        return order

    async def asynchronous(self):
        if shared().orders.get(serve.get_replica_context().replica_id) == "wait":
            shared().noted.append("waits")
            await asyncio.sleep(30)
        return answer(self)

    Checked.check_health = answer if kind == "def" else asynchronous
    return serve.deployment(health_check_period_s=0.05, health_check_timeout_s=0.2, graceful_shutdown_timeout_s=1)(
        Checked
    )


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (OSError("no database"), r"check_health() raised OSError: no database, 3 times in a row"),
        (False, "check_health() returned False, 3 times in a row"),
        ("wait", "check_health() has not returned within 0.2 s, 3 times in a row"),
    ],
)
def test_unhealthy_replica_is_replaced(kind, order, reason):
    @gen_cluster(client=True, nthreads=ONE)
    async def check(c, s, a):
        handle = await run(c, checker(kind).bind())
        before = await handle.who.remote()
        # Once or twice is nothing.
        shared().orders[before] = order
        status = await until(c, lambda d: d.setback)
        assert f"replica {before} on worker {a.address} was unhealthy: {reason}" in status.setback
        status = await until(c, lambda d: d.status == "running" and d.replicas[0].id != before)
        assert reason in str(status)
        assert await handle.who.remote() != before
        shared().gate.set()

    check()


@gen_cluster(client=True, nthreads=ONE)
async def test_two_failures_in_a_row_are_not_enough(c, s, a):
    handle = await run(c, checker("def").bind())
    who = await handle.who.remote()
    for _ in range(3):
        start = len(shared().noted)
        shared().orders[who] = OSError("a moment, please")
        while len(shared().noted) < start + 2:
            await asyncio.sleep(0.001)
        del shared().orders[who]
        while len(shared().noted) < start + 4:
            await asyncio.sleep(0.001)
    status = await deployment_of(c)
    assert (status.setback, status.replicas[0].id) == ("", who)


@pytest.mark.parametrize(("kind", "method"), [("def", "__call__"), ("async def", "block")])
def test_busy_replica_is_not_unhealthy(kind, method):
    """Neither threads that are all taken nor a loop that is held up say anything about health."""

    @gen_cluster(client=True, nthreads=ONE)
    async def check(c, s, a):
        handle = await run(c, checker(kind).bind())
        refs = [handle.options(method_name=method).remote() for _ in range(3)]
        await asyncio.sleep(1.0)
        status = await deployment_of(c)
        assert (status.setback, status.counts) == ("", {"ready": 1})
        shared().gate.set()
        await asyncio.gather(*refs)

    check()


# -- stuck or busy


@serve.deployment
class Worker:
    def wait(self):
        shared().gate.wait(30)

    def compute(self):
        while not shared().gate.is_set():
            sum(range(1000))

    async def block(self):
        shared().gate.wait(30)

    def quick(self):
        time.sleep(0.01)

    def stream(self):
        while not shared().gate.is_set():
            time.sleep(0.02)
            yield 1

    async def who(self):
        return serve.get_replica_context().replica_id


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(health, "NOTICE", 0.4)
    monkeypatch.setattr(health, "LOOK", 0.1)


@pytest.mark.parametrize(
    ("method", "state", "what"),
    [
        ("wait", "stuck", "all its threads are taken and requests wait; waits in wait ("),
        ("compute", "busy", "all its threads are taken and requests wait; computes in compute ("),
        ("block", "stuck", "its event loop is blocked; waits in block ("),
    ],
)
def test_stuck_is_told_from_busy(impatient, method, state, what):
    @gen_cluster(client=True, nthreads=ONE)
    async def check(c, s, a):
        handle = await run(c, Worker.bind())
        refs = [handle.options(method_name=method).remote() for _ in range(2)]
        status = await until(c, lambda d: d.replicas[0].message)
        message = status.replicas[0].message
        assert message.startswith(f"{state} since ")
        assert what in message
        assert "test_replica_health.py:" in message
        assert status.status == "running"
        shared().gate.set()
        await asyncio.gather(*refs)
        await until(c, lambda d: not d.replicas[0].message)

    check()


@gen_cluster(client=True, nthreads=ONE)
async def test_replica_that_gets_on_is_neither(c, s, a):
    """One long request that nobody waits for, many short ones, a stream that goes on."""
    notice, look = health.NOTICE, health.LOOK
    health.NOTICE, health.LOOK = 0.3, 0.05
    try:
        for kind in ("long", "short", "stream"):
            handle = await run(c, Worker.bind())
            if kind == "long":
                refs = [handle.wait.remote()]
                await asyncio.sleep(1)
            elif kind == "short":
                refs = [handle.quick.remote() for _ in range(90)]
                await asyncio.gather(*refs)
            else:
                stream = handle.stream.options(stream=True).remote()
                refs = [handle.quick.remote()]
                deadline = time.monotonic() + 1
                async for _ in stream:
                    if time.monotonic() > deadline:
                        shared().gate.set()
            assert (await deployment_of(c)).replicas[0].message == ""
            shared().gate.set()
            await asyncio.gather(*refs)
            shared().gate.clear()
    finally:
        health.NOTICE, health.LOOK = notice, look


@gen_cluster(client=True, nthreads=ONE)
async def test_stuck_replica_is_replaced_where_a_limit_is_set(c, s, a):
    handle = await run(c, Worker.options(stuck_timeout_s=0.5, graceful_shutdown_timeout_s=0.3).bind())
    who = await handle.who.remote()
    refs = [handle.wait.remote() for _ in range(2)]
    status = await until(c, lambda d: d.status == "running" and d.replicas and d.replicas[0].id != who)
    assert f"replica {who} on worker {a.address} was unhealthy: all its threads were taken for 0.5 s" in status.setback
    assert await handle.who.remote() != who
    shared().gate.set()
    for ref in refs:
        with contextlib.suppress(serve.ServeError):
            await ref


# -- the end


class Ends:
    async def __call__(self):
        return None

    def shutdown(self):
        shared().noted.append(("shutdown", *here()))


class EndsLate:
    def __init__(self):
        self.me = self

    async def __call__(self):
        await asyncio.sleep(0.2)
        shared().noted.append("answered")

    async def shutdown(self):
        await asyncio.sleep(0.1)
        shared().noted.append(("shutdown", *here()))

    def __del__(self):
        shared().noted.append("del")


class EndsByDel:
    async def __call__(self):
        return None

    async def __del__(self):
        await asyncio.sleep(0)
        shared().noted.append("del")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Ends, [("shutdown", "Ends", "user")]),
        (EndsLate, ["answered", ("shutdown", "EndsLate", "user"), "del"]),
        (EndsByDel, ["del"]),
    ],
)
def test_shutdown_is_called_once_before_the_delete_is_answered(kind, expected):
    @gen_cluster(client=True, nthreads=ONE)
    async def check(c, s, a):
        handle = await run(c, serve.deployment(kind).bind())
        ref = handle.remote()
        while not (await c.scheduler.serve_status()) or not a.state.actors:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await serve.delete("default", client=c)
        assert shared().noted == expected
        await ref

    check()
    gc.collect()
    assert shared().noted == expected


@pytest.mark.filterwarnings("error")
@gen_cluster(client=True, nthreads=ONE)
async def test_shutdown_that_takes_too_long_or_raises(c, s, a):
    @serve.deployment(graceful_shutdown_timeout_s=1.2)
    class Slow:
        async def shutdown(self):
            shared().noted.append("begun")
            try:
                await asyncio.sleep(30)
            finally:
                shared().noted.append("cancelled")

    @serve.deployment
    class Broken:
        def shutdown(self):
            shared().noted.append("raises")
            raise OSError("cannot flush")

    await run(c, Slow.bind())
    began = time.monotonic()
    await serve.delete("default", client=c)
    assert time.monotonic() - began < 5
    await run(c, Broken.bind())
    await serve.delete("default", client=c)
    assert shared().noted == ["begun", "cancelled", "raises"]


@gen_cluster(client=True, nthreads=ONE)
async def test_shutdown_is_called_where_dask_lets_go_of_a_replica(c, s, a):
    await run(c, serve.deployment(Ends).bind())
    await a.close()
    assert [entry[0] for entry in shared().noted] == ["shutdown"]
