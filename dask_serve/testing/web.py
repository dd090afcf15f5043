"""HTTP without a socket: the proxy's own application, as a plain ASGI callable for test clients on any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..config import HTTPOptions
from ..proxy.app import ProxyApp
from ..proxy.middleware import Innermost
from ..proxy.presence import Presence
from ..proxy.protocol import CONNECTION
from ..routing.fabric import Fabric

__all__ = ["Gateway"]


class _Connection:
    """Stands for the client's connection, in whose place a test client is."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.cycle = None
        self.on_disconnect: Callable[[], None] | None = None
        self.server_state = SimpleNamespace(draining=False, connections=(), refused=Counter())
        #: The answer was cut off: it failed after its head had left.
        self.cut = False
        self.transport = self

    def is_closing(self) -> bool:
        return self.cut

    def close(self) -> None:
        self.cut = True
        if self.on_disconnect is not None:
            self.loop.call_soon(self.on_disconnect)

    abort = close


class Gateway:
    """An ASGI application that is served by the replicas, as a proxy has it.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        Where the fabric is.
    fabric : Fabric
    options : HTTPOptions
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fabric: Fabric, options: HTTPOptions) -> None:
        self._loop = loop

        async def make() -> ProxyApp:
            presence = Presence()
            return ProxyApp(fabric, options, presence)

        self._proxy = asyncio.run_coroutine_threadsafe(make(), loop).result()
        self._app = Innermost(self._proxy)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        here = asyncio.get_running_loop()
        connection = _Connection(self._loop)
        # What not every test client gives.
        given = {"http_version": "1.1", "raw_path": scope["path"].encode(), "client": None, "server": None, **scope}
        scope = {**given, CONNECTION: connection}
        if here is self._loop:
            await self._app(scope, receive, send)
        else:
            serving = self._app(scope, _elsewhere(receive, here), _elsewhere(send, here))
            running: Future[None] = asyncio.run_coroutine_threadsafe(serving, self._loop)
            await asyncio.wrap_future(running)
        if connection.cut:
            raise _protocol_error("the server closed the connection without the end of the answer")


def _elsewhere(function: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    """Let a coroutine function of another loop be awaited here."""

    async def call(*message: Message) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(*message), loop))

    return call


async def _lifespan(receive: Receive, send: Send) -> None:
    """The applications have started already, in their replicas."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})


def _protocol_error(text: str) -> Exception:
    """Return what the test client's library raises for that."""
    for name in ("httpx2", "httpx"):
        library = sys.modules.get(name)
        if library is not None:
            error: Exception = library.RemoteProtocolError(text)
            return error
    return ConnectionResetError(text)
