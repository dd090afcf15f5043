"""What Ray Serve's users were promised of calls from Python in 2022, S1 to S16, in the terms of dask_serve.

S1 the same deployment over HTTP and from Python; S2 composition; S3 and S5 `Deployment.get_handle`; S4 calls from
Python are balanced as HTTP requests are; S6 ordinary arguments; S7 what a call returns can be waited for; S8 the
default method and named ones; S9 the practice for both entrances; S10 to S13 the two types of handle; S14 the
asynchronous one carries its calls itself; S15 what handles can do besides; S16 calls that nobody awaited as arguments.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from distributed import Client, Future, as_completed, wait
from helpers import http_client, wait_until
from starlette.requests import Request

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster
from dask_serve.handle import DeploymentHandle
from dask_serve.proxy import forward
from dask_serve.routing.engine import Engine
from dask_serve.routing.router import Router
from dask_serve.routing.session import Session

# -- what is served ----------------------------------------------------------------------------------------------------


@serve.deployment
class Greeter:
    """The practice of S9: ``__call__`` reads the request, a method does the work."""

    async def __call__(self, request: Request) -> str:
        return self.say_hello(request.query_params["name"])

    def say_hello(self, name: str) -> str:
        return f"Hello {name}!"


@serve.deployment
class Methods:
    def __call__(self, arg):
        return f"__call__: {arg}"

    def method1(self, arg):
        return f"Method1: {arg}"

    def fail(self):
        raise KeyError("of user code")

    async def after(self, delay, value):
        await asyncio.sleep(delay)
        return value

    def kind(self, value):
        return type(value).__name__

    def given(self, *args, **kwargs):
        return args, kwargs


@serve.deployment
class Composed:
    """Is given handles, and gets some by itself."""

    def __init__(self, bound: DeploymentHandle, nested: Any = None) -> None:
        self.bound = bound
        self.nested = nested

    async def __call__(self, request: Request) -> str:
        return await self.bound.say_hello.remote(request.query_params["name"])

    async def through(self, how: str, name: str) -> str:
        if how == "bound":
            return await self.bound.say_hello.remote(name)
        if how == "nested":
            return await self.nested["list"][0].say_hello.remote(name)
        if how == "by name":
            return await serve.get_deployment_handle("Greeter").say_hello.remote(name)
        if how == "get_handle":
            return await Greeter.get_handle().say_hello.remote(name)
        ref = await Greeter.get_handle(sync=False).say_hello.remote(name)
        return await ref


@serve.deployment(num_replicas=4, max_ongoing_requests=3)
class Pool:
    """Tells who answered, counts what runs at once, and waits for a file where it is asked to."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def __call__(self, request: Request) -> Any:
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.005)
        finally:
            self.running -= 1
        return {"replica": serve.get_replica_context().replica_id, "pid": os.getpid(), "most": self.most}

    async def hold(self, path: str) -> str:
        with Path(path).open("a") as file:
            file.write(f"{serve.get_replica_context().replica_id}\n")
        while not Path(path).with_suffix(".go").exists():
            await asyncio.sleep(0.01)
        return serve.get_replica_context().replica_id


@serve.deployment
class Echo:
    async def __call__(self, x: int) -> int:
        return x


@serve.deployment
def kind_of_request(request: Request) -> str:
    return f"{type(request).__module__}.{type(request).__name__}"


@serve.deployment
async def read_request(request: Request) -> dict[str, Any]:
    return {
        "method": request.method,
        "path": request.url.path,
        "query": dict(request.query_params),
        "header": request.headers["x-own"],
        "body": (await request.body()).decode(),
        "gone": await request.is_disconnected(),
    }


@serve.deployment
class ForwardsRequest:
    """Hands the request that it got over HTTP to the next deployment, before or after it has read the body."""

    def __init__(self, kind: DeploymentHandle, read: DeploymentHandle) -> None:
        self.kind = kind
        self.read = read

    async def __call__(self, request: Request) -> Any:
        if "first" in request.query_params:
            await request.body()
        return [await self.kind.remote(request), await self.read.remote(request), (await request.body()).decode()]


@serve.deployment
class ForwardsRequestFromThread(ForwardsRequest.func_or_class):
    def __call__(self, request: Request) -> Any:
        return [self.kind.remote(request).result(), self.read.remote(request).result()]


# -- the service -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Service:
    client: Client
    url: str

    def run(self, app: serve.Application, name: str, **options: Any) -> DeploymentHandle:
        return serve.run(app, name, f"/{name}", client=self.client, **options)

    def get(self, path: str) -> httpx.Response:
        with http_client(self.url) as http:
            return http.get(path)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with EmbeddedCluster.start(n_workers=2, nthreads=2, dashboard_address=None) as cluster:
        with Client(cluster.scheduler_address) as client:
            client.wait_for_workers(2, timeout=30)
            yield Service(client, serve.start(port=0, client=client))


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def many(function: Callable[[], Any], count: int, at_once: int = 16) -> list[Any]:
    """Call a function ``count`` times, from so many threads."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda _: function(), range(count)))


# -- S1 to S3, S5, S6 --------------------------------------------------------------------------------------------------


def test_s01_http_and_python_reach_the_same_deployment(service):
    handle = service.run(Greeter.bind(), "s01")
    assert service.get("/s01?name=Alice").text == handle.say_hello.remote("Alice").result(10) == "Hello Alice!"


def test_s02_deployments_call_each_other(service):
    greeter = Greeter.bind()
    handle = service.run(Composed.bind(greeter, {"list": [greeter]}), "s02")
    try:
        for how in ("bound", "nested", "by name", "get_handle", "asynchronous get_handle"):
            assert handle.through.remote(how, "Bob").result(10) == "Hello Bob!"
        assert service.get("/s02?name=Bob").text == "Hello Bob!"
    finally:
        serve.delete("s02", client=service.client)


def test_s03_s05_get_handle_calls_that_deployment(service):
    service.run(Composed.bind(Greeter.options(name="greets").bind()), "s03")
    service.run(Methods.bind(), "s05")
    composed, methods = Composed.get_handle(), Methods.get_handle()
    assert (composed.app_name, composed.deployment_name) == ("s03", "Composed")
    assert (methods.app_name, methods.deployment_name) == ("s05", "Methods")
    assert composed.through.remote("bound", "Carol").result(10) == "Hello Carol!"
    assert methods.remote("x").result(10) == "__call__: x"
    greeter = Greeter.options(name="greets").get_handle()
    assert greeter.say_hello.remote("Carol").result(10) == "Hello Carol!"
    for name in ("s03", "s05"):
        serve.delete(name, client=service.client)


def test_s06_ordinary_arguments_go_to_the_method(service):
    handle = service.run(Methods.bind(), "s06")
    assert handle.given.remote().result(10) == ((), {})
    odd = {"lambda": lambda x: x + 1, "array": np.arange(3), "set": {1}, "none": None, "point": complex(1, 2)}
    args, kwargs = handle.given.remote(1, "two", [3], odd, method_name="mine", args=4, self_=5).result(10)
    assert args[:3] == (1, "two", [3])
    assert kwargs == {"method_name": "mine", "args": 4, "self_": 5}
    assert args[3].pop("lambda")(1) == 2
    np.testing.assert_array_equal(args[3].pop("array"), np.arange(3))
    assert args[3] == {"set": {1}, "none": None, "point": complex(1, 2)}
    assert handle.kind.remote({"no": "wrapping"}).result(10) == "dict"


# -- S4 ----------------------------------------------------------------------------------------------------------------

#: Requests per entrance; of four replicas each has a quarter, give or take 9 (one standard deviation at random).
SHARES_OF = 400


def shares(answers: list[dict[str, Any]]) -> Counter[str]:
    return Counter(answer["replica"] for answer in answers)


@pytest.fixture(scope="module")
def pool(service: Service) -> DeploymentHandle:
    return service.run(Pool.bind(), "s04")


def entrances(service: Service, pool: DeploymentHandle) -> dict[str, Callable[[], dict[str, Any]]]:
    with_retries = pool.answer.options(retries_on_loss=1)
    return {"HTTP": lambda: service.get("/s04").json(), "handle": lambda: with_retries.remote().result(20)}


def test_s04_http_and_handles_are_balanced_alike(service, pool):
    ways = entrances(service, pool)
    found = {name: shares(many(call, SHARES_OF)) for name, call in ways.items()}
    for name, counts in found.items():
        assert sum(counts.values()) == SHARES_OF
        assert len(counts) == 4, f"{name} left replicas out: {counts}"
        assert max(counts.values()) < 2 * min(counts.values()), f"{name} is not balanced: {counts}"
    apart = sum(abs(found["HTTP"][replica] - found["handle"][replica]) for replica in found["HTTP"])
    assert apart / SHARES_OF < 0.4, f"the shares differ: {found}"
    # Both entrances have the same code between them and the replicas.
    assert forward.Router is Router
    _, fabric = Session.of(service.client).engine()
    assert type(fabric.routers["s04/Pool"]) is Router


def test_s04_http_and_handles_keep_the_same_limits(service, pool):
    """What exceeds ``max_ongoing_requests`` of all replicas waits outside of them, wherever it came from."""
    ways = entrances(service, pool)
    with ThreadPoolExecutor(2) as both:
        futures = [both.submit(many, call, 150, 40) for call in ways.values()]
        answers = [answer for future in futures for answer in future.result(60)]
    most = {answer["replica"]: 0 for answer in answers}
    for answer in answers:
        most[answer["replica"]] = max(most[answer["replica"]], answer["most"])
    # Never more than the limit, and the limit was reached: 80 callers for 12 places.
    assert set(most.values()) == {3}, most


def test_s04_neither_uses_a_draining_replica(service, pool, tmp_path):
    roomy = Pool.options(max_ongoing_requests=50)
    service.run(roomy.bind(), "s04")
    ways = entrances(service, pool)
    path = tmp_path / "held"
    held: list[Any] = []
    scale = threading.Thread(target=service.run, args=(roomy.options(num_replicas=1).bind(), "s04"))
    try:
        # Something runs in each of them, so that none can end.
        while len(set(lines(path))) < 4:
            assert len(held) < 40
            held.append(pool.hold.remote(str(path)))
            wait_until(lambda: len(lines(path)) == len(held))
        scale.start()
        wait_until(lambda: [one.state for one in replicas_of(service)].count("draining") == 3)
        answers = {name: shares(many(call, 50)) for name, call in ways.items()}
        (remaining,) = [one.id for one in replicas_of(service) if one.state == "ready"]
        assert {name: set(counts) for name, counts in answers.items()} == {name: {remaining} for name in ways}
    finally:
        path.with_suffix(".go").touch()
        if scale.ident is not None:
            scale.join(30)
    # What ran in the others was finished there.
    assert len({ref.result(20) for ref in held}) == 4
    service.run(Pool.bind(), "s04")


def test_s04_neither_uses_a_dead_replica(service, pool):
    ways = entrances(service, pool)
    answers = many(ways["handle"], 100)
    victim = answers[0]["pid"]
    assert len({answer["pid"] for answer in answers}) == 2
    os.kill(victim, signal.SIGKILL)
    # At once: whoever was there first is sent elsewhere (HTTP does so for GET by itself), and nobody fails.
    for name, call in ways.items():
        answers = many(call, 60)
        assert victim not in {answer["pid"] for answer in answers}, name
    wait_until(lambda: [one.state for one in replicas_of(service)] == ["ready"] * 4)
    for name, call in ways.items():
        assert len(shares(many(call, 200))) == 4, name
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE


def replicas_of(service: Service) -> list[Any]:
    return serve.status(client=service.client).applications["s04"].deployments["Pool"].replicas


# -- S7 to S9 ----------------------------------------------------------------------------------------------------------


def test_s07_the_result_is_waited_for_and_retrieved(service):
    handle = service.run(Methods.bind(), "s07")
    client = service.client
    ref = handle.remote("x")
    assert isinstance(ref, Future)
    assert ref.result(timeout=10) == "__call__: x"
    refs = [handle.after.remote(delay, delay) for delay in (0.2, 0.0)]
    done, not_done = wait(refs, timeout=10)
    assert (done, not_done) == (set(refs), set())
    assert client.gather(refs) == [0.2, 0.0]
    refs = [handle.after.remote(delay, delay) for delay in (0.3, 0.0)]
    assert [ref.result() for ref in as_completed(refs)] == [0.0, 0.3]
    for retrieve in (lambda ref: ref.result(10), lambda ref: client.gather(ref)):
        with pytest.raises(KeyError, match="of user code"):
            retrieve(handle.fail.remote())

    async def awaits() -> Any:
        return await handle.after.remote(0.01, "awaited")

    assert asyncio.run(awaits()) == "awaited"


def test_s08_the_default_method_and_a_named_one(service):
    handle = serve.run(Methods.bind(), "s08", None, client=service.client)
    assert handle.remote("hi").result(10) == "__call__: hi"
    assert handle.method1.remote("hi").result(10) == "Method1: hi"


def test_s09_one_method_for_both_entrances(service):
    handle = serve.run(Greeter.bind(), "s09", "/api", client=service.client)
    assert service.get("/api?name=Alice").text == "Hello Alice!"
    assert handle.say_hello.remote("Alice").result(10) == "Hello Alice!"


# -- S10 to S14: the two types of handle -------------------------------------------------------------------------------


def test_s10_s11_s12_s13_two_types_of_handle(service):
    service.run(Echo.bind(), "s10")
    default, synchronous = Echo.get_handle(), Echo.get_handle(sync=True)
    asynchronous = default.options(sync=False)
    # S11: the synchronous one is the default, and returns the ref directly.
    assert default == synchronous != asynchronous
    assert isinstance(default.remote(1), serve.DeploymentResponse)
    assert default.remote(1).result(10) == 1
    # S13: outside of a running loop the other one says what to do.
    for attempt in (lambda: Echo.get_handle(sync=False), lambda: asynchronous.remote(1)):
        with pytest.raises(serve.ServeError, match=r"sync=False.*running event loop.*sync=True"):
            attempt()

    async def main() -> None:
        handle = Echo.get_handle(sync=False)
        assert handle == asynchronous
        # S12: awaited it is the ref, and the ref is the value.
        ref = await handle.remote(2)
        assert isinstance(ref, serve.DeploymentResponse)
        assert await ref == 2
        assert await asyncio.gather(*[await handle.remote(i) for i in range(20)]) == list(range(20))

    asyncio.run(main())


def test_s14_the_asynchronous_handle_uses_no_other_thread(service, monkeypatch):
    """Calls are handed to no other thread, so that 32 callers at once are not served later."""
    synchronous = service.run(Echo.bind(), "s14")
    asynchronous = synchronous.options(sync=False)
    hand_overs = Counter[str]()
    put = Engine.put

    def counted(engine: Engine, *args: Any) -> None:
        hand_overs["calls"] += 1
        put(engine, *args)

    callers, each = 32, 25

    def in_threads() -> float:
        begun = time.perf_counter()
        many(lambda: [synchronous.remote(i).result(20) for i in range(each)], callers, at_once=callers)
        return time.perf_counter() - begun

    async def caller() -> None:
        for i in range(each):
            assert await (await asynchronous.remote(i)) == i

    async def in_a_loop() -> float:
        await caller()
        hand_overs.clear()
        begun = time.perf_counter()
        await asyncio.gather(*[caller() for _ in range(callers)])
        took = time.perf_counter() - begun
        assert not hand_overs
        return took

    in_threads()
    monkeypatch.setattr(Engine, "put", counted)
    asyncio.run(in_a_loop())
    in_threads()
    assert hand_overs["calls"] >= callers * each
    monkeypatch.undo()
    # The fastest of some rounds each, and some margin: what counts was counted above, and machines are busy.
    rounds = [(in_threads(), asyncio.run(in_a_loop())) for _ in range(5)]
    assert min(took for _, took in rounds) < 1.5 * min(took for took, _ in rounds)


# -- S15, S16 ----------------------------------------------------------------------------------------------------------


def test_s15_handles_travel_and_are_alike(service):
    handle = service.run(Methods.bind(), "s15")
    assert len({Methods.get_handle(app_name="s15") for _ in range(100)}) == 1
    copy = pickle.loads(pickle.dumps(handle))
    assert copy == handle
    assert copy.method1.remote(1).result(10) == "Method1: 1"
    assert service.client.submit(lambda h: h.method1.remote(2).result(), handle).result(20) == "Method1: 2"
    assert handle.options(method_name="method1").remote(3).result(10) == "Method1: 3"
    assert handle.options(method_name="fail").options(method_name="method1").remote(4).result(10) == "Method1: 4"
    with pytest.raises(serve.MethodNotFoundError, match=r"no method 'missing'.*__call__, after, fail, given, kind"):
        handle.missing.remote().result(10)
    assert many(lambda: handle.method1.remote(5).result(10), 16) == ["Method1: 5"] * 16

    async def main() -> Any:
        return await handle.method1.remote(6)

    assert [asyncio.run(main()) for _ in range(5)] == ["Method1: 6"] * 5


def test_s15_a_request_stays_a_request(service):
    for target, name in ((ForwardsRequest, "s15-request"), (ForwardsRequestFromThread, "s15-request-def")):
        service.run(target.bind(kind_of_request.bind(), read_request.bind()), name)
        for query in ("x=1", "x=1&first=1"):
            answer = httpx.post(
                f"{service.url}/{name}/deep?{query}", content="the body", headers={"x-own": "y"}, timeout=20
            )
            kind, seen, *own = answer.json()
            assert kind == "starlette.requests.Request"
            assert seen == {
                "method": "POST",
                "path": f"/{name}/deep",
                "query": dict(pair.split("=") for pair in query.split("&")),
                "header": "y",
                "body": "the body",
                "gone": False,
            }
            # Whoever has passed it on can still read it.
            assert own in ([], ["the body"])


def test_s15_requests_of_a_session(service):
    """A web application of the user's own passes its requests on; so do tests that make them up."""
    handle = service.run(read_request.bind(), "s15-session").options(sync=False)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/own",
        "query_string": b"x=1",
        "headers": [(b"x-own", b"y"), (b"host", b"h")],
        "state": {"pool": threading.Lock()},
        "app": threading.Lock(),
    }
    messages = [{"type": "http.request", "body": b"the ", "more_body": True}, {"type": "http.request", "body": b"body"}]
    seen = {"method": "POST", "path": "/own", "query": {"x": "1"}, "header": "y", "body": "the body", "gone": False}

    async def slow() -> Any:
        if len(messages) == 1:
            await asyncio.sleep(0.01)
        return messages.pop(0)

    async def main() -> None:
        request = Request(scope, slow)
        with pytest.raises(serve.PayloadError, match=r"await request\.body\(\)"):
            await (await handle.remote(request))
        # Nothing was lost.
        assert await request.body() == b"the body"
        assert await (await handle.remote(request)) == seen
        assert await (await handle.remote(request=Request(scope))) == {**seen, "body": ""}
        streamed = Request(scope, slow)
        messages.extend([{"type": "http.request", "body": b"gone"}] * 2)
        assert [chunk async for chunk in streamed.stream()] == [b"gone", b""]
        with pytest.raises(serve.PayloadError, match="stream"):
            await (await handle.remote(streamed))

    asyncio.run(main())


def test_s16_calls_that_nobody_awaited_as_arguments(service):
    handle = service.run(Methods.bind(), "s16").options(sync=False)

    async def main() -> None:
        pending = handle.after.remote(0.05, 7)
        assert await (await handle.kind.remote(pending)) == "int"
        nested = {"list": [handle.after.remote(0.05, 1), (handle.method1.remote(2),), lambda: "for cloudpickle"]}
        (value,), named = await (await handle.given.remote(nested, named=handle.after.remote(0, 3)))
        assert value["list"][:2] == [1, ("Method1: 2",)]
        assert named == {"named": 3}
        with pytest.raises(KeyError, match="of user code"):
            await (await handle.kind.remote(handle.fail.remote()))

    asyncio.run(main())
