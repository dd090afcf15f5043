"""Dask inside replicas: `get_worker`, `get_client`, `dask.compute`, collections, and what a cancelled request ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.bag
import distributed
import httpx
import pytest
from distributed import Client, Event, LocalCluster, Lock, Queue, Variable, get_client, get_worker

import dask_serve as serve
from dask_serve.exceptions import RequestCancelledError, RequestTimeoutError
from dask_serve.handle import DeploymentHandle
from dask_serve.replica import clients

da = pytest.importorskip("dask.array")


def inc(x):
    return x + 1


def add(x, y):
    return x + y


def slow(x, seconds):
    """A task on a thread runs to its end, wanted or not; one that has not begun is forgotten."""
    time.sleep(seconds)
    return x


async def slow_coroutine(x):
    """Run for long, but not when the worker has been told that nobody wants it: Dask itself would let it run."""
    tasks = get_worker().state.tasks
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(task.state == "cancelled" for task in tasks.values()):
        await asyncio.sleep(0.02)
    return x


def use_dask(handle: DeploymentHandle | None = None) -> dict[str, Any]:
    """Use all of it, blocking, as plain code does."""
    client = get_client()
    found: dict[str, Any] = {"worker": get_worker().address, "same": get_client() is client}
    found["submit"] = client.submit(inc, 1, pure=False).result(timeout=20)
    found["map"] = client.gather(client.map(inc, range(4), pure=False))
    found["delayed"] = dask.delayed(add)(dask.delayed(inc)(1), 1).compute()
    found["compute"] = dask.compute(dask.delayed(inc)(1), dask.delayed(inc)(2))
    found["array"] = int(da.ones((20, 20), chunks=10).sum().compute())
    found["bag"] = dask.bag.from_sequence(range(5), npartitions=2).map(inc).sum().compute()
    persisted = client.persist(da.arange(10, chunks=5))
    distributed.wait(persisted)
    found["persist"] = int(persisted.sum().compute())
    (also,) = dask.persist(da.arange(10, chunks=5))
    found["dask.persist"] = int(also.sum().compute())
    found["as_completed"] = sorted(f.result() for f in distributed.as_completed(client.map(inc, range(3), pure=False)))
    variable = Variable(f"v-{threading.get_ident()}")
    variable.set(5)
    found["variable"] = variable.get()
    queue = Queue(f"q-{threading.get_ident()}")
    queue.put(7)
    found["queue"] = queue.get()
    with Lock(f"lock-{threading.get_ident()}"):
        found["lock"] = True
    event = Event(f"e-{threading.get_ident()}")
    event.set()
    found["event"] = event.wait(5)
    if handle is not None:
        ref = handle.remote(1)
        found["ref"] = client.submit(inc, ref).result(timeout=20)
        found["gather"] = client.gather([handle.remote(1), client.submit(inc, 5, pure=False)])
        found["delayed of a ref"] = dask.delayed(inc)(handle.remote(1)).compute()
        found["future as argument"] = handle.remote(client.submit(inc, 1, pure=False)).result(20)
    return found


EXPECTED = {
    "same": True,
    "submit": 2,
    "map": [1, 2, 3, 4],
    "delayed": 3,
    "compute": (2, 3),
    "array": 400,
    "bag": 15,
    "persist": 45,
    "dask.persist": 45,
    "as_completed": [1, 2, 3],
    "variable": 5,
    "queue": 7,
    "lock": True,
    "event": True,
}
WITH_REFS = {"ref": 3, "gather": [2, 6], "delayed of a ref": 3, "future as argument": 3}


@serve.deployment
class Plus:
    def __call__(self, x):
        return x + 1


@serve.deployment(threads=2)
class Everywhere:
    """Uses Dask in every place that a deployment's code has."""

    def __init__(self, plus: DeploymentHandle) -> None:
        self.plus = plus
        self.constructor = use_dask()
        self.kept = get_client().submit(inc, 10, pure=False)

    def in_constructor(self):
        return {**self.constructor, "kept": self.kept.result()}

    def in_def(self):
        return use_dask(self.plus)

    async def in_a_thread(self):
        return await asyncio.to_thread(use_dask, self.plus)

    async def blocking_in_a_coroutine(self):
        """Functions of Dask that block, block: they work all the same."""
        found = {"worker": get_worker().address}
        found["delayed"] = dask.delayed(add)(dask.delayed(inc)(1), 1).compute()
        found["compute"] = dask.compute(dask.delayed(inc)(1), dask.delayed(inc)(2))
        found["array"] = int(da.ones((20, 20), chunks=10).sum().compute())
        found["bag"] = dask.bag.from_sequence(range(5), npartitions=2).map(inc).sum().compute()
        return found

    async def in_a_coroutine(self):
        client = get_client()
        assert client.asynchronous
        found: dict[str, Any] = {"worker": get_worker().address, "same": get_client() is client}
        found["submit"] = await client.submit(inc, 1, pure=False)
        found["map"] = await client.gather(client.map(inc, range(4), pure=False))
        found["delayed"] = await client.compute(dask.delayed(add)(dask.delayed(inc)(1), 1))
        found["array"] = int(await client.compute(da.ones((20, 20), chunks=10).sum()))
        persisted = client.persist(da.arange(10, chunks=5))
        await distributed.wait(persisted)
        found["persist"] = int(await client.compute(persisted.sum()))
        done = [await f async for f in distributed.as_completed(client.map(inc, range(3), pure=False))]
        found["as_completed"] = sorted(done)
        variable = Variable("asynchronous")
        await variable.set(5)
        found["variable"] = await variable.get()
        queue = await Queue("asynchronous")
        await queue.put(7)
        found["queue"] = await queue.get()
        event = Event("asynchronous")
        await event.set()
        found["event"] = await event.wait(5)
        found["ref"] = await client.submit(inc, self.plus.remote(1))
        found["gather"] = await client.gather([self.plus.remote(1), client.submit(inc, 5, pure=False)])
        found["delayed of a ref"] = await client.compute(dask.delayed(inc)(self.plus.remote(1)))
        found["future as argument"] = await self.plus.remote(client.submit(inc, 1, pure=False))
        found["a future of the constructor"] = await client.submit(inc, self.kept)
        return found

    async def __call__(self, request):
        found = await self.in_a_coroutine()
        return {name: str(value) for name, value in found.items()}

    async def generated(self, request):
        client = get_client()
        for i in range(3):
            yield f"{await client.submit(inc, i, pure=False)} "

    def at_once(self, n):
        return dask.delayed(inc)(n).compute()


@serve.deployment
class Generates:
    def __call__(self, request):
        for i in range(3):
            yield f"{get_client().submit(inc, i, pure=False).result()} {dask.delayed(inc)(i).compute()},"


@serve.deployment
class AsyncConstructor:
    async def __init__(self) -> None:
        self.future = get_client().submit(inc, 1, pure=False)
        self.value = await self.future

    async def values(self):
        return self.value, await self.future, await get_client().gather([self.future])


@serve.deployment(user_config={"x": 1})
class AsyncReconfigured:
    async def reconfigure(self, config):
        self.replica = serve.get_replica_context().replica_id
        self.asynchronous = get_client().asynchronous
        self.value = await get_client().submit(inc, config["x"], pure=False)

    async def __call__(self):
        return self.value, self.asynchronous, self.replica == serve.get_replica_context().replica_id


@serve.deployment(user_config={"x": 1})
class Reconfigured:
    def reconfigure(self, config):
        self.value = get_client().submit(inc, config["x"], pure=False).result(20)

    def __call__(self):
        return self.value


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers, processes with one thread each: what waits for a task must not keep the thread that runs it."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        serve.start(client=client, port=0)
        yield client
        serve.shutdown(client=client)


@pytest.fixture(scope="module")
def handle(client):
    return serve.run(Everywhere.bind(Plus.bind()), name="everywhere", route_prefix="/everywhere", client=client)


@pytest.mark.parametrize("place", ["in_constructor", "in_def", "in_a_thread", "in_a_coroutine"])
def test_in_every_place(client, handle, place):
    found = getattr(handle, place).remote().result(60)
    assert found.pop("worker") in client.scheduler_info()["workers"]
    if place == "in_constructor":
        assert found == {**EXPECTED, "kept": 11}
    elif place != "in_a_coroutine":
        assert found == {**EXPECTED, **WITH_REFS}
    else:
        assert found == {name: {**EXPECTED, **WITH_REFS, "a future of the constructor": 12}[name] for name in found}
        assert len(found) >= 14


def test_functions_that_block_in_a_coroutine(client, handle):
    found = handle.blocking_in_a_coroutine.remote().result(60)
    assert found.pop("worker")
    assert found == {name: EXPECTED[name] for name in found}


def test_over_http(client, handle):
    url = serve.url(client=client)
    found = httpx.get(f"{url}/everywhere", timeout=60).json()
    assert (found["submit"], found["ref"]) == ("2", "3")
    serve.run(Generates.bind(), name="generates", route_prefix="/generates", client=client)
    assert httpx.get(f"{url}/generates", timeout=60).text == "1 1,2 2,3 3,"
    serve.delete("generates", client=client)


def test_at_once(client, handle):
    """Several requests compute, more than the cluster has threads."""
    assert client.gather([handle.at_once.remote(i) for i in range(12)]) == list(range(1, 13))


def test_other_constructors(client):
    other = serve.run(AsyncConstructor.bind(), name="constructor", route_prefix=None, client=client)
    assert other.values.remote().result(30) == (2, 2, [2])
    other = serve.run(Reconfigured.bind(), name="reconfigured", route_prefix=None, client=client)
    assert other.remote().result(30) == 2
    # The same when they change in place.
    for deployment, expected in [(Reconfigured, 6), (AsyncReconfigured, (6, True, True))]:
        other = serve.run(deployment.bind(), name="reconfigured", route_prefix=None, client=client)
        other.remote().result(30)
        changed = deployment.options(user_config={"x": 5}).bind()
        other = serve.run(changed, name="reconfigured", route_prefix=None, client=client)
        poll(lambda other=other, expected=expected: other.remote().result(30) == expected)
    # The clients of a replica go with it.
    before = {name for name in client.run_on_scheduler(_clients) if "replica" in name}
    assert before
    for name in ("constructor", "reconfigured"):
        serve.delete(name, client=client)
    poll(lambda: {n for n in client.run_on_scheduler(_clients) if "replica" in n} < before)


def _clients(dask_scheduler):
    return [str(name) for name in dask_scheduler.clients]


# -- cancelling --------------------------------------------------------------------------------------------------------


@serve.deployment(threads=2)
class Works:
    """Waits for Dask in many ways."""

    def __init__(self) -> None:
        self.outcome: list[str] = []
        self.kept: Any = None

    async def outcomes(self):
        return self.outcome

    async def forget(self):
        self.outcome.clear()
        self.kept = None

    @contextlib.contextmanager
    def noting(self):
        try:
            yield
        except BaseException as error:
            self.outcome.append(type(error).__name__)
            raise

    async def awaits(self, how):
        with self.noting():
            client = get_client()
            if how == "future":
                await client.submit(slow_coroutine, 1, key="work-awaits")
            elif how == "gather":
                await client.gather([client.submit(slow_coroutine, i, key=f"work-awaits-{i}") for i in range(3)])
            elif how == "compute":
                await client.compute(dask.delayed(slow_coroutine)(1, dask_key_name="work-delayed"))
            elif how == "wait":
                persisted = client.persist([dask.delayed(slow)(i, 1.0, dask_key_name=f"work-{i}") for i in range(6)])
                await distributed.wait(persisted)
            elif how in ("as_completed", "with_results"):
                futures = [client.submit(slow_coroutine, i, key=f"work-as-completed-{i}") for i in range(3)]
                async for _ in distributed.as_completed(futures, with_results=how == "with_results"):
                    pass
            elif how == "thread":
                await asyncio.to_thread(self.blocks, "result")

    def blocks(self, how):
        with self.noting():
            client = get_client()
            if how == "result":
                client.submit(slow_coroutine, 1, key="work-result").result()
            elif how == "gather":
                client.gather([client.submit(slow_coroutine, i, key=f"work-gather-{i}") for i in range(3)])
            elif how == "compute":
                dask.compute([dask.delayed(slow_coroutine)(i, dask_key_name=f"work-delayed-{i}") for i in range(3)])
            elif how == "timeout":
                client.submit(slow_coroutine, 1, key="work-timeout").result(timeout=50)
            elif how == "wait":
                distributed.wait(client.map(slow_coroutine, range(3), key="work-wait"))
            elif how == "as_completed":
                futures = client.map(slow_coroutine, range(3), key="work-as-completed")
                for _ in distributed.as_completed(futures):
                    pass
            elif how == "variable":
                future = client.submit(slow_coroutine, 1, key="work-variable")
                Variable("never").get()
                future.result()
            elif how == "wrapped":
                try:
                    client.submit(slow_coroutine, 1, key="work-wrapped").result()
                except Exception as error:
                    raise ValueError("wrapped") from error

    def computes_alone(self):
        """Cancelled while it computes by itself, it hears of it at its next wait, and its lock is released."""
        with self.noting():
            client = get_client()
            with Lock("of a def"):
                self.outcome.append("began")
                context = serve.get_request_context()
                deadline = time.monotonic() + 10
                while not context.cancelled and time.monotonic() < deadline:
                    time.sleep(0.005)
                client.submit(inc, 1, key="work-late").result()
        self.outcome.append("went on")

    def takes_the_lock(self):
        with Lock("of a def"):
            return True

    def keeps(self):
        """A result that the object keeps belongs to the object, whoever made it."""
        self.kept = get_client().submit(slow_coroutine, 1, key="kept")
        get_client().submit(slow_coroutine, 1, key="work-keeps").result()

    def shares(self):
        """The same key as another request's."""
        return get_client().submit(slow, 1, 1.0, key="shared").result()

    async def status_of_kept(self):
        return self.kept.status


def keys(dask_scheduler):
    return [str(key) for key in dask_scheduler.tasks]


def working(client: Client, prefix: str = "work") -> list[str]:
    """Tasks that the scheduler knows."""
    return [key for key in client.run_on_scheduler(keys) if key.startswith(prefix)]


def poll(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def works(client):
    yield serve.run(Works.bind(), name="works", route_prefix=None, client=client)
    serve.delete("works", client=client)


BLOCKS = ["result", "gather", "compute", "timeout", "wait", "as_completed", "variable", "wrapped"]
AWAITS = ["future", "gather", "compute", "wait", "as_completed", "with_results", "thread"]


@pytest.mark.parametrize(
    ("method", "how"), [*(("blocks", how) for how in BLOCKS), *(("awaits", how) for how in AWAITS)]
)
def test_a_cancelled_request_ends_its_dask_work(client, works, method, how):
    works.forget.remote().result(5)
    ref = getattr(works, method).remote(how)
    poll(lambda: working(client))
    begun = time.monotonic()
    ref.cancel()
    with pytest.raises(RequestCancelledError):
        ref.result(5)
    poll(lambda: not working(client))
    poll(lambda: works.outcomes.remote().result(5))
    assert time.monotonic() - begun < 8
    expected = {"blocks": "RequestCancelledError", "awaits": "CancelledError"}[method]
    poll(lambda: ("ValueError" if how == "wrapped" else expected) in works.outcomes.remote().result(5))
    # The threads of the replica are free.
    assert works.takes_the_lock.remote().result(10)


def test_a_deadline_ends_it(client, works):
    for method, how in (("blocks", "result"), ("awaits", "gather")):
        ref = getattr(works, method).options(request_timeout_s=1).remote(how)
        poll(lambda: working(client))
        with pytest.raises(RequestTimeoutError):
            ref.result(5)
        poll(lambda: not working(client))


def test_it_hears_of_it_at_its_next_wait(client, works):
    works.forget.remote().result(5)
    ref = works.computes_alone.remote()
    poll(lambda: works.outcomes.remote().result(5) == ["began"])
    ref.cancel()
    poll(lambda: works.outcomes.remote().result(5) == ["began", "RequestCancelledError"])
    poll(lambda: not working(client))
    assert works.takes_the_lock.remote().result(10)


def test_what_is_kept_or_shared_is_not_harmed(client, works):
    ref = works.keeps.remote()
    poll(lambda: working(client))
    ref.cancel()
    poll(lambda: not working(client))
    assert works.status_of_kept.remote().result(5) == "pending"
    assert working(client, "kept")
    works.forget.remote().result(5)
    poll(lambda: not working(client, "kept"))
    one, two = works.shares.remote(), works.shares.remote()
    poll(lambda: working(client, "shared"))
    one.cancel()
    assert two.result(10) == 1


def test_an_unknown_distributed():
    """Without the private name there is one line in the log, and no error."""

    class Worker:
        pass

    logger = logging.getLogger("dask_serve.replica")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        clients._intercept(Worker())
    finally:
        logger.removeHandler(handler)
    assert len(records) == 1
