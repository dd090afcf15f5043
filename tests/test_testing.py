"""`dask_serve.testing`: applications in this process, by the real parts, without a cluster and without sockets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import distributed
import pytest
from fastapi import Depends, FastAPI, WebSocket
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect

import dask_serve as serve
from dask_serve import testing

RATE = 2


@serve.deployment
class Model:
    def __init__(self, log: list[int] | None = None) -> None:
        self.log = [] if log is None else log

    def predict(self, x: int) -> int:
        self.log.append(x)
        return RATE * x

    async def later(self, x: int) -> int:
        await asyncio.sleep(0)
        return x

    def items(self, number: int) -> Any:
        yield from range(number)

    def fails(self) -> None:
        raise LookupError("nothing there")

    async def waits(self) -> None:
        await asyncio.sleep(60)

    def request(self) -> tuple[str, str]:
        return serve.get_request_context().request_id, serve.get_replica_context().deployment

    async def __call__(self, request: Request) -> dict[str, Any]:
        return {"path": request.url.path, "body": (await request.body()).decode()}


@pytest.fixture(scope="module")
def service() -> Any:
    with testing.run(Model.bind()) as running:
        yield running


# -- calls -------------------------------------------------------------------------------------------------------------


def test_calls_are_answered(service: Any) -> None:
    assert service.handle.predict.remote(3).result() == 6
    assert service.handle.later.remote(4).result() == 4
    assert list(service.handle.options(stream=True).items.remote(3)) == [0, 1, 2]
    assert service.handle.options(request_id="mine").request.remote().result() == ("mine", "Model")
    assert service.get_handle("Model") == service.handle


def test_a_users_error_arrives_as_on_a_cluster(service: Any) -> None:
    with pytest.raises(LookupError, match="nothing there") as caught:
        service.handle.fails.remote().result()
    assert "fails" in str(caught.value.__cause__)
    assert isinstance(service.handle.fails.remote().exception(), LookupError)
    with pytest.raises(serve.MethodNotFoundError, match="predict"):
        service.handle.predictt.remote(1).result()


def test_a_deadline_and_a_cancel_end_a_request(service: Any) -> None:
    with pytest.raises(serve.RequestTimeoutError):
        service.handle.options(request_timeout_s=0.05).waits.remote().result()
    ref = service.handle.waits.remote()
    with pytest.raises(TimeoutError):
        ref.result(timeout=0.01)
    ref.cancel()
    with pytest.raises(serve.RequestCancelledError):
        ref.result(timeout=5)
    assert ref.cancelled()


def test_refs_without_dask(service: Any) -> None:
    ref = service.handle.predict.remote(1)
    done = threading.Event()
    ref.add_done_callback(lambda ref: done.set())
    assert done.wait(5)
    assert serve.gather([ref, {"x": service.handle.predict.remote(2)}]) == [2, {"x": 4}]
    mirrors = [service.handle.predict.remote(x).as_concurrent_future() for x in range(3)]
    assert sum(mirror.result() for mirror in concurrent.futures.as_completed(mirrors, timeout=5)) == 6
    # As an argument of another call its value travels, a large one too.
    assert service.handle.predict.remote(ref).result() == 4
    large = service.handle.later.remote(bytes(1_000_000))
    assert service.handle.later.remote(large).result() == bytes(1_000_000)


def test_what_needs_dask_says_so(service: Any) -> None:
    ref = service.handle.predict.remote(1)
    for use in (lambda: ref.key, lambda: ref.client):
        with pytest.raises(serve.NotRunningError, match=r"(?s)needs a Dask cluster.*serve\.run"):
            use()
    assert ref.result() == 2


# -- the test's own objects --------------------------------------------------------------------------------------------


def test_class_and_arguments_are_the_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    with testing.run(Model.bind(log)) as service:
        monkeypatch.setattr(sys.modules[__name__], "RATE", 5)
        assert service.handle.predict.remote(3).result() == 15
        assert log == [3]
        assert isinstance(service.replica(), Model.func_or_class)
        assert service.replica("Model").log is log


@serve.deployment
class Pipeline:
    def __init__(self, steps: Any) -> None:
        self.steps = steps

    async def run(self, x: int) -> int:
        return int(await self.steps.first["model"].predict.remote(x)) + 1


@dataclass
class Steps:
    first: dict[str, Any]
    lock: Any


def test_applications_in_arguments_become_handles() -> None:
    lock = threading.Lock()
    with testing.run(Pipeline.bind(Steps({"model": Model.bind()}, lock))) as service:
        assert service.handle.run.remote(3).result() == 7
        assert service.replica().steps.lock is lock
        assert service.replica("Model").log == [3]
        assert repr(service) == "<Service 'default' under test, Model: 1, Pipeline: 1>"
        with pytest.raises(serve.ApplicationNotFoundError, match="Model, Pipeline"):
            service.replica("Modell")


def test_several_replicas() -> None:
    with testing.run(Pipeline.bind(Steps({"model": Model.bind()}, None)), replicas={"Model": 2}) as service:
        refs = [service.get_handle("Model").predict.remote(x) for x in range(20)]
        assert serve.gather(refs) == [2 * x for x in range(20)]
        logs = [model.log for model in service.replicas("Model")]
        assert len(logs) == 2
        assert sorted(logs[0] + logs[1]) == list(range(20))
        with pytest.raises(serve.ServeError, match="2 replicas"):
            service.replica("Model", 2)


# -- batches, models, Dask in replicas ---------------------------------------------------------------------------------


@serve.deployment
class Tools:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.config: Any = None
        self.ended = False

    def reconfigure(self, config: Any) -> None:
        self.config = config

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=1.0)
    async def batched(self, xs: list[int]) -> list[int]:
        self.sizes.append(len(xs))
        return [x + 1 for x in xs]

    @serve.multiplexed(max_num_models_per_replica=2)
    async def model(self, id: str) -> str:
        return id.upper()

    async def named(self) -> str:
        return str(await self.model(serve.get_multiplexed_model_id()))

    def dask(self) -> Any:
        return distributed.get_client()

    def itself(self) -> int:
        return int(serve.get_app_handle().named_length.remote("abc").result())

    async def named_length(self, name: str) -> int:
        return len(name)

    def shutdown(self) -> None:
        self.ended = True


def test_batches_models_configuration_and_the_end() -> None:
    with testing.run(Tools.options(user_config={"a": 1}, threads=2).bind()) as service:
        assert serve.gather([service.handle.batched.remote(x) for x in range(4)]) == [1, 2, 3, 4]
        assert service.replica().sizes == [4]
        assert service.replica().config == {"a": 1}
        assert service.handle.options(multiplexed_model_id="m").named.remote().result() == "M"
        assert service.handle.itself.remote().result() == 3
        with pytest.raises(serve.NotRunningError, match="get_client"):
            service.handle.dask.remote().result()
        tools = service.replica()
    assert tools.ended


def test_a_constructor_that_fails_is_the_cause() -> None:
    @serve.deployment
    class Bad:
        def __init__(self) -> None:
            raise ZeroDivisionError("no model")

    before = threading.active_count()
    with pytest.raises(serve.DeploymentFailedError, match=r"(?s)could not be started: Bad.*no model") as caught:
        testing.run(Bad.bind()).__enter__()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(serve.ConfigError, match=r"Model\.bind"):
        testing.run(Model)  # type: ignore[arg-type]
    with pytest.raises(serve.ConfigError, match="the deployments are Model"):
        testing.run(Model.bind(), replicas={"Modell": 1})
    with pytest.raises(serve.ConfigError, match="route_prefix"):
        testing.run(Model.bind(), route_prefix="x")
    with pytest.raises(serve.ConfigError, match="log"):
        testing.run(Model.bind(threading.Lock()), shippable=True)  # type: ignore[arg-type]


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_http(service: Any) -> None:
    answer = service.client.post("/a/b", content="hi", headers={"X-Request-ID": "me"})
    assert answer.json() == {"path": "/a/b", "body": "hi"}
    assert answer.headers["x-request-id"] == "me"
    large = service.client.post("/", content=b"x" * 300_000)
    assert len(large.json()["body"]) == 300_000


def test_http_errors_are_the_proxys(service: Any) -> None:
    with testing.run(Model.bind(), route_prefix="/api", http={"body_limit": 10}) as limited:
        assert limited.client.post("/api", content=b"x" * 11).status_code == 413
        missing = limited.client.get("/other")
        assert missing.status_code == 404
        assert "/api" in missing.text
        assert limited.client.get("/-/readyz").text == "ready"


def fastapi_app() -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        app.state.life = "up"
        yield
        app.state.life = "down"

    return FastAPI(lifespan=lifespan)


def test_fastapi_streams_and_websockets() -> None:
    app = fastapi_app()

    def secret() -> str:
        return "real"

    @serve.deployment
    @serve.ingress(app)
    class Api:
        def __init__(self) -> None:
            self.count = 0

        @app.get("/count")
        def add(self, by: int) -> int:
            self.count += by
            return self.count

        @app.get("/secret")
        def tell(self, value: str = Depends(secret)) -> str:
            return value

        @app.get("/stream")
        async def stream(self) -> StreamingResponse:
            async def parts() -> Any:
                for number in range(3):
                    yield f"{number},"

            return StreamingResponse(parts())

        @app.get("/cut")
        async def cut(self) -> StreamingResponse:
            async def parts() -> Any:
                yield "a"
                await asyncio.sleep(0.01)
                raise ValueError("in the middle")

            return StreamingResponse(parts())

        @app.websocket("/echo")
        async def echo(self, socket: WebSocket) -> None:
            await socket.accept()
            while True:
                text = await socket.receive_text()
                if text == "end":
                    await socket.close(4000, "bye")
                    return
                await socket.send_text(text * 2)

    for _ in range(2):
        # The same application again: nothing of the first run is left in its routes.
        with testing.run(Api.bind()) as service:
            client = service.client
            assert app.state.life == "up"
            assert client.get("/count", params={"by": 2}).json() == 2
            assert client.get("/count", params={"by": "x"}).status_code == 422
            assert service.replica().count == 2
            app.dependency_overrides[secret] = lambda: "fake"
            assert client.get("/secret").json() == "fake"
            assert client.get("/stream").text == "0,1,2,"
            with pytest.raises(Exception, match="without the end"):
                client.get("/cut")
            with client.websocket_connect("/echo") as websocket:
                websocket.send_text("ab")
                assert websocket.receive_text() == "abab"
                websocket.send_text("end")
                with pytest.raises(WebSocketDisconnect) as closed:
                    websocket.receive_text()
                assert closed.value.code == 4000
        assert app.state.life == "down"


# -- coroutines --------------------------------------------------------------------------------------------------------


def test_coroutines() -> None:
    async def main() -> None:
        async with testing.run(Pipeline.bind(Steps({"model": Model.bind()}, None))) as service:
            assert await service.handle.run.remote(1) == 3
            assert await service.handle.run.remote(1).result() == 3
            assert await serve.gather([service.handle.run.remote(x) for x in range(3)]) == [1, 3, 5]
            handle = await serve.get_app_handle()
            assert await handle.run.remote(2) == 5
            items = service.get_handle("Model").options(stream=True).items.remote(3)
            assert [item async for item in items] == [0, 1, 2]
        async with testing.run(Model.bind()) as service:
            answers = await asyncio.gather(*(service.async_client.get(f"/{x}") for x in range(5)))
            assert [answer.json()["path"] for answer in answers] == [f"/{x}" for x in range(5)]

    asyncio.run(main())


# -- how it ends, and what it costs ------------------------------------------------------------------------------------


def test_an_exception_ends_what_runs_at_once() -> None:
    began = time.monotonic()

    def use() -> None:
        with testing.run(Model.bind()) as service:
            service.handle.waits.remote()
            raise KeyError("in the test")

    with pytest.raises(KeyError):
        use()
    assert time.monotonic() - began < 5


def test_nothing_is_left_behind() -> None:
    def once() -> Any:
        with testing.run(Model.bind()) as service:
            service.handle.predict.remote(1).result()
            service.client.get("/")
        return service

    once()
    before = threading.active_count()
    service = once()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    with pytest.raises(serve.NotRunningError):
        service.handle.predict.remote(1)


def test_it_opens_no_network_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a socket was bound or connected: {args}")

    real = socket.socket

    class Watched(real):  # type: ignore[misc, valid-type]
        bind = connect = listen = refuse

    monkeypatch.setattr(socket, "socket", Watched)
    with testing.run(Model.bind()) as service:
        assert service.handle.predict.remote(1).result() == 2
        assert service.client.get("/").status_code == 200


def test_it_starts_in_milliseconds() -> None:
    took = []
    for _ in range(10):
        began = time.perf_counter()
        with testing.run(Model.bind()) as service:
            took.append(time.perf_counter() - began)
            service.handle.predict.remote(1).result()
    assert min(took) < 0.05
