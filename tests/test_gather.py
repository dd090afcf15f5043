"""`serve.gather`, and refs for those who know `concurrent.futures` only."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
import time
from typing import Any, NamedTuple

import pytest
from distributed import wait
from distributed.utils_test import gen_cluster, inc
from helpers import Graphs, until

import dask_serve as serve
from dask_serve import gathering
from dask_serve.exceptions import ConfigError, RequestCancelledError

LARGE = 100_000


# What is still under way at the end of a test is not waited for.
@serve.deployment(graceful_shutdown_timeout_s=0.5)
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()

    def __call__(self, x):
        return x + 1

    async def gate(self, value):
        await self.open.wait()
        return value

    async def unlock(self):
        self.open.set()

    def large(self, n=LARGE):
        return b"x" * n

    def fail(self, text):
        raise ValueError(text)

    def late(self):
        raise TimeoutError("of user code")


@serve.deployment
class Caller:
    def __init__(self, model) -> None:
        self.model = model

    async def asynchronous(self, n):
        values = await serve.gather([self.model.remote(i) for i in range(n)], self.model.large.remote())
        return values[0], len(values[1]), await serve.gather([])

    def synchronous(self, n):
        values = serve.gather([self.model.remote(i) for i in range(n)], self.model.large.remote())
        return values[0], len(values[1]), serve.gather([])


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose two workers are processes with one thread each."""
    yield serve.run(Model.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


# -- structure and errors ----------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_the_same_containers_with_values(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    s.add_plugin(graphs := Graphs())
    one = handle.remote
    assert await serve.gather(one(1)) == 2
    assert await serve.gather([one(1), one(2)]) == [2, 3]
    assert await serve.gather(one(1), [one(2)], 3) == [2, [3], 3]
    assert await serve.gather(one(i) for i in range(3)) == [1, 2, 3]
    assert await serve.gather(()) == ()
    assert await serve.gather() == []
    nested = {"a": [one(1), (one(2), {one(3)})], "b": Pair(one(4), frozenset([one(5)])), "c": "plain"}
    assert await serve.gather(nested) == {"a": [2, (3, {4})], "b": Pair(5, frozenset([6])), "c": "plain"}
    ordered = collections.OrderedDict(x=one(1), y=one(2))
    gathered = await serve.gather(ordered)
    assert isinstance(gathered, collections.OrderedDict)
    assert gathered == {"x": 2, "y": 3}
    several = collections.defaultdict(list, k=[one(1)])
    gathered = await serve.gather(several)
    assert (gathered, gathered["other"]) == ({"k": [2], "other": []}, [])
    # The same ref twice, large ones, what came from a handle with sync=False.
    ref, large = one(1), handle.large.remote()
    assert await serve.gather([ref, large, ref, large]) == [2, b"x" * LARGE, 2, b"x" * LARGE]
    assert await serve.gather([handle.options(sync=False).remote(1)]) == [2]
    assert graphs.count == 0
    # Dask futures among them, and a ref that is one by now.
    future, promoted = c.submit(inc, 1), handle.large.remote()
    assert await c.submit(len, promoted) == LARGE
    assert await serve.gather({"f": [future], "p": promoted, "r": one(3)}) == {"f": [2], "p": b"x" * LARGE, "r": 4}


@gen_cluster(client=True)
async def test_failures(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    fail, gate = handle.fail.remote, handle.gate.remote
    waiting = gate(1)
    # At once, and what else is waited for goes on.
    for refs in ([waiting, fail("early")], [fail("early"), waiting], {"a": waiting, "b": fail("early")}):
        with pytest.raises(ValueError, match="early") as caught:
            await asyncio.wait_for(serve.gather(refs), 5)
        assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(TimeoutError, match="of user code"):
        await serve.gather([handle.late.remote()], timeout=5)
    with pytest.raises(TimeoutError, match=r"1 of 2 calls have not ended within 0\.05 s; the calls go on"):
        await serve.gather([waiting, handle.remote(1)], timeout="50 ms")
    assert not waiting.done()
    cancelled = gate(1)
    cancelled.cancel()
    with pytest.raises(RequestCancelledError):
        await serve.gather([cancelled])
    with pytest.raises(ZeroDivisionError):
        await serve.gather([handle.remote(1), c.submit(lambda: 1 / 0)])

    bad, good = fail("bad"), handle.remote
    future = c.submit(lambda: 1 / 0, pure=False)
    skip = {"errors": "skip"}
    assert await serve.gather([good(1), bad, cancelled, good(2), future], **skip) == [2, 3]
    assert await serve.gather({"a": bad, "b": good(1), "c": (bad,)}, **skip) == {"b": 2, "c": ()}
    assert await serve.gather(Pair(bad, good(1)), **skip) == Pair(None, 2)
    assert await serve.gather(bad, good(1), **skip) == [None, 2]
    assert await serve.gather(bad, **skip) is None
    with pytest.raises(ConfigError, match='"raise" or "skip"'):
        serve.gather([good(1)], errors="return")
    # Whoever wants exceptions waits first.
    refs = [good(1), bad]
    await wait(refs)
    assert [type(await ref.exception()) for ref in refs] == [type(None), ValueError]

    # A task that is cancelled while it waits.
    task = asyncio.ensure_future(serve.gather([waiting, good(1)]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(RequestCancelledError):
        await waiting
    # Nobody is left at the states of refs.
    waiting = gate(1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await serve.gather([waiting], timeout=0.01)
    assert not waiting._local._callbacks


@gen_cluster(client=True)
async def test_large_results_are_fetched_some_at_a_time(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    n = 3 * gathering.FETCHES + 1
    for _ in range(20):
        refs = [handle.large.remote(LARGE + i) for i in range(n)]
        values = await asyncio.wait_for(serve.gather(refs), 10)
        assert [len(value) for value in values] == [LARGE + i for i in range(n)]


@gen_cluster(client=True, config={"serve.results-limit": 1_000_000}, timeout=60)
async def test_more_results_than_a_store_takes(c, s, a, b):
    """Values are fetched as they come: whoever waited for all of them first would wait for room for ever."""
    handle = await serve.run(Model.options(max_ongoing_requests=2).bind(), route_prefix=None, client=c)
    begun = time.monotonic()
    values = await asyncio.wait_for(serve.gather([handle.large.remote() for _ in range(60)]), 30)
    assert [len(value) for value in values] == [LARGE] * 60
    # Without room, one call a second is let in.
    assert time.monotonic() - begun < 20


# -- who blocks --------------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_in_replicas(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    assert await handle.asynchronous.remote(3) == ([1, 2, 3], LARGE, [])
    assert await handle.synchronous.remote(3) == ([1, 2, 3], LARGE, [])


def test_with_a_synchronous_client(client, handle):
    refs = [handle.remote(i) for i in range(1000)]
    assert serve.gather(refs) == list(range(1, 1001))
    assert serve.gather({"a": handle.large.remote(), "b": [client.submit(inc, 1)]}) == {"a": b"x" * LARGE, "b": [2]}
    assert serve.gather([]) == []
    waiting = handle.gate.remote(1)
    with pytest.raises(ValueError, match="early"):
        serve.gather([waiting, handle.fail.remote("early")], timeout=5)
    with pytest.raises(TimeoutError, match="1 of 2 calls"):
        serve.gather([waiting, handle.remote(1)], timeout_s=0.05)
    assert serve.gather([handle.fail.remote("x"), handle.remote(1)], errors="skip") == [2]

    # As in a notebook: it blocks; the background loop carries the calls.
    async def main() -> Any:
        return serve.gather([handle.remote(1)])

    assert asyncio.run(main()) == [2]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(serve.gather(refs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [list(range(1, 1001))] * 4

    # In Dask tasks, which give their threads back: there are two.
    def gathers(handle: Any) -> Any:
        from distributed import get_client

        return serve.gather([handle.remote(1), get_client().submit(inc, 5), handle.large.remote()])[:2]

    futures = [client.submit(gathers, handle, pure=False) for _ in range(4)]
    assert client.gather(futures) == [[2, 6]] * 4


# -- concurrent.futures ------------------------------------------------------------------------------------------------


def test_concurrent_futures(client, handle):
    waiting, failed, small, large = (
        handle.gate.remote(1),
        handle.fail.remote("no"),
        handle.remote(1),
        handle.large.remote(),
    )
    mirrors = [ref.as_concurrent_future() for ref in (waiting, failed, small, large)]
    assert all(isinstance(mirror, concurrent.futures.Future) for mirror in mirrors)
    done, not_done = concurrent.futures.wait(mirrors, timeout=5, return_when="FIRST_EXCEPTION")
    assert mirrors[1] in done
    assert mirrors[0] in not_done
    concurrent.futures.wait(mirrors[1:], timeout=5)
    with pytest.raises(ValueError, match="no"):
        mirrors[1].result()
    assert mirrors[2].result() == 2
    assert len(mirrors[3].result()) == LARGE
    assert not mirrors[2].cancel()
    handle.unlock.remote().result()
    assert [mirror.result() for mirror in concurrent.futures.as_completed([mirrors[0]], timeout=5)] == [1]


@gen_cluster(client=True)
async def test_concurrent_futures_are_cancelled_both_ways(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    ref = handle.gate.remote(1)
    mirror, other = ref.as_concurrent_future(), ref.as_concurrent_future()
    assert mirror.cancel()
    assert mirror.cancel()
    assert mirror.cancelled()
    with pytest.raises(RequestCancelledError):
        await ref
    await until(other.cancelled)
    done, _ = await asyncio.to_thread(concurrent.futures.wait, [mirror, other], 5)
    assert done == {mirror, other}
    # asyncio's.
    assert await asyncio.wrap_future(handle.remote(1).as_concurrent_future()) == 2
    assert len(await asyncio.wrap_future(handle.large.remote().as_concurrent_future())) == LARGE
    ref = handle.gate.remote(1)
    wrapped = asyncio.wrap_future(ref.as_concurrent_future())
    wrapped.cancel()
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 5)
    # Dropped with its ref, it cancels nothing.
    ref = handle.gate.remote(7)
    mirror = ref.as_concurrent_future()
    del ref
    await handle.unlock.remote()
    assert await asyncio.wait_for(asyncio.wrap_future(mirror), 5) == 7
