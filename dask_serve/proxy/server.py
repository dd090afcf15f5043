"""The server of a proxy process: uvicorn's, with a shutdown that fails no request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from .protocol import ProxyProtocol, ProxyState
from .websocket_protocol import websocket_protocol

__all__ = ["ProxyServer", "make_config", "serve"]

logger = logging.getLogger("dask_serve.proxy")

#: Seconds an idle connection may stay open in a server that drains, so that a request already on its way is served.
IDLE_GRACE = 0.5
#: Seconds between two looks at the connections of a server that drains.
SWEEP = 0.02
#: Connections that the kernel keeps until they are accepted.
BACKLOG = 2048
#: Seconds that cancelled requests get to say so.
CANCEL_GRACE = 1.0


def make_config(
    app: Any,
    *,
    protocol: type[ProxyProtocol] = ProxyProtocol,
    lifespan: Literal["on", "off"] = "on",
    root_path: str = "",
    keep_alive: float = 75.0,
    message_limit: int = 16 * 2**20,
) -> uvicorn.Config:
    """Return uvicorn's settings for ``app``."""
    return uvicorn.Config(
        app,
        http=protocol,
        lifespan=lifespan,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # one more coroutine for each request
        root_path=root_path,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type] # it is only ever added to the time
        ws=websocket_protocol(),
        ws_max_size=message_limit,
    )


class ProxyServer(uvicorn.Server):
    """Serves until it is told to drain.

    Parameters
    ----------
    config : uvicorn.Config
        See `make_config`.
    drain_timeout : float
        Seconds that requests in flight get when the server stops.
    idle_grace : float
        Seconds that idle connections stay open when the server stops.
    tls : ssl.SSLContext, optional
        For the sockets given to `serve`.
    handshake_timeout : float, optional
        Seconds that a client has for its part of the TLS handshake.
    admin : tuple, optional
        A listening socket, and uvicorn's settings for the application that it leads to; without TLS.
    on_started, on_draining : callable, optional
        Called without arguments when connections are accepted, and when the server begins to stop.
    """

    server_state: ProxyState

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_timeout: float = 20.0,
        idle_grace: float = IDLE_GRACE,
        tls: ssl.SSLContext | None = None,
        handshake_timeout: float = 30.0,
        admin: tuple[socket.socket, uvicorn.Config] | None = None,
        on_started: Callable[[], None] | None = None,
        on_draining: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self.server_state = ProxyState()
        self.drain_timeout = drain_timeout
        self.idle_grace = idle_grace
        self._tls = tls
        self._handshake_timeout = handshake_timeout
        self._admin = admin
        self._on_started = on_started
        self._on_draining = on_draining

    def drain(self) -> None:
        """Begin to stop; a second call, as by a second SIGTERM, no longer waits for requests in flight."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").addFilter(self.server_state.complaints)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(STARTUP_FAILURE)
        tls = {"ssl": self._tls, "ssl_handshake_timeout": self._handshake_timeout} if self._tls is not None else {}
        self.servers = [await self._listen(sock, self.config, tls) for sock in sockets or []]
        if self._admin is not None:
            self.servers.append(await self._listen(*self._admin, {}))
        self.started = True
        if self._on_started is not None:
            self._on_started()

    async def _listen(self, sock: socket.socket, config: uvicorn.Config, tls: dict[str, Any]) -> asyncio.Server:
        if not config.loaded:
            config.load()

        def connect() -> asyncio.Protocol:
            protocol: Any = config.http_protocol_class
            connection: asyncio.Protocol = protocol(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return connection

        loop = asyncio.get_running_loop()
        if sock.family == socket.AF_UNIX:
            # The path belongs to the controller, and stays when this process leaves.
            stays: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            return await loop.create_unix_server(connect, sock=sock, backlog=BACKLOG, **tls, **stays)
        return await loop.create_server(connect, sock=sock, backlog=BACKLOG, **tls)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # 1. Tell first: who supervises can start a successor on the same socket while this one drains.
        if self._on_draining is not None:
            self._on_draining()
        # 2. From here on each response ends its connection.
        self.server_state.draining = True
        for connection in list(self.server_state.connections):
            if isinstance(connection, ProxyProtocol):
                connection.drain()
            else:
                connection.shutdown()  # a WebSocket: 1012, service restart
        # 3. Accept what the kernel has queued, then no more.
        await self._stop_accepting([*(sockets or []), *([self._admin[0]] if self._admin is not None else [])])
        # 4. Wait for requests in flight, closing idle connections after their grace.
        await self._until_drained()
        # 5. Cut off what is left.
        await self._cancel_rest()
        # 6. The application's own end.
        await self.lifespan.shutdown()
        logging.getLogger("uvicorn.error").removeFilter(self.server_state.complaints)

    async def _stop_accepting(self, sockets: list[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        # asyncio's own loop loses connections that are accepted but not yet made when the server closes; so first it
        # stops to look, then they are made. uvloop makes them at once, and has no reader for the listener.
        await asyncio.sleep(0)
        if isinstance(loop, asyncio.SelectorEventLoop):
            for sock in sockets:
                loop.remove_reader(sock.fileno())
            for _ in range(5):
                await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for sock in sockets:
            sock.close()

    async def _until_drained(self) -> None:
        state = self.server_state
        deadline = time.monotonic() + self.drain_timeout
        idle_since: dict[ProxyProtocol, float] = {}
        while (state.connections or state.tasks) and not self.force_exit:
            now = time.monotonic()
            if now >= deadline:
                return
            idle = {c for c in state.connections if isinstance(c, ProxyProtocol) and c.idle}
            idle_since = {connection: idle_since.get(connection, now) for connection in idle}
            for connection, since in idle_since.items():
                if now - since >= self.idle_grace:
                    connection.transport.close()
            await asyncio.sleep(SWEEP)

    async def _cancel_rest(self) -> None:
        tasks = set(self.server_state.tasks)
        if tasks:
            logger.warning("%d requests were still in flight when the proxy had to stop; cancelled", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_GRACE)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGTERM drain and ignore SIGINT, which belongs to the session that Ctrl-C was typed in."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self.handle_exit),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        try:
            yield
        finally:
            # uvicorn would raise the signal again here: a drained proxy ends with exit code 0.
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain()


async def serve(app: Any, sock: socket.socket, **options: Any) -> None:
    """Serve an ASGI application on a listening socket until SIGTERM; ``options`` are those of `ProxyServer`."""
    await ProxyServer(make_config(app), **options).serve(sockets=[sock])
