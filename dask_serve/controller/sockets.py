"""The listening sockets of the proxies: one per slot on one port, owned by the controller."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import stat
import sys
from pathlib import Path

from ..exceptions import ConfigError

__all__ = ["add_slot", "bind_admin", "bind_slots", "format_url", "remove_path"]

logger = logging.getLogger("dask_serve.controller")

#: Tried first when the user named no port.
DEFAULT_PORT = 8000
#: How many ports from the default one on are tried.
PORTS_TRIED = 100
#: Connections that the kernel keeps for a slot whose proxy is busy or down.
BACKLOG = 2048
#: Seconds between two tries of a busy port.
RETRY_INTERVAL = 0.1

#: Linux lets a socket share its port once it listens.
_SHARES_LATER = sys.platform.startswith("linux")

_HOW_TO_CHANGE = "choose another with serve.start(port=...) (from the shell: --port), or let port=0 take a free one"


async def bind_slots(
    host: str, port: int | None, count: int, unix_socket: str | None = None, *, retry: float = 0.0
) -> list[socket.socket]:
    """Return ``count`` sockets that listen on one port and share its connections.

    Parameters
    ----------
    host : str
        Interface; empty means all.
    port : int or None
        Port. None: 8000, or the next free one with a warning. 0: any free one.
    count : int
        How many sockets.
    unix_socket : str, optional
        Path of a Unix socket instead of host and port; all of the sockets are that one.
    retry : float
        Seconds to wait for a busy port: after a restart of the controller the proxies of the last one may still hold
        it for a moment.

    Raises
    ------
    ConfigError
        The port is busy or may not be used, or the host is not one of this machine's.
    """
    if unix_socket is not None:
        sock = await _claim_path(unix_socket, retry)
        return [sock, *(sock.dup() for _ in range(count - 1))]
    family, address = await _resolve(host)
    first = await _claim(family, address, host, port, retry)
    slots = [first]
    try:
        while len(slots) < count:
            slots.append(add_slot(first))
    except OSError:
        for slot in slots:
            slot.close()
        raise
    return slots


def add_slot(sibling: socket.socket) -> socket.socket:
    """Return one more socket on the port of ``sibling``."""
    if sibling.family == socket.AF_UNIX:
        return sibling.dup()
    return _listen(sibling.family, sibling.getsockname(), share=True)


async def bind_admin(host: str, port: int, *, retry: float = 0.0) -> socket.socket:
    """Return a socket for one proxy's admin port, which may be busy for ``retry`` seconds.

    Raises
    ------
    ConfigError
        The port is busy or may not be used, or the host is not one of this machine's.
    """
    family, address = await _resolve(host)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + retry
    try:
        while True:
            try:
                return _probe_and_listen(family, address, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or loop.time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_INTERVAL)
    except (OSError, OverflowError) as error:
        how = "choose another with serve.start(admin_port=...); each proxy takes one, from that one on"
        raise ConfigError(f"admin port {port} on {host or 'all interfaces'}: {error}; {how}") from None


def format_url(host: str, sock: socket.socket, *, tls: bool = False) -> str:
    """Return the address that a client on this machine can use; ``unix:PATH`` for a Unix socket."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    name, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name) or host  # noqa: S104
    return f"{'https' if tls else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def remove_path(name: object) -> None:
    """Remove the file of a Unix socket that nobody listens on any more; nothing to do for others."""
    if isinstance(name, str) and not _is_answered(name):
        with contextlib.suppress(OSError):
            Path(name).unlink()


async def _claim_path(path: str, retry: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + retry
    while True:
        # `_bind_path` says what is wrong with it.
        if loop.time() >= deadline or not _is_answered(path):
            return _bind_path(path)
        await asyncio.sleep(RETRY_INTERVAL)


def _bind_path(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise ConfigError(f"unix_socket={path!r} is a file already, and not a socket; choose another path")
        if _is_answered(path):
            raise ConfigError(f"unix_socket={path!r} is in use by another process; choose another path")
        # Left behind by a process that was killed.
        Path(path).unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        Path(path).chmod(0o660)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on unix_socket={path!r}: {error}") from None
    return sock


def _is_answered(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(path) == 0


async def _resolve(host: str) -> tuple[int, str]:
    if not host:
        return socket.AF_INET, "0.0.0.0"  # noqa: S104
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"cannot resolve host {host!r}: {error}; give an address of this machine") from None
    # Of a name with several addresses, as localhost, the IPv4 one: that is what clients try first or fall back to.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, str(address[0])


async def _claim(family: int, address: str, host: str, port: int | None, retry: float) -> socket.socket:
    wanted = DEFAULT_PORT if port is None else port
    loop = asyncio.get_running_loop()
    deadline = loop.time() + retry
    while True:
        try:
            return _probe_and_listen(family, address, wanted)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(_explain(error, host, wanted)) from None
        if loop.time() >= deadline:
            break
        await asyncio.sleep(RETRY_INTERVAL)
    if port is not None:
        raise ConfigError(f"port {port} on {host or 'all interfaces'} is in use by another process; {_HOW_TO_CHANGE}")
    return _next_free(family, address)


def _next_free(family: int, address: str) -> socket.socket:
    last = DEFAULT_PORT + PORTS_TRIED - 1
    for candidate in range(DEFAULT_PORT + 1, last + 1):
        try:
            sock = _probe_and_listen(family, address, candidate)
        except OSError:
            continue
        logger.warning("Port %d is in use; HTTP is served on port %d instead", DEFAULT_PORT, candidate)
        return sock
    raise ConfigError(f"ports {DEFAULT_PORT} to {last} are all in use; {_HOW_TO_CHANGE}")


def _probe_and_listen(family: int, address: str, port: int) -> socket.socket:
    # Sockets that share a port may belong to different services of one user, who would then each get a part of the
    # connections. A socket that does not share finds out.
    if _SHARES_LATER:
        # No two services that start together get it.
        return _listen(family, (address, port), share=False, share_later=True)
    with _listen(family, (address, port), share=False) as probe:
        name = probe.getsockname()
    return _listen(family, name, share=True)


def _listen(
    family: int, address: tuple[str, int] | tuple[str, int, int, int], *, share: bool, share_later: bool = False
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        if share_later:
            # Not before: several may be bound to a port that nobody listens on.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this process has; {_HOW_TO_CHANGE}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host {host!r} is not an address of this machine; choose another with serve.start(host=...)"
    return f"cannot listen on {host}:{port}: {error}"
