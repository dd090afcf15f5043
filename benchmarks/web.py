"""The web applications that are measured: the same object in a replica and on one bare uvicorn process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

#: Bytes of a large body, in and out.
LARGE = 10_000_000
#: Tokens of one streamed answer.
TOKENS = 200
#: Seconds before each token whose delay is looked at.
PAUSE = 0.003

body = bytes(LARGE)


async def hello(request: Request) -> PlainTextResponse:
    """Answer with a word."""
    return PlainTextResponse("hello")


async def take(request: Request) -> PlainTextResponse:
    """Take a body, and answer with its size."""
    return PlainTextResponse(str(len(await request.body())))


async def give(request: Request) -> Response:
    """Answer with a large body."""
    return Response(body)


async def give_back(request: Request) -> Response:
    """Answer with the body that came."""
    return Response(await request.body())


async def tokens() -> AsyncIterator[str]:
    """Yield one token in a turn of the event loop, as a model's loop does that is asked by many."""
    for _ in range(TOKENS):
        await asyncio.sleep(0)
        yield "data: token\n\n"


async def ready_tokens() -> AsyncIterator[str]:
    """Yield without ever waiting."""
    for _ in range(TOKENS):
        yield "data: token\n\n"


async def stamped_tokens() -> AsyncIterator[str]:
    """Yield two tokens that say when they were yielded, by the clock that all processes of the machine share."""
    for _ in range(2):
        await asyncio.sleep(PAUSE)
        yield f"data: {time.monotonic()}\n\n"


def events(request: Request) -> StreamingResponse:
    """Answer with server-sent events."""
    kind = {"paced": tokens, "ready": ready_tokens, "stamped": stamped_tokens}[request.path_params["kind"]]
    return StreamingResponse(kind(), media_type="text/event-stream")


noop = Starlette(routes=[Route("/", hello)])

transfers = Starlette(
    routes=[
        Route("/take", take, methods=["POST"]),
        Route("/give", give),
        Route("/give-back", give_back, methods=["POST"]),
        Route("/events/{kind}", events),
    ]
)


class Item(BaseModel):
    """What is asked about."""

    name: str
    price: float
    tags: list[str] = []


class Offer(BaseModel):
    """What is answered."""

    name: str
    total: float
    tags: list[str]


items = FastAPI()


@items.post("/items")
async def offer(item: Item) -> Offer:
    """Take a model, and return one."""
    return Offer(name=item.name, total=item.price * 1.2, tags=item.tags)


#: What `bare_uvicorn` serves, by name.
APPS = {"noop": noop, "transfers": transfers, "items": items}
