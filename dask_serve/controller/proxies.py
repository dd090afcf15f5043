"""Keeps the proxy processes running: one slot each, with a listening socket that outlives them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import HTTPOptions
from ..exceptions import ServeError, StartTimeoutError
from ..proxy import lifeline as wire
from .sockets import add_slot, bind_slots, format_url

__all__ = ["Proxies"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds from the start of a process until it accepts requests.
READY_TIMEOUT = 30.0
#: Deaths in a row before the first readiness, after which `Proxies.start` gives up.
START_TRIES = 3
#: Seconds before a dead proxy is replaced: at first, at most, and how long one must live to begin at the first again.
FIRST_DELAY, LONGEST_DELAY, GOOD_LIFE = 0.1, 5.0, 10.0
#: Seconds beyond the drain time-out that a process gets to end, and again after SIGTERM.
EXIT_GRACE = 2.0
#: Seconds between two looks whether a process that closed its lifeline has ended.
REAP_INTERVAL = 0.01

#: Called with the slot, what happened ("ready", "stats", "exited") and details.
OnEvent = Callable[[int, str, dict[str, Any]], None]


class Process:
    """One proxy process, from its start to its exit code."""

    def __init__(self, slot: int, on_event: OnEvent) -> None:
        loop = asyncio.get_running_loop()
        self.slot = slot
        self.started = time.monotonic()
        self.stats: dict[str, Any] = {}
        self.ready = asyncio.Event()
        #: Checksum of the table that it routes by.
        self.applied = b""
        #: Set when it accepts no more connections, by its own account or because it was told to.
        self.leaving = asyncio.Event()
        #: Whether it leaves because its options changed.
        self.replaced = False
        #: Done when the process has ended, with its exit code.
        self.exited: asyncio.Future[int] = loop.create_future()
        self._on_event = on_event
        self._popen: subprocess.Popen[bytes] | None = None
        self._lifeline: wire.Lifeline | None = None
        self._reaper: asyncio.Task[None] | None = None

    @classmethod
    async def launch(cls, command: Sequence[str], listener: socket.socket, slot: int, on_event: OnEvent) -> Process:
        """Start a process that accepts from ``listener``."""
        process = cls(slot, on_event)
        ours, theirs = socket.socketpair()
        with theirs:
            process._popen = subprocess.Popen(  # noqa: ASYNC220, takes a few milliseconds
                [*command, str(listener.fileno()), str(theirs.fileno())],
                pass_fds=[listener.fileno(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's stdout may be data that somebody parses
                env=_environment(),
                start_new_session=True,
            )
        try:
            process._lifeline = await wire.connect(ours, process._on_frame, process._on_eof)
        except BaseException:
            ours.close()
            process._popen.kill()
            process._on_eof()
            raise
        return process

    @property
    def pid(self) -> int:
        return self._popen.pid if self._popen is not None else 0

    @property
    def state(self) -> str:
        if self.exited.done():
            return "stopped"
        if self.leaving.is_set():
            return "draining"
        return "ready" if self.ready.is_set() else "starting"

    def configure(self, options: HTTPOptions) -> None:
        """Send what has to come first."""
        if self._lifeline is not None:
            self._lifeline.send(wire.OPTIONS, msgspec.msgpack.encode(options))

    def publish(self, table: bytes) -> None:
        """Send a table; a slow process gets only the latest."""
        if self._lifeline is not None:
            self._lifeline.send_latest(wire.TABLE, table)

    async def stop(self, drain_timeout: float) -> None:
        """Let it drain, then insist."""
        self.leaving.set()
        if self._lifeline is not None:
            self._lifeline.send(wire.DRAIN)
        if await self._ends_within(drain_timeout + EXIT_GRACE):
            return
        logger.warning("Proxy %d did not drain in %.1f s; terminating it", self.pid, drain_timeout + EXIT_GRACE)
        self._signal("terminate")
        if await self._ends_within(EXIT_GRACE):
            return
        self._signal("kill")
        await asyncio.shield(self.exited)

    async def _ends_within(self, timeout: float) -> bool:
        await asyncio.wait([self.exited], timeout=timeout)
        return self.exited.done()

    def _signal(self, name: str) -> None:
        if self._popen is not None and not self.exited.done():
            getattr(self._popen, name)()

    def _on_frame(self, kind: bytes, payload: bytes) -> None:
        if kind == wire.READY:
            self.ready.set()
            self._on_event(self.slot, "ready", {"pid": self.pid})
        elif kind == wire.APPLIED:
            self.applied = payload
            self._on_event(self.slot, "applied", {"pid": self.pid})
        elif kind == wire.STATS:
            self.stats = msgspec.msgpack.decode(payload, type=dict[str, Any])
            if self.stats.get("draining"):
                self.leaving.set()
            self._on_event(self.slot, "stats", self.stats)

    def _on_eof(self) -> None:
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        # Only a process at its end closes the lifeline; one that lives on without it could not be told anything.
        assert self._popen is not None
        patience = time.monotonic() + EXIT_GRACE
        while (code := self._popen.poll()) is None:
            if time.monotonic() > patience:
                self._popen.kill()
            await asyncio.sleep(REAP_INTERVAL)
        self.leaving.set()
        if not self.exited.done():
            self.exited.set_result(code)
        self._on_event(self.slot, "exited", {"pid": self.pid, "code": code})


class Slot:
    """One place for a proxy process: its socket, the process that accepts from it, and those that still drain."""

    def __init__(self, number: int, sock: socket.socket, owner: Proxies) -> None:
        self.number = number
        self.sock = sock
        self.restarts = 0
        self.process: Process | None = None
        #: Deaths in a row before a process was ready.
        self.stillborn = 0
        self._leaving: set[Process] = set()
        self._owner = owner
        self._changed = asyncio.Event()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_up())

    async def _keep_up(self) -> None:
        delay = FIRST_DELAY
        while True:
            process = await self._launch()
            if process is not None:
                await process.leaving.wait()
                if self._dismiss(process):
                    continue
                if time.monotonic() - process.started >= GOOD_LIFE:
                    delay = FIRST_DELAY
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
            self.restarts += 1

    @property
    def is_behind(self) -> bool:
        """Its process accepts requests and does not yet route by the latest table."""
        process, table = self.process, self._owner.table
        return (
            process is not None
            and table is not None
            and process.state == "ready"
            and process.applied != wire.checksum(table)
        )

    async def _launch(self) -> Process | None:
        owner = self._owner
        try:
            process = await Process.launch(owner.command, self.sock, self.number, self._on_event)
        except OSError as error:
            logger.warning("Cannot start a proxy: %s", error)
            self._failed_start()
            return None
        process.configure(owner.options)
        if owner.table is not None:
            process.publish(owner.table)
        self.process = process
        self._notify()
        return process

    def _dismiss(self, process: Process) -> bool:
        """Note why a process no longer accepts; return whether its successor may start without delay."""
        if process.exited.done():
            logger.warning("Proxy %d exited with code %d; restarting it", process.pid, process.exited.result())
            if not process.ready.is_set():
                self._failed_start()
        else:
            self._leaving.add(process)
            process.exited.add_done_callback(lambda _: self._leaving.discard(process))
        return process.replaced

    def _failed_start(self) -> None:
        self.stillborn += 1
        self._notify()

    def _on_event(self, slot: int, event: str, details: dict[str, Any]) -> None:
        if event == "ready":
            self.stillborn = 0
            self._notify()
        self._owner.tell(slot, event, details)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until_ready(self, timeout: float) -> None:
        """Wait for a process that accepts requests.

        Raises
        ------
        StartTimeoutError, ServeError
            None came up in time, or several died at once.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self.process is None or self.process.state != "ready":
            if self.stillborn >= START_TRIES:
                raise ServeError(
                    f"the HTTP proxy exited {self.stillborn} times while it started; its output is on the stderr of "
                    "the process that runs the scheduler"
                )
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - loop.time())
            except asyncio.TimeoutError:
                why = "" if self._owner.table is not None else ": the controller has published no routing table yet"
                raise StartTimeoutError(f"the HTTP proxy was not ready after {timeout:g} s{why}") from None

    async def replace(self, drain_timeout: float) -> None:
        """Put a new process, with the owner's present options, in the place of the running one."""
        old = self.process
        if old is None:
            return
        old.replaced = True
        old.leaving.set()
        try:
            await self.until_ready(READY_TIMEOUT)
        finally:
            await old.stop(drain_timeout)

    async def stop(self, drain_timeout: float) -> None:
        """End the slot: its processes drain, and its port is no longer ours."""
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeper
        # First our copy of the socket: the proxy's is then the last, and it accepts what is queued before it closes.
        self.sock.close()
        processes = {*self._leaving, *([self.process] if self.process is not None else [])}
        await asyncio.gather(*(process.stop(drain_timeout) for process in processes))

    def describe(self) -> list[dict[str, Any]]:
        """Return what runs here, as plain data."""
        current = self.process
        rows = [self._row(process) for process in self._leaving if process is not current]
        if current is None or current.exited.done():
            return [{"slot": self.number, "pid": None, "state": "restarting", "restarts": self.restarts}, *rows]
        return [self._row(current), *rows]

    def _row(self, process: Process) -> dict[str, Any]:
        return {
            "slot": self.number,
            "pid": process.pid,
            "state": process.state,
            "restarts": self.restarts,
            "stats": process.stats,
        }


class Proxies:
    """Supervises the proxy processes, in the event loop that it is used in.

    Parameters
    ----------
    on_event : callable, optional
        Called with a slot's number, "ready", "stats" or "exited", and a dictionary of details.
    command : sequence of str, optional
        What to run instead of ``python -m dask_serve.proxy``; two file descriptors are appended.
    """

    def __init__(self, on_event: OnEvent | None = None, *, command: Sequence[str] | None = None) -> None:
        self.command = list(command or (sys.executable, "-m", "dask_serve.proxy"))
        self.options = HTTPOptions()
        #: The latest routing table, encoded.
        self.table: bytes | None = None
        #: Where HTTP is served; empty while it is not.
        self.url = ""
        self._news = asyncio.Event()
        self._on_event = on_event
        self._slots: list[Slot] = []
        self._lock = asyncio.Lock()

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
            port = self._slots[0].sock.getsockname()[1]
            if wanted.host != self.options.host or wanted.port not in (None, 0, port):
                await self._move(msgspec.structs.replace(wanted, port=wanted.port or port), port)
            elif wanted != self.options:
                await self._change(wanted)
            return self.url

    def publish(self, table: bytes) -> None:
        """Give all proxies a new routing table, encoded."""
        self.table = table
        for slot in self._slots:
            if slot.process is not None:
                slot.process.publish(table)

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

    def describe(self) -> list[dict[str, Any]]:
        """Return one dictionary per process: slot, pid, state, restarts and its latest statistics."""
        return [row for slot in self._slots for row in slot.describe()]

    def tell(self, slot: int, event: str, details: dict[str, Any]) -> None:
        """Pass on what happened in a slot."""
        self._news.set()
        if self._on_event is not None and event != "applied":
            self._on_event(slot, event, details)

    async def _open(self, options: HTTPOptions, retry: float = 0.0) -> None:
        sockets = await bind_slots(options.host, options.port, options.num_proxies, retry=retry)
        self.options = options
        self.url = format_url(options.host, sockets[0])
        self._slots = [Slot(number, sock, self) for number, sock in enumerate(sockets)]
        try:
            await asyncio.gather(*(slot.until_ready(READY_TIMEOUT) for slot in self._slots))
        except BaseException:
            slots, self._slots, self.url = self._slots, [], ""
            await asyncio.shield(self._end(slots, 0.0))
            raise

    async def _move(self, options: HTTPOptions, port: int) -> None:
        before, slots = self.options, self._slots
        if options.port != port:
            url = self.url
            try:
                await self._open(options)
            except BaseException:
                self.options, self._slots, self.url = before, slots, url
                raise
            await self._end(slots, before.drain_timeout_s)
            return
        # Another interface on the same port: ours must be free first. Listeners close at once, long before the
        # requests in flight are done.
        ending = asyncio.gather(*(slot.stop(before.drain_timeout_s) for slot in slots))
        try:
            await self._open(options, retry=EXIT_GRACE)
        except ServeError:
            await self._open(msgspec.structs.replace(before, port=port), retry=EXIT_GRACE)
            raise
        finally:
            await ending

    async def _change(self, options: HTTPOptions) -> None:
        before, self.options = self.options, options
        surplus, kept = self._slots[options.num_proxies :], self._slots[: options.num_proxies]
        added = [Slot(number, add_slot(kept[0].sock), self) for number in range(len(kept), options.num_proxies)]
        self._slots = kept + added
        for slot in added:
            await slot.until_ready(READY_TIMEOUT)
        if msgspec.structs.replace(before, num_proxies=options.num_proxies) != options:
            for slot in kept:
                await slot.replace(before.drain_timeout_s)
        await self._end(surplus, before.drain_timeout_s)

    async def _end(self, slots: list[Slot], drain_timeout: float | None) -> None:
        patience = self.options.drain_timeout_s if drain_timeout is None else drain_timeout
        await asyncio.gather(*(slot.stop(patience) for slot in slots))


def _merge(running: HTTPOptions, wanted: HTTPOptions, explicit: set[str]) -> HTTPOptions:
    return msgspec.structs.replace(running, **{name: getattr(wanted, name) for name in explicit})


def _environment() -> dict[str, str]:
    """Return the environment of a process that finds the modules that this one finds."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    paths = [str(Path(entry).absolute()) for entry in sys.path if _is_ours(entry, standard)]
    here = str(Path(__file__).absolute().parents[2])
    if here not in paths:
        paths.insert(0, here)
    # -m would put the working directory first, where a file of the user's may have a standard module's name.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _is_ours(entry: str, standard: set[str]) -> bool:
    path = Path(entry).absolute()
    return path.exists() and not any(path == Path(root) or path.parent == Path(root) for root in standard)
