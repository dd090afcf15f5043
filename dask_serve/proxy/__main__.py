"""A proxy process: ``python -m dask_serve.proxy <listening fd> <lifeline fd>``, started by the controller only."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from ..config import HTTPOptions
from . import lifeline as wire
from .server import ProxyServer, make_config

__all__ = ["Service", "build", "main", "run"]

#: Seconds between two looks whether the statistics changed.
STATS_INTERVAL = 1.0


class Service(NamedTuple):
    """What a proxy process serves."""

    app: Any
    #: Takes each new routing table, encoded.
    apply: Callable[[bytes], None]
    close: Callable[[], Awaitable[None]]


def build(options: HTTPOptions) -> Service:
    """Return the real thing: the ASGI app on a fabric of connections to the doors."""
    from ..routing.fabric import Fabric
    from ..routing.table import decode_table
    from .app import create_app

    fabric = Fabric(asyncio.get_running_loop(), name=f"proxy-{os.getpid()}")
    return Service(create_app(fabric, options), lambda table: fabric.apply(decode_table(table)), fabric.close)


class Process:
    """The life of a proxy process: options, first table, serve, drain."""

    def __init__(self, build: Callable[[HTTPOptions], Service]) -> None:
        self._build = build
        self._service: Service | None = None
        self._server: ProxyServer | None = None
        self._lifeline: wire.Lifeline | None = None
        self._options = HTTPOptions()
        self._has_table = asyncio.Event()
        self._stopping = False
        self._draining = False
        self._sent: dict[str, Any] = {}

    async def run(self, listener: socket.socket, lifeline: socket.socket) -> None:
        self._lifeline = await wire.connect(lifeline, self._on_frame, self._stop)
        # Without a table every answer would be 404: connections wait in the kernel's queue until there is one.
        await self._has_table.wait()
        if self._stopping or self._service is None:
            return
        self._server = ProxyServer(
            make_config(self._service.app),
            drain_timeout=self._options.drain_timeout_s,
            on_started=self._on_started,
            on_draining=self._on_draining,
        )
        try:
            await self._server.serve(sockets=[listener])
        finally:
            await self._service.close()

    def _on_frame(self, kind: bytes, payload: bytes) -> None:
        if kind == wire.OPTIONS:
            self._options = msgspec.msgpack.decode(payload, type=HTTPOptions)
            self._service = self._build(self._options)
        elif kind == wire.TABLE and self._service is not None:
            self._service.apply(payload)
            self._has_table.set()
            if self._lifeline is not None:
                self._lifeline.send(wire.APPLIED, wire.checksum(payload))
        elif kind == wire.DRAIN:
            self._stop()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._has_table.set()
        if self._server is not None:
            self._server.drain()

    def _on_started(self) -> None:
        if self._stopping and self._server is not None:
            self._server.drain()
        if self._lifeline is not None:
            self._lifeline.send(wire.READY)
        self._report()
        # What start-up made stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    def _on_draining(self) -> None:
        self._draining = True
        self._send_stats()

    def _report(self) -> None:
        self._send_stats()
        asyncio.get_running_loop().call_later(STATS_INTERVAL, self._report)

    def _send_stats(self) -> None:
        stats = self._stats()
        if stats != self._sent and self._lifeline is not None:
            self._sent = stats
            self._lifeline.send_latest(wire.STATS, msgspec.msgpack.encode(stats))

    def _stats(self) -> dict[str, Any]:
        assert self._server is not None
        assert self._service is not None
        state = self._server.server_state
        stats = {
            "requests": state.total_requests,
            "connections": len(state.connections),
            "in_flight": len(state.tasks),
            "draining": self._draining,
        }
        # The application may know more, as plain numbers.
        more = getattr(self._service.app, "stats", None)
        return {**more(), **stats} if more is not None else stats


def run(listen_fd: int, lifeline_fd: int, build: Callable[[HTTPOptions], Service] = build) -> None:
    """Serve until the lifeline or SIGTERM says stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s - %(name)s - %(levelname)s - %(message)s", level=logging.WARNING)

    async def serve() -> None:
        await Process(build).run(socket.socket(fileno=listen_fd), socket.socket(fileno=lifeline_fd))

    loop = _new_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(serve())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> None:
    """Parse the two file descriptors and serve."""
    if len(sys.argv) != 3 or not all(argument.isdigit() for argument in sys.argv[1:]):
        sys.exit("usage, by the controller only: python -m dask_serve.proxy <listening fd> <lifeline fd>")
    run(int(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
