"""One proxy process, from its start to its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import HTTPOptions
from ..exceptions import ConfigError, ServeError, StartTimeoutError
from ..proxy import lifeline as wire
from ..proxy.doors import Material

__all__ = ["READY_TIMEOUT", "OnEvent", "Process", "environment"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds from the start of a process until it accepts requests.
READY_TIMEOUT = 30.0
#: Seconds beyond the drain time-out that a process gets to end, and again after SIGTERM.
EXIT_GRACE = 2.0
#: Seconds between two looks whether a process that closed its lifeline has ended.
REAP_INTERVAL = 0.01

_NODE = socket.gethostname()

#: Called with the slot, what happened ("ready", "stats", "counts", "counted", "backlogs", "died", "exited"), details.
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
        #: Why it cannot serve with its options; empty while it can.
        self.refused = ""
        #: Done when the process has ended, with its exit code.
        self.exited: asyncio.Future[int] = loop.create_future()
        #: Names this life of the process, here and on all nodes: pids come again, in containers at once.
        self._source = f"{_NODE}-{uuid.uuid4().hex}"
        self._counts = False
        self._on_event = on_event
        self._popen: subprocess.Popen[bytes] | None = None
        self._lifeline: wire.Lifeline | None = None
        self._reaper: asyncio.Task[None] | None = None

    @classmethod
    async def launch(
        cls,
        command: Sequence[str],
        listener: socket.socket,
        slot: int,
        on_event: OnEvent,
        admin: socket.socket | None = None,
    ) -> Process:
        """Start a process that accepts from ``listener``, and from ``admin`` if there is one."""
        process = cls(slot, on_event)
        ours, theirs = socket.socketpair()
        with theirs:
            files = [sock.fileno() for sock in (listener, theirs, admin) if sock is not None]
            process._popen = subprocess.Popen(  # noqa: ASYNC220, takes a few milliseconds
                [*command, *map(str, files)],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's stdout may be data that somebody parses
                env=environment(),
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

    def configure(self, options: HTTPOptions, doors: Material | None) -> None:
        """Send what has to come first."""
        if self._lifeline is not None:
            if doors is not None:
                self._lifeline.send(wire.DOORS, msgspec.msgpack.encode(doors))
            self._lifeline.send(wire.OPTIONS, msgspec.msgpack.encode(options))

    def publish(self, table: bytes) -> None:
        """Send a table; a slow process gets only the latest."""
        if self._lifeline is not None:
            self._lifeline.send_latest(wire.TABLE, table)

    def ping(self) -> None:
        """Tell it that the controller is there; a process that does not listen is not told twice."""
        if self._lifeline is not None:
            self._lifeline.send_latest(wire.PING, b"")

    async def until_ready(self, timeout: float) -> None:
        """Wait until it accepts requests.

        Raises
        ------
        ConfigError
            It cannot with the options that it was given.
        ServeError
            It ended, or was not ready in time.
        """
        ready: asyncio.Future[Any] = asyncio.ensure_future(self.ready.wait())
        await asyncio.wait({ready, self.exited}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self.refused:
            raise ConfigError(self.refused)
        if self.exited.done():
            raise ServeError(f"the HTTP proxy exited with code {self.exited.result()} while it started")
        if not self.ready.is_set():
            raise StartTimeoutError(f"the HTTP proxy was not ready after {timeout:g} s")

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
        elif kind == wire.REFUSED:
            self.refused = payload.decode()
        elif kind == wire.APPLIED:
            self.applied = payload
            self._on_event(self.slot, "applied", {"pid": self.pid})
        elif kind == wire.BACKLOGS:
            self._on_event(self.slot, "backlogs", msgspec.msgpack.decode(payload, type=dict[str, Any]))
        elif kind == wire.LOGS:
            found = msgspec.msgpack.decode(payload, type=list[dict[str, Any]])
            self._on_event(self.slot, "logs", {"pid": self.pid, "records": found})
        elif kind == wire.STATS:
            self.stats = msgspec.msgpack.decode(payload, type=dict[str, Any])
            counts = self.stats.pop("counts", None)
            if counts is not None:
                self._counts = True
                self._on_event(self.slot, "counts", {"source": self._source, "counts": counts})
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
        if self._counts:
            self._on_event(self.slot, "counted", {"source": self._source})
        self._on_event(self.slot, "exited", {"pid": self.pid, "code": code})


def environment() -> dict[str, str]:
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
