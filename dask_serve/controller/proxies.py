"""Keeps the proxy processes running: one slot each, with a listening socket that outlives them."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from ..config import HTTPOptions
from ..exceptions import ConfigError, ServeError
from ..proxy.doors import Material
from .process import EXIT_GRACE, READY_TIMEOUT, OnEvent
from .slot import Slot
from .sockets import add_slot, bind_admin, bind_slots, format_url, remove_path

__all__ = ["Proxies", "certificates"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two signs of life for the proxies.
PING_INTERVAL = 1.0


class Proxies:
    """Supervises the proxy processes, in the event loop that it is used in.

    Parameters
    ----------
    on_event : callable, optional
        Called with a slot's number, "ready", "stats" or "exited", and a dictionary of details.
    command : sequence of str, optional
        What to run instead of ``python -m dask_serve.proxy``; two file descriptors are appended, or three.
    heartbeat : bool
        Tell the processes every second that the controller is there; else whoever knows calls `ping`.
    security : distributed.Security, optional
        Dask's certificates, for the proxies' connections to doors.
    """

    def __init__(
        self,
        on_event: OnEvent | None = None,
        *,
        command: Sequence[str] | None = None,
        heartbeat: bool = True,
        security: Any = None,
    ) -> None:
        self.command = list(command or (sys.executable, "-m", "dask_serve.proxy"))
        self.options = HTTPOptions()
        self.doors = None if security is None else certificates(security)
        #: The latest routing table, encoded.
        self.table: bytes | None = None
        #: Where HTTP is served; empty while it is not.
        self.url = ""
        self._news = asyncio.Event()
        self._on_event = on_event
        self._slots: list[Slot] = []
        self._lock = asyncio.Lock()
        self._heartbeat = heartbeat
        self._pinging: asyncio.Task[None] | None = None

    async def start(self, options: HTTPOptions, explicit: set[str] | None = None, *, retry: float = 0.0) -> str:
        """Bring the proxies to ``options`` and return the URL once they accept requests.

        A first routing table (an empty one will do) must be published before or meanwhile: a proxy accepts nothing
        without one. Calling again with the same options changes nothing; with others it replaces processes one at a
        time, and with another host or port it moves.

        Parameters
        ----------
        options : HTTPOptions
            What is wanted.
        explicit : set of str
            Names of the options that the user gave; a running service keeps what was not named.
        retry : float
            Seconds to wait for a busy port; for a controller that restarts.

        Raises
        ------
        ConfigError
            The port is busy, or host and port cannot be used.
        ServeError
            The processes do not come up.
        """
        async with self._lock:
            if not self._slots:
                await self._open(options, retry)
                return self.url
            wanted = options if explicit is None else _merge(self.options, options, explicit)
            if self._moves(wanted):
                await self._move(wanted)
            elif wanted != self.options:
                await self._change(wanted)
            return self.url

    def publish(self, table: bytes) -> None:
        """Give all proxies a new routing table, encoded."""
        self.table = table
        for slot in self._slots:
            slot.publish(table)

    def ping(self) -> None:
        """Tell all processes that the controller is there."""
        for slot in self._slots:
            slot.ping()

    async def _ping_for_ever(self) -> None:
        while True:
            self.ping()
            await asyncio.sleep(PING_INTERVAL)

    async def until_applied(self, timeout: float) -> bool:
        """Wait until all proxies that accept requests route by the latest table; False after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while any(slot.is_behind for slot in self._slots):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return False
        return True

    async def stop(self, drain_timeout: float | None = None) -> None:
        """Drain and end all proxies, and give up the port; nothing happens when none runs."""
        async with self._lock:
            slots, self._slots, self.url = self._slots, [], ""
            await self._end(slots, drain_timeout)
            if self._pinging is not None:
                self._pinging.cancel()
                self._pinging = None

    def describe(self) -> list[dict[str, Any]]:
        """Return one dictionary per process: slot, pid, state, restarts and its latest statistics."""
        return [row for slot in self._slots for row in slot.describe()]

    def queued(self) -> Counter[str]:
        """Return how many requests wait, by deployment, as the processes told last."""
        waiting: Counter[str] = Counter()
        for slot in self._slots:
            for row in slot.describe():
                waiting.update(row.get("stats", {}).get("queued", {}))
        return waiting

    def tell(self, slot: int, event: str, details: dict[str, Any]) -> None:
        """Pass on what happened in a slot."""
        self._news.set()
        if self._on_event is not None and event != "applied":
            self._on_event(slot, event, details)

    async def _open(self, options: HTTPOptions, retry: float = 0.0, admins: Sequence[socket.socket] = ()) -> None:
        sockets = await bind_slots(options.host, options.port, options.num_proxies, options.unix_socket, retry=retry)
        try:
            admins = [*admins, *await self._bind_admins(options, len(admins), retry)]
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        self.options = options
        self._slots = [Slot(i, sock, admins[i] if admins else None, self) for i, sock in enumerate(sockets)]
        self._set_url()
        if self._heartbeat and self._pinging is None:
            self._pinging = asyncio.get_running_loop().create_task(self._ping_for_ever())
        try:
            await asyncio.gather(*(slot.until_ready(READY_TIMEOUT) for slot in self._slots))
        except BaseException:
            slots, self._slots, self.url = self._slots, [], ""
            await asyncio.shield(self._end(slots, 0.0))
            raise

    def _set_url(self) -> None:
        options = self.options
        self.url = format_url(options.host, self._slots[0].sock, tls=options.tls_certificate is not None)

    async def _bind_admins(self, options: HTTPOptions, first: int, retry: float = 0.0) -> list[socket.socket]:
        """Bind the admin ports from number ``first`` on."""
        bound: list[socket.socket] = []
        if options.admin_port is not None:
            try:
                for number in range(first, options.num_proxies):
                    port = options.admin_port + number if options.admin_port else 0
                    bound.append(await bind_admin(options.admin_host, port, retry=retry))
            except BaseException:
                for sock in bound:
                    sock.close()
                raise
        return bound

    def _moves(self, wanted: HTTPOptions) -> bool:
        """Whether the public address changes."""
        running = self.options
        if wanted.unix_socket or running.unix_socket:
            return wanted.unix_socket != running.unix_socket
        return wanted.host != running.host or wanted.port not in {None, 0, self._port}

    @property
    def fixed_options(self) -> HTTPOptions:
        """The options, with the port that was found."""
        port = self._port if self._slots else None
        return self.options if port is None else msgspec.structs.replace(self.options, port=port)

    @property
    def _port(self) -> int | None:
        name = self._slots[0].sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else None

    async def _move(self, options: HTTPOptions) -> None:
        before, slots, port, url = self.options, self._slots, self._port, self.url
        if options.port is None and not options.unix_socket and port is not None:
            options = msgspec.structs.replace(options, port=port)
        if (options.admin_host, options.admin_port) == (before.admin_host, before.admin_port):
            # Kept, while the processes behind them change.
            admins = [slot.admin.dup() for slot in slots if slot.admin is not None][: options.num_proxies]
        else:
            admins = []
        if options.unix_socket or before.unix_socket or options.port != port:
            try:
                await self._open(options, admins=admins)
            except BaseException:
                self.options, self._slots, self.url = before, slots, url
                raise
            await self._end(slots, before.drain_timeout_s)
            return
        # Another interface on the same port: ours must be free first. Listeners close at once, long before the
        # requests in flight are done.
        again = [sock.dup() for sock in admins]
        ending = asyncio.gather(*(slot.stop(before.drain_timeout_s) for slot in slots))
        try:
            await self._open(options, EXIT_GRACE, admins)
        except ServeError:
            await self._open(msgspec.structs.replace(before, port=port), EXIT_GRACE, again)
            again = []
            raise
        finally:
            for sock in again:
                sock.close()
            await ending

    async def _change(self, options: HTTPOptions) -> None:
        before = self.options
        surplus, kept = self._slots[options.num_proxies :], self._slots[: options.num_proxies]
        admins = [slot.admin for slot in kept]
        moved = (options.admin_host, options.admin_port) != (before.admin_host, before.admin_port)
        bound = await self._bind_admins(options, 0 if moved else len(kept))
        new = iter(bound)
        added: list[Slot] = []
        self.options = options
        try:
            if moved:
                for slot in kept:
                    slot.admin = next(new, None)
            # The first one proves the options; where it does not come up all is as it was.
            if msgspec.structs.replace(before, num_proxies=options.num_proxies) != options:
                for slot in kept:
                    await slot.replace(before.drain_timeout_s)
            added += [
                Slot(number, add_slot(kept[0].sock), next(new, None), self)
                for number in range(len(kept), options.num_proxies)
            ]
            self._slots = kept + added
            await asyncio.gather(*(slot.until_ready(READY_TIMEOUT) for slot in added))
        except BaseException:
            self.options, self._slots = before, kept + surplus
            for slot, admin in zip(kept, admins, strict=True):
                slot.admin = admin
            for sock in bound:
                sock.close()
            await asyncio.shield(self._end(added, 0.0))
            raise
        if moved:
            for admin in admins:
                if admin is not None:
                    admin.close()
        self._set_url()
        await self._end(surplus, before.drain_timeout_s)

    async def _end(self, slots: list[Slot], drain_timeout: float | None) -> None:
        patience = self.options.drain_timeout_s if drain_timeout is None else drain_timeout
        names = {slot.sock.getsockname() for slot in slots}
        await asyncio.gather(*(slot.stop(patience) for slot in slots))
        kept = {slot.sock.getsockname() for slot in self._slots}
        for name in names - kept:
            remove_path(name)


def certificates(security: Any) -> Material | None:
    """Return the certificates that a client of the scheduler has; None: Dask uses none here."""
    # A scheduler started from the shell may have no client's certificate.
    for role in ("client", "scheduler"):
        config = security.get_tls_config_for_role(role)
        if config.get("ca_file") and config.get("cert"):
            return Material(config["ca_file"], config["cert"], config.get("key"), config.get("ciphers"))
    return None


def _merge(running: HTTPOptions, wanted: HTTPOptions, explicit: set[str]) -> HTTPOptions:
    try:
        return msgspec.structs.replace(running, **{name: getattr(wanted, name) for name in explicit})
    except ValueError as error:
        raise ConfigError(f"serve.start, with what the service has already: {error}") from None
