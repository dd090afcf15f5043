"""ASGI applications as deployments: declared, sent, built, started, asked and ended, over real proxies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from distributed import Client
from helpers import embedded_client, http_client, wait_until
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import dask_serve as serve
from dask_serve.exceptions import ConfigError
from dask_serve.ingress import ingress_of
from dask_serve.shipping import code, graph
from dask_serve.shipping.graph import build

fastapi = pytest.importorskip("fastapi")
pydantic = pytest.importorskip("pydantic")

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import StreamingResponse  # noqa: E402

# -- what is served: FastAPI with routes that are methods ----------------------------------------------------


class Item(pydantic.BaseModel):
    name: str
    price: float = pydantic.Field(gt=0)
    parts: list[Item] = []


class Refused(Exception):
    pass


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> Any:
    replica = serve.get_replica_context()
    journal = replica.servable_object.journal
    app.state.began = replica.deployment
    with journal.open("a") as file:
        file.write("up\n")
    yield {"lent": ["by the lifespan"]}
    await asyncio.sleep(0)
    with journal.open("a") as file:
        file.write("down\n")


app = FastAPI(title="Shop", lifespan=lifespan)
#: No pickle takes it; each replica has a new one.
app.state.lock = threading.Lock()
app.add_middleware(GZipMiddleware, minimum_size=500)
app.add_middleware(CORSMiddleware, allow_origins=["https://example.org"])

router = APIRouter(prefix="/router", tags=["router"])
inner = FastAPI()


async def shout(word: str = "quiet") -> str:
    return word.upper()


@router.get("/shout")
async def shouted(word: str = Depends(shout)) -> dict[str, str]:
    return {"word": word}


@router.get("/raises")
async def raises() -> None:
    raise Refused("refused by the router")


app.include_router(router, prefix="/v1")


@inner.get("/where")
async def where(request: Request) -> dict[str, str]:
    scope = request.scope
    return {"root_path": scope["root_path"], "path": scope["path"], "url": str(request.url_for("where").path)}


app.mount("/inner", inner)


@app.exception_handler(Refused)
async def refused(request: Request, error: Refused) -> JSONResponse:
    return JSONResponse({"refused": str(error)}, 418)


@app.middleware("http")
async def stamp(request: Request, call_next: Any) -> Any:
    response = await call_next(request)
    response.headers["x-stamp"] = serve.get_request_context().request_id
    return response


class Base:
    @app.get("/inherited")
    async def inherited(self) -> str:
        return f"inherited by {type(self).__name__}"

    @app.get("/overridden")
    async def overridden(self) -> str:
        return "base"


class Shop(Base):
    def __init__(self, journal: str, doubler: Any) -> None:
        self.journal = Path(journal)
        self.doubler = doubler
        self.items: dict[str, Item] = {}

    async def overridden(self) -> str:
        return "subclass"

    @app.get("/add/{number}", name="add")
    async def add(self, number: int, by: int = 1) -> int:
        """Add two numbers."""
        return number + by

    @app.post("/items", status_code=201)
    async def create(self, item: Item) -> Item:
        self.items[item.name] = item
        return item

    @app.get("/items/{name}", response_model=Item)
    def read(self, name: str) -> Any:
        if name not in self.items:
            raise HTTPException(404, f"no item {name}")
        return self.items[name]

    @app.get("/thread")
    def thread(self) -> dict[str, Any]:
        return {"thread": threading.current_thread().name, "id": serve.get_request_context().request_id}

    @app.get("/state")
    async def state(self, request: Request) -> dict[str, Any]:
        lent = request.state.lent
        with request.app.state.lock:
            return {"began": request.app.state.began, "lent": lent, "own": request.app is app}

    @app.get("/background")
    async def background(self, tasks: BackgroundTasks, note: str) -> str:
        async def work() -> None:
            await asyncio.sleep(0.2)
            with self.journal.open("a") as file:
                file.write(note + "\n")

        tasks.add_task(work)
        return "at once"

    @app.get("/onward")
    async def onward(self) -> dict[str, Any]:
        here = serve.get_request_context()
        there = await self.doubler.told.remote()
        return {"here": here.request_id, "there": there, "deadline": here.deadline is not None}

    @app.get("/error")
    async def error(self) -> None:
        raise ValueError("the secret of the endpoint")

    @app.get("/large")
    async def large(self) -> str:
        return "x" * 10_000

    @app.get("/stream")
    async def stream(self, n: int = 3, pause: float = 0.0) -> StreamingResponse:
        async def generate() -> Any:
            try:
                for number in range(n):
                    yield f"{number}\n"
                    await asyncio.sleep(pause)
            finally:
                with self.journal.open("a") as file:
                    file.write("closed\n")

        return StreamingResponse(generate(), media_type="text/event-stream")

    @app.get("/path/{rest:path}")
    async def path(self, rest: str, request: Request) -> dict[str, Any]:
        return {
            "rest": rest,
            "raw": request.scope["raw_path"].decode(),
            "url_for": request.url_for("add", number=1).path,
        }

    @app.api_route("/with-slash/", methods=["GET"])
    async def with_slash(self) -> str:
        return "slash"

    def for_handles(self, x: int) -> int:
        return 2 * x


class Doubler:
    async def told(self) -> dict[str, Any]:
        context = serve.get_request_context()
        return {"id": context.request_id, "deadline": context.deadline is not None}


# -- other applications --------------------------------------------------------------------------------------


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """Knows nothing of lifespans."""
    assert scope["type"] == "http"
    if scope["path"].endswith("/silent"):
        return
    if scope["path"].endswith("/half"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await asyncio.sleep(0.1)
        return
    if scope["path"].endswith("/headless"):
        await send({"type": "http.response.body", "body": b"ab"})
        return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"{scope['root_path']}|{scope['path']}".encode()})
    if scope["path"].endswith("/late"):
        raise RuntimeError("after the answer")


def starlette_app(directory: str) -> Starlette:
    async def home(request: Any) -> Any:
        return PlainTextResponse(str(request.url_for("file", path="/a.txt").path))

    async def away(request: Any) -> Any:
        return RedirectResponse(request.url_for("home"))

    return Starlette(
        routes=[
            Route("/", home, name="home"),
            Route("/away", away),
            Mount("/files", StaticFiles(directory=directory), name="file"),
        ],
        middleware=[Middleware(GZipMiddleware)],
    )


class Built:
    """Builds its application from what the instance has."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.lock = threading.Lock()


async def build_app(instance: Built) -> FastAPI:
    made = FastAPI()
    made.state.lock = instance.lock

    @made.get("/word")
    async def word() -> str:
        with made.state.lock:
            return instance.word

    return made


def build_litestar() -> Any:
    from litestar import Litestar, get

    @get("/hello/{name:str}")
    async def hello(name: str) -> dict[str, str]:
        return {"hello": name}

    return Litestar([hello])


def build_quart() -> Any:
    from quart import Quart

    quart = Quart("quart")

    @quart.get("/hello/<name>")
    async def hello(name: str) -> dict[str, str]:
        return {"hello": name}

    return quart


@dataclasses.dataclass
class Service:
    url: str
    journal: Path
    client: Client

    def run(self, target: Any, name: str, *args: Any) -> Any:
        return serve.run(target.bind(*args), name=name, route_prefix=f"/{name}", client=self.client, timeout=30)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("ingress")
    (directory / "a.txt").write_text("a static file")
    journal = directory / "journal"
    with embedded_client(1, 2) as client:
        service = Service(serve.start(port=0, client=client), journal, client)
        shop = serve.deployment(serve.ingress(app)(Shop))
        service.run(shop, "shop", str(journal), serve.deployment(Doubler).bind())
        service.run(serve.deployment(serve.ingress(plain)(), name="plain"), "plain")
        service.run(serve.deployment(serve.ingress(starlette_app(str(directory)))(), name="starlette"), "starlette")
        service.run(serve.deployment(serve.ingress(build_app)(Built)), "built", "of the instance")
        yield service


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with http_client(service.url) as http:
        yield http


# -- FastAPI -------------------------------------------------------------------------------------------------


def test_methods_are_routes(http):
    answer = http.get("/shop/add/2", params={"by": 5})
    assert (answer.status_code, answer.json()) == (200, 7)
    assert http.get("/shop/add/x").status_code == 422
    assert http.get("/shop/inherited").json() == "inherited by Shop"
    assert http.get("/shop/overridden").json() == "subclass"


def test_models_are_validated_and_answered(http):
    item = {"name": "pen", "price": 1.5, "parts": [{"name": "ink", "price": 0.5, "parts": []}]}
    answer = http.post("/shop/items", json=item)
    assert (answer.status_code, answer.json()) == (201, item)
    assert http.get("/shop/items/pen").json() == item
    answer = http.get("/shop/items/none")
    assert (answer.status_code, answer.json()) == (404, {"detail": "no item none"})
    answer = http.post("/shop/items", json={"name": "pen", "price": -1})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "price"]


def test_routers_dependencies_handlers_and_mounted_applications(http):
    assert http.get("/shop/v1/router/shout", params={"word": "ab"}).json() == {"word": "AB"}
    answer = http.get("/shop/v1/router/raises")
    assert (answer.status_code, answer.json()) == (418, {"refused": "refused by the router"})
    assert http.get("/shop/inner/where").json() == {
        "root_path": "/shop/inner",
        "path": "/shop/inner/where",
        "url": "/shop/inner/where",
    }


def test_paths_urls_and_slashes_below_the_prefix(http):
    assert http.get("/shop/path/a%2Fb%20c").json() == {
        "rest": "a/b c",
        "raw": "/shop/path/a%2Fb%20c",
        "url_for": "/shop/add/1",
    }
    answer = http.get("/shop/with-slash")
    assert answer.status_code == 307
    assert httpx.URL(answer.headers["location"]).path == "/shop/with-slash/"
    assert http.get("/shop/with-slash/").json() == "slash"


def test_the_openapi_page_under_the_prefix(http):
    schema = http.get("/shop/openapi.json").json()
    assert schema["info"]["title"] == "Shop"
    assert schema["servers"] == [{"url": "/shop"}]
    add = schema["paths"]["/add/{number}"]["get"]
    assert add["description"] == "Add two numbers."
    assert [parameter["name"] for parameter in add["parameters"]] == ["number", "by"]
    assert "/v1/router/shout" in schema["paths"]
    assert "/shop/openapi.json" in http.get("/shop/docs").text


def test_lifespan_state_and_locks(http, service):
    assert service.journal.read_text().startswith("up\n")
    answer = http.get("/shop/state").json()
    # The application that the endpoint's module knows is the one that answers.
    assert answer == {"began": "Shop", "lent": ["by the lifespan"], "own": True}


def test_def_endpoints_run_in_threads_with_the_requests_context(http):
    answer = http.get("/shop/thread", headers={"x-request-id": "mine"})
    assert answer.json()["id"] == answer.headers["x-request-id"] == "mine"
    assert "user" not in answer.json()["thread"]


def test_ids_and_deadlines_go_onward(http):
    answer = http.get("/shop/onward", headers={"x-request-id": "mine"})
    assert answer.headers["x-stamp"] == "mine"
    assert answer.json() == {"here": "mine", "there": {"id": "mine", "deadline": True}, "deadline": True}


def test_middleware_and_background_tasks(http, service):
    assert http.get("/shop/large", headers={"accept-encoding": "gzip"}).headers["content-encoding"] == "gzip"
    answer = http.get("/shop/add/1", headers={"origin": "https://example.org"})
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    preflight = {"origin": "https://example.org", "access-control-request-method": "GET"}
    assert http.options("/shop/add/1", headers=preflight).status_code == 200
    assert http.get("/shop/background", params={"note": "done behind"}).json() == "at once"
    assert "done behind" not in service.journal.read_text()
    wait_until(lambda: "done behind" in service.journal.read_text())


def test_streams_and_disconnects(http, service):
    answer = http.get("/shop/stream")
    assert (answer.text, answer.headers["content-type"]) == ("0\n1\n2\n", "text/event-stream; charset=utf-8")
    closed = service.journal.read_text().count("closed")
    with http.stream("GET", "/shop/stream", params={"n": 1000, "pause": 0.01}) as answer:
        assert next(answer.iter_raw())
    wait_until(lambda: service.journal.read_text().count("closed") > closed)


def test_errors_are_starlettes_own_and_tell_nothing(http):
    for _ in range(3):
        answer = http.get("/shop/error", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert answer.headers["x-request-id"] == "mine"
    assert http.get("/shop/nothing").json() == {"detail": "Not Found"}
    assert http.put("/shop/add/1").status_code == 405
    answer = http.head("/plain")
    assert (answer.status_code, answer.content) == (200, b"")


def test_handles_call_methods(service):
    handle = serve.get_app_handle("shop", client=service.client)
    assert handle.for_handles.remote(21).result(10) == 42
    assert handle.add.remote(1, by=2).result(10) == 3
    with pytest.raises(serve.MethodNotFoundError, match="__call__"):
        handle.remote().result(10)


# -- other applications --------------------------------------------------------------------------------------


def test_a_plain_callable(http):
    assert http.get("/plain/x").text == "/plain|/plain/x"
    assert http.get("/plain/late").text == "/plain|/plain/late"
    for path in ("silent", "headless"):
        answer = http.get(f"/plain/{path}", headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.json()["request_id"] == "mine"
    with pytest.raises(httpx.RemoteProtocolError):
        http.get("/plain/half")


def test_starlette_with_static_files(http):
    assert http.get("/starlette/files/a.txt").text == "a static file"
    assert http.get("/starlette/files/b.txt").status_code == 404
    assert http.get("/starlette/").text == "/starlette/files/a.txt"
    answer = http.get("/starlette")
    assert httpx.URL(answer.headers["location"]).path == "/starlette/"
    assert httpx.URL(http.get("/starlette/away").headers["location"]).path == "/starlette/"


def test_a_builder_is_given_the_instance(http):
    assert http.get("/built/word").json() == "of the instance"


@pytest.mark.parametrize(("name", "builder"), [("litestar", build_litestar), ("quart", build_quart)])
def test_other_frameworks(service, http, name, builder):
    pytest.importorskip(name)
    service.run(serve.deployment(serve.ingress(builder)(), name=name), name)
    assert http.get(f"/{name}/hello/you").json() == {"hello": "you"}


def test_a_router_of_fastapi(service, http):
    alone = APIRouter()

    @alone.get("/alone")
    def answer() -> str:
        return "alone"

    service.run(serve.deployment(serve.ingress(alone)(), name="router"), "router")
    assert http.get("/router/alone").json() == "alone"


# -- life ----------------------------------------------------------------------------------------------------


def test_an_application_that_cannot_start_fails_the_replica(service):
    @contextlib.asynccontextmanager
    async def broken(app: Any) -> Any:
        raise RuntimeError("no database here")
        yield

    with pytest.raises(serve.DeploymentFailedError, match="no database here"):
        service.run(serve.deployment(serve.ingress(FastAPI(lifespan=broken))(), name="broken"), "broken")
    serve.delete("broken", client=service.client)


def test_an_application_ends_with_its_replica(service, tmp_path):
    journal = tmp_path / "journal"
    service.run(serve.deployment(serve.ingress(app)(type("Ends", (Shop,), {}))), "ends", str(journal), None)
    assert journal.read_text() == "up\n"
    serve.delete("ends", client=service.client)
    wait_until(lambda: journal.read_text() == "up\ndown\n")


def test_what_an_application_began_lives_until_it_has_shut_down(service, tmp_path):
    """Its shutdown tells its own tasks to end, as under any ASGI server."""
    journal = tmp_path / "journal"

    @contextlib.asynccontextmanager
    async def living(web: Any) -> Any:
        jobs: asyncio.Queue[str | None] = asyncio.Queue()

        async def write() -> None:
            while (job := await jobs.get()) is not None:
                with journal.open("a") as file:
                    file.write(f"{job}\n")

        async with anyio.create_task_group() as group:
            group.start_soon(write)
            web.state.group, web.state.jobs, web.state.write = group, jobs, write
            yield
            jobs.put_nowait("last")
            jobs.put_nowait(None)
            jobs.put_nowait(None)
        with journal.open("a") as file:
            file.write("down\n")

    web = FastAPI(lifespan=living)

    @web.get("/more")
    async def more(request: Request) -> str:
        request.app.state.group.start_soon(request.app.state.write)
        return "more"

    service.run(serve.deployment(serve.ingress(web)(), name="Living"), "living")
    assert httpx.get(f"{service.url}/living/more").status_code == 200
    serve.delete("living", client=service.client)
    wait_until(lambda: journal.exists() and journal.read_text() == "last\ndown\n")


def test_applications_end_with_their_worker(tmp_path):
    journal = tmp_path / "journal"
    with embedded_client(1, 1) as client:
        deployment = serve.deployment(serve.ingress(app)(type("Ends", (Shop,), {})))
        serve.run(deployment.bind(str(journal), None), route_prefix=None, client=client)
        assert journal.read_text() == "up\n"
    wait_until(lambda: journal.read_text() == "up\ndown\n")


def test_deploying_again_changes_nothing_and_a_changed_route_does():
    def revision() -> str:
        spec = build(serve.deployment(serve.ingress(app)(type("Again", (Shop,), {}))).bind("journal", None)).spec
        return spec.deployments[0].revision

    first = revision()
    assert app.openapi()["info"]["title"] == "Shop"
    assert revision() == first
    app.title = "Other"
    try:
        assert revision() != first
    finally:
        app.title = "Shop"
    count = len(app.router.routes)

    @app.get("/added")
    def added() -> int:
        return 1

    try:
        assert revision() != first
    finally:
        del app.router.routes[count:]
    assert revision() == first


# -- shipping ------------------------------------------------------------------------------------------------

NOTEBOOK = """
    import threading
    from fastapi import APIRouter, Depends, FastAPI
    from pydantic import BaseModel
    import dask_serve as serve
    from dask_serve.shipping.graph import build

    class Point(BaseModel):
        x: int
        others: list["Point"] = []

    app = FastAPI()
    router = APIRouter()
    app.state.lock = threading.Lock()

    def twice(x: int) -> int:
        return 2 * x

    @router.post("/points/{x}")
    def points(point: Point, x: int = Depends(twice)) -> Point:
        with app.state.lock:
            return Point(x=point.x + x, others=point.others)

    app.include_router(router, prefix="/v1")

    for number in range(2):  # a cell that is run twice
        class API:
            @app.get("/run")
            def run(self) -> int:
                return self.value

            value = number

        API = serve.ingress(app)(API)

    built = build(serve.deployment(API).bind())
    (revision, blob), = built.code.items()
    print(revision)
    import sys
    open(sys.argv[1], "wb").write(blob)
"""

OPENED = """
    import asyncio, contextvars, sys
    from types import SimpleNamespace
    import httpx
    from dask_serve.context import replica_context
    from dask_serve.ingress import ingress_of
    from dask_serve.replica.ingress import build
    from dask_serve.shipping.code import unpack

    kind, args, kwargs = unpack(open(sys.argv[1], "rb").read())
    user = SimpleNamespace(instance=kind())
    replica_context.set(SimpleNamespace(servable_object=user.instance))

    async def main():
        app = await build(ingress_of(kind), user)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            answer = await http.post("/v1/points/3", json={"x": 1, "others": [{"x": 5}]})
            assert answer.json() == {"x": 7, "others": [{"x": 5, "others": []}]}, answer.text
            assert (await http.post("/v1/points/3", json={"x": "a"})).status_code == 422
            assert (await http.get("/run")).json() == 1
            paths = (await http.get("/openapi.json")).json()["paths"]
            assert "parameters" not in paths["/run"]["get"], paths

    asyncio.run(main())
"""


def test_an_application_of_a_notebook_travels_to_a_process_without_it(tmp_path):
    """Routers, locks and models of ``__main__``; and the same revision in the next session."""
    blob = tmp_path / "blob"
    environment = {"PYTHONPATH": str(Path(serve.__file__).parent.parent), "PATH": ""}

    def python(source: str, seed: str) -> str:
        command = [sys.executable, "-c", textwrap.dedent(source), str(blob)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = python(NOTEBOOK, "1")
    assert python(NOTEBOOK, "2") == first
    python(OPENED, "3")


def test_an_application_of_an_installed_package_travels_by_reference(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "installed_shop.py").write_text(
        "import sys\nfrom fastapi import FastAPI\napp = FastAPI()\napp.state.unpicklable = sys.stdout\n"
        "@app.get('/x')\ndef x():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(str(site))
    import installed_shop

    target = serve.deployment(serve.ingress(installed_shop.app)())
    (blob,) = build(target.bind()).code.values()
    assert len(blob) < 2000
    assert ingress_of(code.unpack(blob)[0]).app is installed_shop.app

    # What was added here has to travel, and the application with it.
    @installed_shop.app.get("/added")
    def added() -> int:
        return 1

    with pytest.raises(ConfigError, match=r"app\.state\.unpicklable"):
        build(target.bind())


def test_what_cannot_travel_is_named_with_the_repair(tmp_path):
    file = (tmp_path / "x").open("w")
    bad = FastAPI()

    @bad.get("/write")
    def write() -> int:
        return file.write("x")

    with file, pytest.raises(ConfigError) as raised:
        build(serve.deployment(serve.ingress(bad)()).bind())
    text = str(raised.value)
    assert "route '/write'" in text
    assert "'file'" in text
    assert "@serve.ingress(build)" in text


def test_reducers_are_for_applications_only():
    lock = threading.Lock()

    class Locked:
        own = lock

    with pytest.raises(ConfigError, match="own"):
        graph.build(serve.deployment(Locked).bind())
    with pytest.raises(TypeError):
        pickle.dumps(lock)


# -- declarations --------------------------------------------------------------------------------------------


def two(environ: Any, start_response: Any) -> Any: ...


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: serve.ingress(Shop), "was given the class Shop"),
        (lambda: serve.ingress("app"), "not 'app', a str"),
        (lambda: serve.ingress(two), "WSGI"),
        (lambda: serve.ingress(plain)(two), "takes a class"),
        (lambda: serve.ingress(plain)(serve.deployment(Doubler)), "below @serve.deployment"),
        (lambda: serve.ingress(plain)(serve.ingress(plain)(type("Twice", (), {}))), "has an application already"),
        (lambda: serve.deployment(serve.ingress(plain)(type("Both", (), {"__call__": two}))), "and a __call__"),
    ],
)
def test_bad_declarations_are_errors_with_the_repair(declare, message):
    with pytest.raises(ConfigError, match=message):
        declare()


def test_a_builder_that_builds_nothing_fails_the_replica(service):
    with pytest.raises(serve.DeploymentFailedError, match="returned None and no ASGI application"):
        service.run(serve.deployment(serve.ingress(lambda: None)(), name="nothing"), "nothing")
    serve.delete("nothing", client=service.client)


def test_the_decorator_keeps_its_name():
    assert serve.ingress is not sys.modules["dask_serve.ingress"]
    assert callable(serve.ingress)


def test_the_example(service):
    from examples.fastapi_app import app as example

    serve.run(example, name="rents", route_prefix="/rents", client=service.client, timeout=30)
    with http_client(f"{service.url}/rents") as http:
        answer = http.post("/estimates", json={"rooms": 3, "area": 70})
        assert 800 < answer.json()["rent"] < 1000
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert http.post("/estimates", json={"rooms": 0, "area": 70}).status_code == 422
        refused = http.post("/estimates", json={"rooms": 3, "area": 70}, headers={"accept-currency": "XAU"})
        assert (refused.status_code, refused.json()) == (406, {"detail": "there are no rents in XAU"})
        assert len(http.get("/estimates/3").text.splitlines()) == 5
        assert http.get("/info/unit").json() == "EUR a month"
        assert "/estimates/{rooms}" in http.get("/openapi.json").json()["paths"]
    serve.delete("rents", client=service.client)
