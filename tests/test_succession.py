"""A request that ends gives its slot to the one that was admitted ahead, on the user's thread, without the door."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve
from dask_serve.exceptions import BackPressureError, RequestCancelledError, RequestTimeoutError
from dask_serve.replica.process import ServeProcess

ONE = [("127.0.0.1", 2)]
METHODS = ["coroutine", "plain", "items", "plain_items"]


@serve.deployment
class Probe:
    """Counts what runs, and holds it while the gate is closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.behind = threading.Event()
        self.behind.set()
        self.started = self.running = self.most = 0
        self.numbers: list[int] = []
        #: Set by one request, and not seen by the next.
        self.colour: ContextVar[str] = ContextVar("colour", default="none")

    @contextlib.contextmanager
    def inside(self, number: int) -> Iterator[None]:
        with self.lock:
            self.started += 1
            self.numbers.append(number)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1

    async def coroutine(self, number: int, seconds: float = 0.0) -> int:
        with self.inside(number):
            await asyncio.sleep(seconds)
            while not self.gate.is_set():
                await asyncio.sleep(0.001)
        return number

    def plain(self, number: int, seconds: float = 0.0) -> int:
        with self.inside(number):
            time.sleep(seconds)
            self.gate.wait(20)
        return number

    async def items(self, number: int, seconds: float = 0.0) -> Any:
        with self.inside(number):
            yield number
            await asyncio.sleep(seconds)
            while not self.gate.is_set():
                await asyncio.sleep(0.001)

    def plain_items(self, number: int, seconds: float = 0.0) -> Any:
        with self.inside(number):
            yield number
            time.sleep(seconds)
            self.gate.wait(20)

    async def paint(self, number: int, seconds: float) -> tuple[str, str]:
        found = self.colour.get()
        self.colour.set("red")
        await asyncio.sleep(seconds)
        return found, serve.get_request_context().request_id

    async def timed(self, number: int, seconds: float) -> int:
        """Mind no gate; what comes behind it on the loop waits."""
        with self.inside(number):
            await asyncio.sleep(seconds)
        asyncio.get_running_loop().call_soon(self.behind.wait, 20)
        return number


def call(handle: Any, method: str, number: int, seconds: float = 0.0) -> asyncio.Task[Any]:
    """Return a task of the answer."""

    async def items() -> int:
        [item] = [item async for item in handle.options(stream=True, method_name=method).remote(number, seconds)]
        return item

    async def answer() -> int:
        return await handle.options(method_name=method).remote(number, seconds)

    return asyncio.create_task(items() if "items" in method else answer())


async def deployed(client: Any, worker: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Deploy a probe that admits one request ahead; return its handle, its core and the object."""
    handle = await serve.run(Probe.options(**options).bind(), route_prefix=None, client=client)
    assert [await call(handle, "coroutine", i) for i in range(3)] == [0, 1, 2]
    [unit] = ServeProcess.units_of(worker)
    await until(lambda: not unit.core.admission.running)
    assert unit.core.admission.ahead == 1
    probe = unit.user.instance
    probe.started = 0
    probe.numbers.clear()
    return handle, unit, probe


async def stopped(door: Any) -> threading.Event:
    """Let the door's thread stand still until the event is set."""
    stands, go_on = threading.Event(), threading.Event()
    door.call(lambda: (stands.set(), go_on.wait(20)))
    await until(stands.is_set)
    return go_on


@pytest.mark.parametrize("second", METHODS)
@gen_cluster(client=True, nthreads=ONE)
async def test_the_next_one_begins_while_the_door_stands_still(c, s, a, second):
    handle, unit, probe = await deployed(c, a, max_ongoing_requests=1)
    for turn, first in enumerate(METHODS):
        probe.gate.clear()
        probe.started = 0
        one = call(handle, first, 1)
        await until(lambda: probe.started == 1)
        two = call(handle, second, 2)
        await until(lambda: len(unit.core.waiting) == 1)
        go_on = await stopped(unit.door)
        probe.gate.set()
        await until(lambda: probe.started == 2)
        go_on.set()
        assert (await one, await two) == (1, 2)
        await until(lambda: not unit.core.admission.running)
        assert unit.core._active == 0, turn
        # The holding was long: learn again that requests are short.
        await asyncio.gather(*[call(handle, "coroutine", 0) for _ in range(60)])
        await until(lambda: not unit.core.admission.running)


@gen_cluster(client=True, nthreads=ONE)
async def test_not_beyond_a_limit_that_fell(c, s, a):
    handle, unit, probe = await deployed(c, a, max_ongoing_requests=2)
    probe.gate.clear()
    long = call(handle, "coroutine", 0)
    await until(lambda: probe.started == 1)
    short = call(handle, "timed", 1, 0.3)
    await until(lambda: probe.started == 2)
    third = call(handle, "coroutine", 2)
    await until(lambda: len(unit.core.waiting) == 1)
    unit.door.call(lambda: unit.core.set_limit(1))
    assert await short == 1
    await asyncio.sleep(0.05)
    assert probe.started == 2
    probe.gate.set()
    assert [await long, await third] == [0, 2]
    await until(lambda: not unit.core.admission.running)
    assert unit.core._active == 0


@gen_cluster(client=True, nthreads=ONE)
async def test_cancelled_between_the_slot_and_the_beginning(c, s, a):
    handle, unit, probe = await deployed(c, a, max_ongoing_requests=1)
    probe.behind.clear()
    one = call(handle, "timed", 1, 0.1)
    await until(lambda: probe.started == 1)
    two = handle.coroutine.remote(2)
    await until(lambda: len(unit.core.waiting) == 1)
    # The loop stands still after this answer, and the next one has the slot but not begun.
    assert await one == 1
    assert not unit.core.waiting
    await until(lambda: unit.core.admission.running == 1)
    assert unit.core._active == 1
    two.cancel()
    with pytest.raises(RequestCancelledError):
        await two
    await until(lambda: not unit.core.admission.running)
    assert unit.core._active == 0
    probe.behind.set()
    assert await call(handle, "plain", 3) == 3
    await until(lambda: not unit.core.admission.running)
    assert (probe.numbers, unit.core._active) == ([1, 3], 0)


@gen_cluster(client=True, nthreads=ONE)
async def test_each_has_its_own_context(c, s, a):
    handle, _, _ = await deployed(c, a, max_ongoing_requests=1)
    found = await asyncio.gather(*[call(handle, "paint", i, 0.001) for i in range(30)])
    assert {colour for colour, _ in found} == {"none"}
    assert len({request for _, request in found}) == 30


@pytest.mark.parametrize("how", ["cancelled", "late"])
@gen_cluster(client=True, nthreads=ONE)
async def test_nobody_begins_who_left_while_the_door_stood_still(c, s, a, how):
    handle, unit, probe = await deployed(c, a, max_ongoing_requests=1)
    probe.gate.clear()
    one = call(handle, "coroutine", 1)
    await until(lambda: probe.started == 1)
    two = handle.options(request_timeout_s=0.3 if how == "late" else None).coroutine.remote(2)
    await until(lambda: len(unit.core.waiting) == 1)
    [execution] = unit.core.waiting
    go_on = await stopped(unit.door)
    if how == "late":
        await until(lambda: time.monotonic() > execution.deadline)
    else:
        # The frame is behind what holds the door: this is what it does first.
        execution.cancelled = True
        two.cancel()
    probe.gate.set()
    await until(lambda: not probe.running)
    await asyncio.sleep(0.02)
    go_on.set()
    assert await one == 1
    with pytest.raises(RequestTimeoutError if how == "late" else RequestCancelledError):
        await two
    await until(lambda: not unit.core.admission.running)
    assert (probe.numbers, unit.core._active) == ([1], 0)


@pytest.mark.parametrize("limit", [1, 2])
@gen_cluster(client=True, nthreads=ONE, timeout=60)
async def test_everything_at_once(c, s, a, limit):
    """Calls of all kinds, cancelled in every moment or with little time: all are answered, the counts are right."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    handle, unit, probe = await deployed(c, a, max_ongoing_requests=limit, threads=2)
    core = unit.core
    taken = []
    next_after = core.next_after

    def count(execution: Any) -> Any:
        successor = next_after(execution)
        if successor is not None:
            taken.append(successor.request)
        return successor

    core.next_after = count
    loop = asyncio.get_running_loop()
    ended = dict.fromkeys(("answered", "cancelled", "late"), 0)

    async def caller(number: int) -> None:
        for turn in range(60):
            method = chance.choice(METHODS)
            seconds = chance.choice([0.0, 0.0, 0.0005, 0.001])
            timeout = chance.choice([None, None, None, 0.005, 0.05])
            task = call(handle.options(request_timeout_s=timeout), method, 100 * number + turn, seconds)
            timer = loop.call_later(chance.random() * 0.03, task.cancel) if chance.random() < 0.4 else None
            try:
                assert await asyncio.wait_for(asyncio.shield(task), 20) == 100 * number + turn
                ended["answered"] += 1
            except (asyncio.CancelledError, RequestCancelledError):
                assert timer is not None, seed
                ended["cancelled"] += 1
            except (RequestTimeoutError, BackPressureError):
                assert timeout is not None, seed
                ended["late"] += 1
            if timer is not None:
                timer.cancel()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        await asyncio.gather(*[caller(number) for number in range(16)])
        await until(lambda: not core.admission.running)
    finally:
        sys.setswitchinterval(before)
    assert min(ended["answered"], ended["cancelled"]) > 0, (ended, seed)
    assert len(taken) == len(set(taken)) > 20, seed
    # Each at most once, none beyond the limit, and no slot is lost.
    assert len(probe.numbers) == len(set(probe.numbers)), seed
    assert probe.most <= limit, seed
    assert (core._active, len(core.waiting), probe.running) == (0, 0, 0), seed
    assert core.counts.answered + core.counts.failed >= ended["answered"], seed
    assert not any(connection.executions for connection in unit.door.connections), seed
