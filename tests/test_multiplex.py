"""Multiplexed models: loading, sharing, unloading, and the way of a call to the replica that has its model."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import Client
from helpers import local_client

import dask_serve as serve
from dask_serve.context import RequestContext, request_context
from dask_serve.exceptions import ArgumentsError, ConfigError
from dask_serve.replica.host import Host, enter_host
from dask_serve.replica.pool import Pool


class Loaded:
    def __init__(self, name: str, unloaded: list[str], nbytes: int = 1) -> None:
        self.name, self.unloaded, self.nbytes = name, unloaded, nbytes

    def unload(self) -> None:
        self.unloaded.append(self.name)


class Loader:
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.unloaded: list[str] = []

    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, name):
        self.begun.append(name)
        await asyncio.sleep(0.02)
        if name == "broken":
            raise ValueError(f"no model {len(self.begun)}")
        return Loaded(name, self.unloaded)

    @serve.multiplexed(max_num_models_per_replica=2)
    def load_here(self, name):
        self.begun.append(name)
        time.sleep(0.02)
        return Loaded(name, self.unloaded)

    @serve.multiplexed(max_num_models_per_replica=None, max_bytes=100)
    async def by_size(self, name):
        self.begun.append(name)
        return Loaded(name, self.unloaded, int(name))


async def in_request(call, name, until: asyncio.Event | None = None) -> str:
    """Get a model as a request does, and hold it."""
    context = RequestContext(f"request for {name}")
    request_context.set(context)
    model = await call(name)
    if until is not None:
        await until.wait()
    context.end()
    return model.name


@pytest.mark.parametrize("method", ["load", "load_here"])
def test_each_model_is_loaded_once_and_different_ones_at_once(method):
    loader = Loader()

    async def run():
        began = time.monotonic()
        names = ["a", "b"] * 5
        assert await asyncio.gather(*[in_request(getattr(loader, method), name) for name in names]) == names
        assert sorted(loader.begun) == ["a", "b"]
        assert time.monotonic() - began < 2
        # "a" is the least recently used one.
        await in_request(getattr(loader, method), "b")
        await in_request(getattr(loader, method), "c")
        assert loader.unloaded == ["a"]
        assert (await getattr(loader, method)("b")).name == "b"
        assert sorted(loader.begun) == ["a", "b", "c"]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_model_in_use_is_not_unloaded():
    loader = Loader()

    async def run():
        done = asyncio.Event()
        users = [asyncio.ensure_future(in_request(loader.load, name, done)) for name in "ab"]
        await asyncio.sleep(0.1)
        third = asyncio.ensure_future(in_request(loader.load, "c"))
        await asyncio.sleep(0.1)
        assert not third.done(), "it waits for room"
        assert loader.unloaded == []
        done.set()
        assert await asyncio.gather(*users, third) == ["a", "b", "c"]
        assert loader.unloaded == ["a"]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_who_holds_a_model_does_not_wait_for_another():
    loader = Loader()

    async def both(first, second):
        context = RequestContext(f"{first} and {second}")
        request_context.set(context)
        await loader.load(first)
        await asyncio.sleep(0.05)
        found = (await loader.load(second)).name
        context.end()
        return found

    async def run():
        assert await asyncio.gather(both("a", "b"), both("c", "d")) == ["b", "d"]

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("method", ["load", "load_here"])
def test_what_nobody_waits_for_any_more_is_not_loaded(method):
    """Requests that went while they waited for room cost those who stay nothing."""
    loader = Loader()
    load = getattr(loader, method)

    async def gone(name):
        context = RequestContext(f"request for {name}")
        request_context.set(context)
        try:
            await asyncio.wait_for(load(name), 0.1)
        finally:
            context.end()

    async def run():
        done = asyncio.Event()
        users = [asyncio.ensure_future(in_request(load, name, done)) for name in "ab"]
        await asyncio.sleep(0.1)
        stays = asyncio.ensure_future(in_request(load, "c"))
        errors = await asyncio.gather(*[gone(name) for name in "cdef"], return_exceptions=True)
        assert [type(error) for error in errors] == [asyncio.TimeoutError] * 4
        done.set()
        assert await asyncio.gather(*users, stays) == ["a", "b", "c"]
        await asyncio.sleep(0.2)
        assert sorted(loader.begun) == ["a", "b", "c"]
        # It is loaded when it is asked for again.
        assert await in_request(load, "d") == "d"

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("cancelled", [True, False])
def test_who_loads_a_model_may_leave_others_to_do_it(cancelled):
    """Nobody gets an error that is another request's."""
    loader = Loader()

    def in_thread(name, context):
        request_context.set(context)
        try:
            return loader.load_here(name).name
        finally:
            context.end()

    async def run():
        host = Host(asyncio.get_running_loop(), Pool(4, "pool"))
        enter_host(host)

        def start(name, context):
            copied = contextvars.copy_context()
            return asyncio.ensure_future(host.pool.run(lambda: copied.run(in_thread, name, context)))

        done = asyncio.Event()
        users = [asyncio.ensure_future(in_request(loader.load_here, name, done)) for name in "ab"]
        await asyncio.sleep(0.1)
        first = RequestContext("first", None if cancelled else time.monotonic() + 0.2)
        leaves = start("c", first)
        await asyncio.sleep(0.05)
        stay = [start("c", RequestContext("second")), asyncio.ensure_future(in_request(loader.load_here, "c"))]
        await asyncio.sleep(0.05)
        if cancelled:
            first.cancel(refuse=True)
        with pytest.raises(serve.RequestCancelledError if cancelled else serve.RequestTimeoutError):
            await leaves
        done.set()
        assert await asyncio.gather(*users, *stay) == ["a", "b", "c", "c"]
        assert sorted(loader.begun) == ["a", "b", "c"]
        host.pool.stop()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_one_too_many_goes_when_it_is_not_in_use_any_more():
    loader = Loader()

    async def holds_all():
        context = RequestContext("all")
        request_context.set(context)
        for name in "abcd":
            await loader.load(name)
        assert loader.unloaded == []
        context.end()

    async def run():
        await holds_all()
        assert loader.unloaded == ["a", "b"]
        assert (await in_request(loader.load, "c"), await in_request(loader.load, "d")) == ("c", "d")
        assert loader.begun == ["a", "b", "c", "d"]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_models_by_their_bytes():
    loader = Loader()

    async def run():
        for name in ["40", "50"]:
            await in_request(loader.by_size, name)
        assert loader.unloaded == []
        await in_request(loader.by_size, "30")
        assert loader.unloaded == ["40"]
        # Now its size is known beforehand.
        await in_request(loader.by_size, "40")
        assert loader.unloaded == ["40", "50"]
        await in_request(loader.by_size, "500")
        # Those that its size has made too many go after it has come.
        for _ in range(1000):
            if len(loader.unloaded) == 4:
                break
            await asyncio.sleep(0.01)
        assert loader.unloaded == ["40", "50", "30", "40"]
        assert (await loader.by_size("500")).name == "500"
        assert loader.begun.count("500") == 1

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_load_that_fails_fails_for_all_and_is_tried_again():
    loader = Loader()

    async def run():
        found = await asyncio.gather(*[loader.load("broken") for _ in range(3)], return_exceptions=True)
        assert [str(error) for error in found] == ["no model 1"] * 3
        with pytest.raises(ValueError, match="no model 2"):
            await loader.load("broken")

    asyncio.run(asyncio.wait_for(run(), 20))


def test_whoever_began_a_load_may_leave():
    loader = Loader()

    async def run():
        first = asyncio.ensure_future(loader.load("a"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(loader.load("a"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).name == "a"
        assert loader.begun == ["a"]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_threads_share_loads():
    loader = Loader()
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(loader.load_here, ["a", "b"] * 8))
    assert [model.name for model in models] == ["a", "b"] * 8
    assert sorted(loader.begun) == ["a", "b"]


def test_hooks():
    gone = []

    async def forget(model):
        gone.append(model)

    @serve.multiplexed(max_num_models_per_replica=1, unload=forget)
    def load(name):
        return f"model {name}"

    async def run():
        for name in "abc":
            await load(name)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert gone == ["model a", "model b"]


def test_wrong_use():
    for options in [{"max_num_models_per_replica": 0}, {"max_bytes": -5}, {"unload": "now"}]:
        with pytest.raises(ConfigError, match=r"option .* is not valid"):
            serve.multiplexed(**options)
    with pytest.raises(ConfigError, match="takes a function"):
        serve.multiplexed(3)
    loader = Loader()
    with pytest.raises(ArgumentsError, match="id of a model, a str, not 3"):
        loader.load_here(3)
    with pytest.raises(ArgumentsError, match="got no model id"):
        loader.load_here("")


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_models_in_use_stay_whatever_happens(kind):
    """Coroutines and threads of the pool, some cancelled, some loads failing: no model goes while a request has it."""
    source = random.Random(len(kind))
    there: set[Model] = set()
    most = [0]

    class Model:
        def __init__(self, name):
            self.name, self.alive = name, True
            there.add(self)
            most[0] = max(most[0], len(there))

        def unload(self):
            self.alive = False
            there.discard(self)

    def make(name):
        if name == "broken":
            raise ValueError(name)
        return Model(name)

    @serve.multiplexed(max_num_models_per_replica=3)
    def load(name):
        time.sleep(0.001)
        return make(name)

    @serve.multiplexed(max_num_models_per_replica=3)
    async def load_async(name):
        await asyncio.sleep(0.001)
        return make(name)

    async def run():
        host = Host(asyncio.get_running_loop(), Pool(4, "pool"))
        enter_host(host)
        get = load if kind == "def" else load_async
        ends: Counter[str] = Counter()

        async def one(number):
            await asyncio.sleep(source.random() * 0.5)
            context = RequestContext(str(number))
            request_context.set(context)
            name = source.choice(["a", "b", "c", "d", "e", "f", "broken"])

            async def use():
                if kind == "def" and number % 4 == 0:
                    copied = contextvars.copy_context()
                    model = await host.pool.run(lambda: copied.run(load, name))
                else:
                    model = await get(name)
                for _ in range(3):
                    assert model.alive
                    assert model.name == name
                    await asyncio.sleep(0.001)
                assert model.alive

            try:
                await asyncio.wait_for(use(), 0.003 if number % 7 == 3 else 30)
                ends["used"] += 1
            except ValueError:
                assert name == "broken"
                ends["failed"] += 1
            except asyncio.TimeoutError:
                ends["cancelled"] += 1
            context.end()

        await asyncio.wait_for(asyncio.gather(*[one(number) for number in range(300)]), 60)
        assert sum(ends.values()) == 300
        assert ends["used"] > 100
        await asyncio.wait_for(get("a"), 10)
        assert sorted(host.loaded()[0]) == sorted(model.name for model in there)
        host.pool.stop()

    asyncio.run(run())
    # One may come while the hook of another one still runs.
    assert most[0] <= 5


# -- replicas ----------------------------------------------------------------------------------------------------------


@serve.deployment(num_replicas=2, max_ongoing_requests=20)
class Models:
    def __init__(self):
        self.loads = []

    @serve.multiplexed(max_num_models_per_replica=2)
    def load(self, name):
        self.loads.append(name)
        time.sleep(0.05)
        return f"model {name}"

    async def use(self, seconds=0.0):
        model = await self.load()
        await asyncio.sleep(seconds)
        return model, serve.get_replica_context().replica_id

    def use_in_thread(self):
        return self.load()

    @serve.batch(max_batch_size=20)
    async def together(self, values):
        return [(await self.load(), len(values))] * len(values)

    async def __call__(self, request):
        return {"model": await self.load(), "replica": serve.get_replica_context().replica_id}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(2, 1) as client:
        yield client


@pytest.fixture(scope="module")
def handle(client):
    serve.start(port=0, client=client)
    return serve.run(Models.bind(), client=client)


def use(handle, name, **kwargs):
    return handle.use.options(multiplexed_model_id=name).remote(**kwargs)


def test_calls_stay_with_the_replica_that_has_the_model(handle):
    found = {name: [use(handle, name).result(20) for _ in range(10)] for name in ["a", "b"]}
    for name, answers in found.items():
        assert {model for model, _ in answers} == {f"model {name}"}
        assert len({replica for _, replica in answers}) == 1
    assert found["a"][0][1] != found["b"][0][1], "each replica has one of the two"


def test_a_hot_model_is_spread(handle):
    use(handle, "hot").result(20)
    deadline = time.monotonic() + 20
    replicas: set[str] = set()
    while len(replicas) < 2 and time.monotonic() < deadline:
        refs = [use(handle, "hot", seconds=0.02) for _ in range(30)]
        replicas |= {ref.result(20)[1] for ref in refs}
    assert len(replicas) == 2


def test_threads_and_batches_get_models(handle):
    assert handle.use_in_thread.options(multiplexed_model_id="a").remote().result(20) == "model a"
    refs = [handle.together.options(multiplexed_model_id=name).remote(0) for name in ["a", "b", "a", "b"]]
    assert [ref.result(20)[0] for ref in refs] == ["model a", "model b", "model a", "model b"]


def test_http_header(client, handle):
    url = serve.url(client=client)
    use(handle, "web").result(20)

    def get(header: str) -> bytes:
        request = urllib.request.Request(url, headers={header: "web"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()

    assert b'"model web"' in get("serve_multiplexed_model_id").replace(b": ", b":").replace(b'model":', b"")
    assert len({get("serve-multiplexed-model-id") for _ in range(8)}) == 1


def test_no_model_named(handle):
    with pytest.raises(ArgumentsError, match="got no model id"):
        handle.use.remote().result(20)


def test_status_tells_what_is_where(client, handle):
    _, replica = use(handle, "seen").result(20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        loaded = {id: names for worker in serve.status(client=client).workers for id, names in worker.models.items()}
        if "seen" in loaded.get(replica, ()):
            break
        time.sleep(0.05)
    assert "seen" in loaded[replica]
    assert all(len(names) <= 2 for names in loaded.values())
    assert f"{replica} has models" in str(serve.status(client=client))


def test_models_in_use_limit_what_is_loaded(handle):
    """Eight models at once on two replicas with room for two each: nobody loses his model, all are answered."""
    names = [f"m{i}" for i in range(8)]
    refs = [use(handle, name, seconds=0.05) for name in names * 2]
    assert [ref.result(30)[0] for ref in refs] == [f"model {name}" for name in names * 2]
    assert threading.active_count() < 100


def test_example(client):
    pytest.importorskip("sklearn")
    from examples.digits import split
    from examples.many_digits import app

    handle = serve.run(app, name="many", route_prefix=None, client=client)
    _, images, _, labels = split()
    for image, label in list(zip(images, labels, strict=True))[:10]:
        even_or_odd = handle.predict.options(multiplexed_model_id="02468" if label % 2 == 0 else "13579")
        assert even_or_odd.remote(image).result(30) == label
