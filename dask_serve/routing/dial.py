"""Ways to a door: its own address, or a tunnel through the scheduler where the caller cannot reach the worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ..wire.connection import CallerConnection
from ..wire.local import connect_locally
from ..wire.tls import reason
from ..wire.within import SCHEME, connect_within

__all__ = ["Make", "NotThereError", "Tunnel", "UntrustedError", "Ways", "notice_silence", "reach", "split_address"]

logger = logging.getLogger("dask_serve.routing")

#: Seconds to connect to the address of a door.
CONNECT = 3.0
#: The tunnel is tried beside it after this many seconds without a connection.
HEAD_START = 0.5
#: A door that was connected to may take this many seconds to prove itself before the tunnel is tried, too.
PATIENCE = 2.0
#: A host that only a tunnel led to is tried directly again after this many seconds.
TUNNEL_FOR = 60.0

#: Connects a protocol to the door of a process, through the scheduler.
Tunnel = Callable[[str, asyncio.Protocol], Awaitable[None]]
#: Makes the caller's end of a connection, given what to call once it is ready and once it is lost.
Make = Callable[[Callable[[Any], None], Callable[[Any], None]], CallerConnection]


class NotThereError(ConnectionError):
    """The scheduler says that there is no way to this process."""


class UntrustedError(ConnectionError):
    """One side does not take the other's certificate; to try again will not help soon."""


def split_address(door: str) -> tuple[str, int]:
    """Return host and port of a door's address."""
    host, _, port = door.partition("://")[2].rpartition(":")
    return host.strip("[]"), int(port)


def notice_silence(transport: asyncio.BaseTransport) -> None:
    """Let the system break a connection whose other machine is gone, after about 30 s, as Dask does with its own."""
    sock = transport.get_extra_info("socket")
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 10, "TCP_USER_TIMEOUT": 30_000}
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in wanted.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Ways:
    """What a session knows about the ways to hosts; used by all its event loops.

    Parameters
    ----------
    tunnel : callable, optional
        The way through the scheduler; None: there is only the direct one.
    """

    def __init__(self, tunnel: Tunnel | None = None) -> None:
        self.tunnel = tunnel
        #: Until when a host is reached through the tunnel without trying it directly first.
        self._tunnelled: dict[str, float] = {}
        self._told: dict[str, str] = {}

    def needs_tunnel(self, host: str) -> bool:
        """The direct way failed lately, and the tunnel did not."""
        return self._tunnelled.get(host, 0.0) > time.monotonic()

    def note(self, host: str, tunnelled: bool) -> None:
        """Remember the way that led to a door."""
        if tunnelled:
            self._tunnelled[host] = time.monotonic() + TUNNEL_FOR
        else:
            self._tunnelled.pop(host, None)
        way = "through the scheduler, as they cannot be reached directly" if tunnelled else "directly"
        if self._told.get(host) != way:
            self._told[host] = way
            logger.info("Requests to the worker processes of %s go %s", host, way)


class _Attempt:
    """One way, tried until the door has proved itself."""

    def __init__(self, make: Make, on_lost: Callable[[CallerConnection], None]) -> None:
        self._proved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._on_lost = on_lost
        self.connection = make(lambda _: self._end(True), self._lost)

    def _end(self, proved: bool) -> None:
        if not self._proved.done():
            self._proved.set_result(proved)

    def _lost(self, connection: CallerConnection) -> None:
        if self._proved.done():
            self._on_lost(connection)
        else:
            self._end(False)

    async def run(self, connecting: Awaitable[Any]) -> CallerConnection:
        try:
            await connecting
            if await self._proved:
                return self.connection
        except BaseException:
            self.connection.abort()
            raise
        made = self.connection.transport
        if made is not None and made.get_extra_info("ssl_object") is not None and not self.connection.answered:
            # With TLS 1.3 a door looks at a certificate when its caller is through with the handshake.
            raise UntrustedError("the door closed the connection without a word: it does not take this certificate")
        raise ConnectionError("the connection ended before the other side had proved itself")


async def reach(
    process: str,
    door: str,
    context: ssl.SSLContext | None,
    ways: Ways,
    *,
    make: Make,
    on_lost: Callable[[CallerConnection], None],
) -> CallerConnection:
    """Return a connection to a door that has proved itself.

    Parameters
    ----------
    process : str
        The incarnation behind the door.
    door : str
        Its address.
    context : SSLContext or None
        For a door with TLS.
    ways : Ways
    make : callable
        Makes a connection.
    on_lost : callable
        Called with a connection that is lost after it had proved itself.

    Raises
    ------
    UntrustedError
        One side does not take the other's certificate.
    OSError
        No way leads there.
    """
    if door.startswith(SCHEME):
        inside = _Attempt(make, on_lost)
        return await inside.run(connect_within(process, inside.connection))
    host, _ = split_address(door)
    local = None if door.startswith("tls") else connect_locally(process)
    if local is not None:
        here = _Attempt(make, on_lost)
        connecting = asyncio.get_running_loop().create_unix_connection(lambda: here.connection, sock=local)
        return await here.run(connecting)

    tunnel = ways.tunnel
    direct = _Attempt(make, on_lost)
    if tunnel is None:
        return await direct.run(_connect(direct.connection, door, context))
    through = _Attempt(make, on_lost)
    if ways.needs_tunnel(host):
        try:
            return await through.run(tunnel(process, through.connection))
        except NotThereError:
            raise
        except OSError as error:
            logger.info("No tunnel to %s: %s", door, error)
        return await direct.run(_connect(direct.connection, door, context))
    connection = await _race(
        direct, _connect(direct.connection, door, context), through, lambda: tunnel(process, through.connection)
    )
    ways.note(host, tunnelled=connection is through.connection)
    return connection


async def _connect(connection: CallerConnection, door: str, context: ssl.SSLContext | None) -> None:
    host, port = split_address(door)
    name = None
    if door.startswith("tls"):
        if context is None:
            raise UntrustedError("the door has TLS, and this process has no certificate of the cluster")
        name = ""
    else:
        context = None
    connecting = asyncio.get_running_loop().create_connection(
        lambda: connection, host, port, ssl=context, server_hostname=name
    )
    try:
        transport, _ = await asyncio.wait_for(connecting, CONNECT)
    except asyncio.TimeoutError:
        raise ConnectionError(f"no answer within {CONNECT} s") from None
    except ssl.SSLError as error:
        raise UntrustedError(f"this process does not take the door's certificate: {reason(error)}") from None
    notice_silence(transport)


async def _race(
    direct: _Attempt, connecting: Awaitable[None], through: _Attempt, tunnel: Callable[[], Awaitable[None]]
) -> CallerConnection:
    """Return the first that proves itself; the tunnel starts when the direct way fails or takes long."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(direct.run(connecting))]
    winner = None
    try:
        await asyncio.wait(tasks, timeout=HEAD_START)
        if direct.connection.transport is not None:
            await asyncio.wait(tasks, timeout=PATIENCE)
        if not tasks[0].done() or tasks[0].exception() is not None:
            tasks.append(loop.create_task(through.run(tunnel())))
        pending = set(tasks)
        while pending and winner is None:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in tasks if task.done() and task.exception() is None), None)
    finally:
        for task in tasks:
            if task is not winner:
                task.add_done_callback(_drop)
                task.cancel()
    if winner is None:
        kind = UntrustedError if isinstance(tasks[0].exception(), UntrustedError) else ConnectionError
        raise kind("; through the scheduler: ".join(str(task.exception()) for task in tasks))
    return winner.result()


def _drop(task: asyncio.Task[CallerConnection]) -> None:
    """Another way was faster, or nobody asks any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
