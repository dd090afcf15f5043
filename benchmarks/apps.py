"""The deployments that are measured; they do nothing, so that what remains is dask_serve."""

from __future__ import annotations

import threading
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse

import dask_serve as serve


@serve.deployment
class NoOp:
    """Answers HTTP with a word, and Python with the argument."""

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Do what ``bare_uvicorn`` does."""
        return PlainTextResponse("hello")

    async def echo(self, value: Any) -> Any:
        """Do what ``dask_actor.Echo`` does."""
        return value


@serve.deployment
class Busy:
    """Computes in four Python threads, for ever, and answers beside that."""

    def __init__(self) -> None:
        for _ in range(4):
            threading.Thread(target=spin, daemon=True).start()

    async def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value


def spin() -> None:
    """Hold the interpreter's lock as long as it lets us."""
    count = 0
    while True:
        count += 1
