"""Where a door listens: the interface of its worker, a port that it may use, and TLS where Dask has it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
from distributed.comm.addressing import get_address_host
from distributed.utils import parse_ports

from ..exceptions import ConfigError, ServeError
from ..wire.connection import HANDSHAKE_TIMEOUT
from ..wire.tls import reason

if TYPE_CHECKING:
    import ssl

    from distributed import Worker

__all__ = ["Place", "TLSListener", "bind", "place_of"]

logger = logging.getLogger("dask_serve.door")

#: Seconds between two lines about strangers, and until more connections are taken after none could be.
COMPLAIN_EVERY, RETRY = 10.0, 1.0

_SETTING = "serve.door.port"


class Place(NamedTuple):
    """Where a door may listen, and what it is called."""

    #: Interfaces, the best first; empty means all of them.
    hosts: Sequence[str] = ("127.0.0.1",)
    #: The host that callers are told.
    shown: str = "127.0.0.1"
    #: Ports, the best first; 0 means any.
    ports: Sequence[int] = (0,)


def place_of(worker: Worker) -> Place:
    """Return where the door of a worker's process listens.

    It is the worker's own interface, and the host of its contact address is what callers are told. A worker that
    listens on all interfaces is content with that of its contact address, where this machine has it.

    Raises
    ------
    ConfigError
        ``serve.door.port`` in Dask's configuration is no port.
    """
    ports = _ports(dask.config.get(_SETTING, None))
    if worker.address.startswith("inproc"):
        return Place(ports=ports)
    shown = get_address_host(worker.address)
    own = get_address_host(worker.listen_address)
    return Place((shown, "") if own in {"", "0.0.0.0", "::"} else (own,), shown, ports)  # noqa: S104


def _ports(setting: Any) -> list[int]:
    try:
        ports = [int(port or 0) for port in parse_ports(setting)]
    except (TypeError, ValueError):
        ports = []
    if not ports or not all(0 <= port <= 65535 for port in ports):
        raise ConfigError(
            f"{_SETTING} = {setting!r} in Dask's configuration is no port: give a number, a range with its last one "
            "such as '9100:9110', or leave it out for any free port"
        )
    return ports


def bind(place: Place) -> socket.socket:
    """Return a listening socket at the first port that is free.

    Raises
    ------
    ServeError
        There is none.
    """
    for number, host in enumerate(place.hosts):
        for port in place.ports:
            try:
                return _listen(host, port)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                if number == len(place.hosts) - 1:
                    raise ServeError(
                        f"no door can be opened on {host or 'all interfaces'}, port {port}: {error}"
                    ) from None
                # The contact address of a worker behind a NAT is no interface of this machine.
                break
        else:
            break
    first, last = place.ports[0], place.ports[-1]
    raise ServeError(
        f"no door can be opened on {place.hosts[0] or 'all interfaces'}: all of the ports {first} to {last} "
        f"({_SETTING}) are in use. Each worker process with replicas needs one: make the range larger"
    )


def _listen(host: str, port: int) -> socket.socket:
    """Listen on one interface, or on all; addresses of both versions of IP then share the port."""
    if not host:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        sock = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    else:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With a zone of its own an IPv6 address has four parts, of which `create_server` takes two.
        sock = socket.create_server((address[0], address[1]), family=family, backlog=1024)
    sock.setblocking(False)
    return sock


class TLSListener:
    """Accepts callers with TLS, on the running loop; says who was sent away, which `create_server` does not.

    Parameters
    ----------
    sock : socket.socket
        A listening one; closed with this.
    visit : callable
        Makes the protocol of a caller that has shown a certificate.
    ssl : SSLContext
    """

    def __init__(self, sock: socket.socket, visit: Callable[[], asyncio.Protocol], ssl: ssl.SSLContext) -> None:
        self._sock = sock
        self._visit = visit
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent_away = 0
        self._told: asyncio.TimerHandle | None = None
        self._last = ""
        accepting = self._start(self._accept())
        accepting.add_done_callback(lambda _: sock.close())

    def close(self) -> None:
        """Take no more callers."""
        if self._told is not None:
            self._told.cancel()
        for task in list(self._tasks):
            task.cancel()

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self) -> None:
        while True:
            try:
                sock, peer = await self._loop.sock_accept(self._sock)
            except OSError as error:
                # This process may open no more files, for one.
                logger.warning("The door cannot take a caller now: %s", error)
                await asyncio.sleep(RETRY)
            else:
                self._start(self._admit(sock, peer))

    async def _admit(self, sock: socket.socket, peer: Any) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self._visit, sock, ssl=self._ssl, ssl_handshake_timeout=HANDSHAKE_TIMEOUT
            )
        except (OSError, asyncio.TimeoutError) as error:
            sock.close()
            self._sent_away += 1
            self._last = f"{peer[0]}: {reason(error)}"
            if self._told is None:
                self._tell()
        except asyncio.CancelledError:
            sock.close()
            raise

    def _tell(self) -> None:
        """One line at once, and one for all that follow within some seconds."""
        self._told = None
        if self._sent_away:
            logger.warning(
                "Callers without a certificate of this cluster were sent away: %d; the last one, %s",
                self._sent_away,
                self._last,
            )
            self._sent_away = 0
            self._told = self._loop.call_later(COMPLAIN_EVERY, self._tell)
