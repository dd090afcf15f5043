"""A proxy process, started by the controller: ``python -m dask_serve.proxy LISTENING_FD LIFELINE_FD [ADMIN_FD]``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, NamedTuple

import msgspec

from ..config import HTTPOptions
from ..exceptions import ConfigError
from ..logs import write_as
from ..records import keep_records
from . import lifeline as wire
from .doors import Material, make_context
from .files import Watched
from .presence import Presence
from .protocol import limited
from .server import ProxyServer, make_config
from .tls import Certificates

__all__ = ["Service", "build", "main", "run"]

#: Seconds between two looks whether the statistics, certificates or tokens changed.
STATS_INTERVAL = 1.0
#: Seconds that a proxy whose controller died goes on while replicas answer, and between two looks whether they do. A
#: new controller waits for the port for 10 s.
ORPHAN_TIME, ORPHAN_LOOK = 5.0, 0.1


class Service(NamedTuple):
    """What a proxy process serves."""

    app: Any
    #: Takes each new routing table, encoded.
    apply: Callable[[bytes], None]
    close: Callable[[], Awaitable[None]]
    #: Whether requests can still be answered, though the controller is gone.
    alive: Callable[[], bool] = lambda: False
    #: Writes the access log.
    flush: Callable[[], None] = lambda: None


#: Makes the service of options, and of what is known of the controller and of the doors' TLS.
Build = Callable[[HTTPOptions, Presence, ssl.SSLContext | None], Service]


def build(options: HTTPOptions, presence: Presence, doors: ssl.SSLContext | None = None) -> Service:
    """Return the real thing: the ASGI app on a fabric of connections to the doors."""
    from ..routing.fabric import Fabric
    from ..routing.table import decode_table
    from .app import ProxyApp

    def report(backlogs: dict[str, Any]) -> None:
        presence.tell(wire.BACKLOGS, msgspec.msgpack.encode(backlogs))

    name = f"proxy-{os.getpid()}"
    fabric = Fabric(asyncio.get_running_loop(), name=name, ssl=doors, report=report, measured=True)

    def apply(encoded: bytes) -> None:
        table = decode_table(encoded)
        fabric.apply(table)
        # The first request need not wait for connections.
        for route in table.routes:
            fabric.router(route.deployment)

    def alive() -> bool:
        return any(router.ready for router in fabric.routers.values())

    write_as(options.log_format, options.log_level)
    app = ProxyApp(fabric, options, presence)
    return Service(app, apply, fabric.close, alive, app.flush)


class Process:
    """The life of a proxy process: options, first table, serve, drain."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._service: Service | None = None
        self._server: ProxyServer | None = None
        self._lifeline: wire.Lifeline | None = None
        self._options = HTTPOptions()
        self._certificates: Certificates | None = None
        self._presence = Presence()
        self._doors: ssl.SSLContext | None = None
        self._watched: list[Watched] = []
        self._has_table = asyncio.Event()
        self._orphaned: asyncio.Task[None] | None = None
        self._stopping = False
        self._draining = False
        self._sent: dict[str, Any] = {}
        self._records = keep_records()
        #: Number of the last record that the controller has.
        self._logged = 0
        #: Frames for the controller, by kind.
        self._news: dict[bytes, bytes] = {}

    async def run(self, listener: socket.socket, lifeline: socket.socket, admin: socket.socket | None = None) -> None:
        self._lifeline = await wire.connect(lifeline, self._on_frame, self._on_eof)
        self._presence.tell = self._lifeline.send_latest
        # The first frames may have come before there was anything to answer on.
        self._tell_news()
        # Without a table every answer would be 404: connections wait in the kernel's queue until there is one.
        await self._has_table.wait()
        if self._stopping or self._service is None:
            return
        options = self._options
        app = self._service.app
        config = make_config(
            app,
            protocol=limited(options),
            root_path=options.root_path,
            keep_alive=options.keep_alive_timeout_s,
            message_limit=options.message_limit,
        )
        self._server = ProxyServer(
            config,
            drain_timeout=options.drain_timeout_s,
            tls=None if self._certificates is None else self._certificates.context,
            handshake_timeout=options.head_timeout_s,
            admin=None if admin is None else (admin, make_config(app.admin, protocol=limited(options), lifespan="off")),
            on_started=self._on_started,
            on_draining=self._on_draining,
        )
        self._server.server_state.on_refused = getattr(app, "on_refused", None)
        try:
            await self._server.serve(sockets=[listener])
        finally:
            self._send_stats()
            self._service.flush()
            await self._service.close()
            self._send_records()

    def _on_frame(self, kind: bytes, payload: bytes) -> None:
        self._presence.heard()
        if kind == wire.DOORS:
            self._doors = make_context(msgspec.msgpack.decode(payload, type=Material))
        elif kind == wire.OPTIONS:
            self._options = msgspec.msgpack.decode(payload, type=HTTPOptions)
            self._prepare()
        elif kind == wire.TABLE and self._service is not None:
            self._service.apply(payload)
            self._has_table.set()
            self._news[wire.APPLIED] = wire.checksum(payload)
            self._tell_news()
        elif kind == wire.DRAIN:
            self._stop()

    def _prepare(self) -> None:
        """Make what the options ask for; tell the controller where that is not possible."""
        try:
            self._service = self._build(self._options, self._presence, self._doors)
            self._watched = list(getattr(self._service.app, "watched", ()))
            if self._options.tls_certificate is not None:
                self._certificates = Certificates(self._options)
                self._watched.append(self._certificates.watched)
        except ConfigError as error:
            self._service = None
            self._news[wire.REFUSED] = str(error).encode()
            self._tell_news()
            self._stop()

    def _tell_news(self) -> None:
        if self._lifeline is not None:
            for kind, payload in self._news.items():
                self._lifeline.send(kind, payload)
            self._news.clear()

    def _on_eof(self) -> None:
        self._presence.gone = True
        if not self._stopping:
            self._orphaned = asyncio.get_running_loop().create_task(self._go_on_alone())

    async def _go_on_alone(self) -> None:
        """Serve while replicas answer, but make way for the proxies of the next controller."""
        deadline = monotonic() + ORPHAN_TIME
        while self._server is not None and self._service is not None and self._service.alive():
            if monotonic() > deadline:
                break
            await asyncio.sleep(ORPHAN_LOOK)
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
        if self._service is not None:
            self._service.flush()
        self._send_records()
        for watched in self._watched:
            watched.check()
        asyncio.get_running_loop().call_later(STATS_INTERVAL, self._report)

    def _send_stats(self) -> None:
        stats = self._stats()
        if stats != self._sent and self._lifeline is not None:
            self._sent = stats
            self._lifeline.send_latest(wire.STATS, msgspec.msgpack.encode(stats))

    def _send_records(self) -> None:
        news = self._records.since(self._logged)
        if news and self._lifeline is not None:
            self._logged = news[-1]["number"]
            self._lifeline.send(wire.LOGS, msgspec.msgpack.encode(news))

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
        # The application may know more.
        more = getattr(self._service.app, "stats", None)
        return {**more(state), **stats} if more is not None else stats


def run(
    listen_fd: int,
    lifeline_fd: int,
    build: Build = build,
    admin_fd: int | None = None,
) -> None:
    """Serve until the lifeline or SIGTERM says stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _allow_many_files()
    # Heads have our limits. websockets, which is imported later, has lower ones of its own.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", str(2**21))
    os.environ.setdefault("WEBSOCKETS_MAX_NUM_HEADERS", "10000")
    logging.basicConfig(format="%(asctime)s - %(name)s - %(levelname)s - %(message)s", level=logging.WARNING)

    async def serve() -> None:
        admin = None if admin_fd is None else socket.socket(fileno=admin_fd)
        await Process(build).run(socket.socket(fileno=listen_fd), socket.socket(fileno=lifeline_fd), admin)

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


def _allow_many_files() -> None:
    """Take all the open files that this process may have: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS calls the limit infinite, and does not take that.
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Parse the file descriptors and serve."""
    arguments = sys.argv[1:]
    if len(arguments) not in {2, 3} or not all(argument.isdigit() for argument in arguments):
        sys.exit("usage, by the controller only: python -m dask_serve.proxy LISTENING_FD LIFELINE_FD [ADMIN_FD]")
    listen_fd, lifeline_fd, *admin = map(int, arguments)
    run(listen_fd, lifeline_fd, admin_fd=admin[0] if admin else None)


if __name__ == "__main__":
    main()
