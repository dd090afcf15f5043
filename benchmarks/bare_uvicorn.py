"""What HTTP is compared with: the same Starlette handler on one uvicorn process.

``python -m benchmarks.bare_uvicorn FD`` serves on an inherited listening socket, and prints a line when it accepts.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


async def hello(request: Request) -> PlainTextResponse:
    """Answer with a word."""
    return PlainTextResponse("hello")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Tell the parent that the server is about to accept; the socket listens already."""
    print("ready", flush=True)
    yield


def main() -> None:
    """Serve on an inherited socket, as a proxy does: uvicorn's ``--fd`` would lose TCP_NODELAY."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    app = Starlette(routes=[Route("/", hello)], lifespan=lifespan)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
