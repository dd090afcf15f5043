"""One place for a proxy process: a listening socket that outlives the processes which accept from it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigError, ServeError, StartTimeoutError
from ..proxy import lifeline as wire
from .process import READY_TIMEOUT, Process
from .sockets import format_url

if TYPE_CHECKING:
    from .proxies import Proxies

__all__ = ["Slot"]

logger = logging.getLogger("dask_serve.controller")

#: Deaths in a row before the first readiness, after which `Slot.until_ready` gives up.
START_TRIES = 3
#: Seconds before a dead proxy is replaced: at first, at most, and how long one must live to begin at the first again.
FIRST_DELAY, LONGEST_DELAY, GOOD_LIFE = 0.02, 5.0, 10.0


class Slot:
    """One place for a proxy process: its socket, the process that accepts from it, and those that still drain."""

    def __init__(self, number: int, sock: socket.socket, admin: socket.socket | None, owner: Proxies) -> None:
        self.number = number
        self.sock = sock
        self.admin = admin
        self.restarts = 0
        self.process: Process | None = None
        #: Deaths in a row before a process was ready.
        self.stillborn = 0
        self._leaving: set[Process] = set()
        # With other options: on its way up, and ready but not yet taken over by the keeper.
        self._candidate: Process | None = None
        self._successor: Process | None = None
        self._owner = owner
        self._changed = asyncio.Event()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_up())

    async def _keep_up(self) -> None:
        delay = FIRST_DELAY
        while True:
            process, self._successor = self._successor, None
            if process is None:
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
        try:
            self.process = await self._make()
        except OSError as error:
            logger.warning("Cannot start a proxy: %s", error)
            self._failed_start()
            return None
        self._notify()
        return self.process

    async def _make(self) -> Process:
        owner = self._owner
        process = await Process.launch(owner.command, self.sock, self.number, self._on_event, self.admin)
        process.configure(owner.options, owner.doors)
        if owner.table is not None:
            process.publish(owner.table)
        return process

    def publish(self, table: bytes) -> None:
        """Give the processes that serve, or will, a new table."""
        for process in self._living():
            process.publish(table)

    def ping(self) -> None:
        """Tell all processes that the controller is there."""
        for process in self._living() | self._leaving:
            process.ping()

    def _living(self) -> set[Process]:
        return {process for process in (self.process, self._candidate, self._successor) if process is not None}

    def _dismiss(self, process: Process) -> bool:
        """Note why a process no longer accepts; return whether its successor may start without delay."""
        if process.exited.done():
            why = process.refused or f"exited with code {process.exited.result()}"
            logger.warning("Proxy %d: %s; restarting it", process.pid, why)
            self._owner.tell(self.number, "died", {"pid": process.pid, "why": why})
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
            if self.process is not None and self.process.refused:
                raise ConfigError(self.process.refused)
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
        """Put a new process, with the owner's present options, in the place of the running one.

        The running one stays when the new one does not come up.

        Raises
        ------
        ConfigError
            The new one cannot serve with its options.
        ServeError
            It does not come up.
        """
        try:
            self._candidate = await self._make()
        except OSError as error:
            raise ServeError(f"cannot start an HTTP proxy: {error}") from None
        candidate = self._candidate
        try:
            await candidate.until_ready(READY_TIMEOUT)
        except BaseException:
            await asyncio.shield(candidate.stop(0.0))
            raise
        finally:
            self._candidate = None
        old, self.process, self._successor = self.process, candidate, candidate
        self._notify()
        if old is not None:
            old.replaced = True
            old.leaving.set()
            await old.stop(drain_timeout)

    async def stop(self, drain_timeout: float) -> None:
        """End the slot: its processes drain, and its port is no longer ours."""
        self._keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeper
        # First our copy of the socket: the proxy's is then the last, and it accepts what is queued before it closes.
        self.sock.close()
        if self.admin is not None:
            self.admin.close()
        await asyncio.gather(*(process.stop(drain_timeout) for process in self._living() | self._leaving))

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
            "admin": "" if self.admin is None else format_url(self._owner.options.admin_host, self.admin),
            "stats": process.stats,
        }
