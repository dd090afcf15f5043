"""What the tests with real HTTP clients serve: one embedded cluster, and applications of several kinds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from distributed import Client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster

#: Bytes of a WebSocket's message in this service.
MESSAGE_LIMIT = 2**20
#: A page of some kilobytes, for gzip.
LONG = "all work and no play makes jack a dull boy\n" * 200

# -- Starlette ---------------------------------------------------------------------------------------------------------

#: What happened to requests, by the name that their tests gave them. There is one replica.
happened: dict[str, list[Any]] = {}


async def echo(request: Request) -> JSONResponse:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    told = {
        "method": request.method,
        "path": request.url.path,
        "query": dict(request.query_params),
        "headers": dict(request.headers),
        "port": request.client and request.client.port,
        "size": size,
        "sha256": digest.hexdigest(),
    }
    return JSONResponse(told, headers={"X-Own": "yes"})


async def until(name: str, word: str) -> None:
    while word not in happened.get(name, ()):
        await asyncio.sleep(0.01)


async def stream(request: Request) -> StreamingResponse:
    """Send a first piece, and the last one once the client has said that it has the first."""
    name = request.query_params["name"]

    async def pieces() -> Any:
        try:
            yield "first\n"
            await until(name, "got it")
            yield "last\n"
        finally:
            happened.setdefault(name, []).append("ended")

    return StreamingResponse(pieces(), media_type="text/plain")


async def silence(request: Request) -> PlainTextResponse:
    """Answer nothing for long."""
    name = request.query_params["name"]
    happened.setdefault(name, []).append("began")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        happened[name].append("cancelled")
        raise
    return PlainTextResponse("too late")


async def note(request: Request) -> JSONResponse:
    """Tell what happened, after what the client says of it."""
    found = happened.setdefault(request.path_params["name"], [])
    if word := request.query_params.get("word"):
        found.append(word)
    return JSONResponse(found)


async def events(request: Request) -> StreamingResponse:
    """Three events at a time: who comes back gets the next ones."""
    last = int(request.headers.get("last-event-id", 0))

    async def lines() -> Any:
        yield "retry: 20\n\n"
        for number in range(last + 1, last + 4):
            yield f"id: {number}\nevent: count\ndata: {number}\ndata: ä\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def socket(websocket: Any) -> None:
    await websocket.accept(subprotocol="two" if "two" in websocket.scope["subprotocols"] else None)
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            name = websocket.query_params.get("name", "")
            happened.setdefault(name, []).append([message["code"], message.get("reason") or ""])
            return
        if message.get("bytes") is not None:
            await websocket.send_bytes(message["bytes"][::-1])
        elif message["text"].startswith("close "):
            _, code, reason = message["text"].split(" ", 2)
            await websocket.close(int(code), reason)
            return
        else:
            await websocket.send_text(message["text"].upper())


async def long(request: Request) -> PlainTextResponse:
    return PlainTextResponse(LONG)


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>page</title>")


async def slashed(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


web = Starlette(
    routes=[
        Route("/echo", echo, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
        Route("/stream", stream),
        Route("/silence", silence),
        Route("/note/{name}", note),
        Route("/events", events),
        Route("/long", long),
        Route("/page", page),
        Route("/slashed/", slashed, methods=["GET", "POST"]),
        WebSocketRoute("/socket", socket),
    ]
)

# -- plain deployments -------------------------------------------------------------------------------------------------


class Plain:
    async def __call__(self, request: Request) -> Any:
        return {"method": request.method, "path": request.url.path, "size": len(await request.body())}


class Busy:
    async def __call__(self, request: Request) -> Any:
        await asyncio.sleep(float(request.query_params["s"]))
        return "done"


class Context:
    """Tells the trace that the request belongs to, and what the next in the chain is told of it."""

    def __init__(self, following: Any = None) -> None:
        self.following = following

    async def __call__(self, request: Request) -> Any:
        return {"header": request.headers.get("traceparent"), "told": await self.tell()}

    async def tell(self) -> Any:
        context = serve.get_request_context()
        mine = [context.traceparent, context.tracestate]
        if self.following is None:
            return [mine]
        streamed = [traces async for traces in self.following.options(stream=True).stream.remote()]
        return [mine, *await self.following.tell.remote(), *streamed]

    def stream(self) -> Any:
        context = serve.get_request_context()
        yield [context.traceparent, context.tracestate]


# -- the service -------------------------------------------------------------------------------------------------------


class WebService:
    """A running service and its URL."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.url = serve.url(client=client)

    def start(self, **options: Any) -> None:
        """Change options of the front door."""
        self.url = serve.start(client=self.client, **options)


@contextlib.contextmanager
def running() -> Iterator[WebService]:
    """Serve all of them."""
    cluster = EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address=None)
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
        serve.start(port=0, message_limit=MESSAGE_LIMIT, client=client)
        applications = {
            "web": serve.deployment(serve.ingress(web)(), name="Web").bind(),
            "plain": serve.deployment(Plain).bind(),
            "small": serve.deployment(Plain).options(name="Small", body_limit=1000).bind(),
            "busy": serve.deployment(Busy).options(max_ongoing_requests=1, max_queued_requests=1).bind(),
        }
        for name, application in applications.items():
            serve.run(application, name=name, route_prefix=f"/{name}", client=client)
        yield WebService(client)


def wait_until(condition: Callable[[], Any], timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
