"""Tunnels: callers who reach the scheduler but no worker are connected to doors through here.

The scheduler passes bytes on and understands none of them: caller and door prove to each other that they know the
cluster's secret, as on a connection of their own. Only doors that replicas reported are dialled, and by the address of
their worker as Dask knows it, so that nobody gets anywhere else through the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

from distributed.comm.addressing import get_address_host
from distributed.core import Status

from ..routing.dial import notice_silence, split_address
from ..wire.local import connect_locally
from ..wire.pump import HIGH_WATER, LINGER, Pump

if TYPE_CHECKING:
    from distributed.comm import Comm

__all__ = ["Tunnels"]

logger = logging.getLogger("dask_serve.tunnel")

#: Seconds to connect to a door.
CONNECT = 3.0
#: Bytes that may be under way in one direction of one tunnel, at the most and at the least.
WINDOW = 2 * 1024 * 1024
LEAST_WINDOW = 128 * 1024
#: Bytes that all tunnels together may hold: with many of them, later ones get smaller windows.
BUDGET = 128 * 1024 * 1024


class Tunnels:
    """The doors that may be reached through this scheduler, and the tunnels that stand.

    Parameters
    ----------
    ssl : SSLContext, optional
        For doors with TLS.
    """

    def __init__(self, ssl: Any) -> None:
        self._ssl = ssl
        #: By incarnation of the process: where its door is, and the workers that live in it.
        self._doors: dict[str, tuple[str, set[str]]] = {}
        self._ends: set[_DoorEnd] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._ends)

    def learn(self, process: str, door: str, worker: str) -> None:
        """A worker's replica is behind this door."""
        scheme, _, _ = door.partition("://")
        host = get_address_host(worker)
        if worker.startswith("inproc"):
            host = "127.0.0.1"
        _, port = split_address(door)
        _, workers = self._doors.get(process, ("", set()))
        self._doors[process] = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", {*workers, worker}

    def forget(self, worker: str) -> None:
        """A worker is gone. Its doors stay known while a worker lives: results may lie there without a replica."""
        for process, (_, workers) in list(self._doors.items()):
            workers.discard(worker)
            if not workers:
                del self._doors[process]

    async def serve(self, comm: Comm, process: str) -> Status:
        """Connect a caller to a door, and pump until either side ends."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._serving.add(task)
        try:
            window = max(LEAST_WINDOW, min(WINDOW, BUDGET // (2 * len(self._ends) + 2)))
            end = _DoorEnd(comm, window)
            try:
                await self._dial(process, end)
            except (OSError, asyncio.TimeoutError) as error:
                end.close()
                await comm.write({"refused": f"the scheduler cannot reach the door of process {process}: {error!r}"})
                await comm.close()
                return Status.dont_reply
            self._ends.add(end)
            try:
                await comm.write({"window": window})
                await end.pump.run()
            finally:
                end.close()
                self._ends.discard(end)
        finally:
            self._serving.discard(task)
        return Status.dont_reply

    async def _dial(self, process: str, end: _DoorEnd) -> None:
        found = self._doors.get(process)
        if found is None or self._closed:
            raise ConnectionRefusedError("it is not there (any more)")
        door = found[0]
        secure = door.startswith("tls")
        loop = asyncio.get_running_loop()
        local = None if secure else connect_locally(process)
        if local is not None:
            await loop.create_unix_connection(lambda: end, sock=local)
            return
        ssl, name = (self._ssl, "") if secure else (None, None)
        connecting = loop.create_connection(lambda: end, *split_address(door), ssl=ssl, server_hostname=name)
        transport, _ = await asyncio.wait_for(connecting, CONNECT)
        notice_silence(transport)

    async def close(self) -> None:
        """End all tunnels, and take no more."""
        self._closed = True
        for end in list(self._ends):
            end.pump.abort()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CONNECT + 1.0)


class _DoorEnd(asyncio.Protocol):
    """The scheduler's connection to a door, for one caller."""

    def __init__(self, comm: Comm, window: int) -> None:
        self.pump = Pump(comm, window, self._deliver, self._set_full)
        self._transport: asyncio.Transport | None = None
        self._paused = False
        #: Bytes that wait here for the door.
        self._waiting = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        self.pump.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.pump.close()

    def _set_full(self, full: bool) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        if full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _deliver(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)
        self._waiting += len(data)
        if not self._paused:
            self._acknowledge()

    def _acknowledge(self) -> None:
        # What the door did not take yet is not acknowledged, so that the caller stops.
        waiting, self._waiting = self._waiting, 0
        self.pump.consumed(waiting)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._acknowledge()

    def close(self) -> None:
        """The caller is gone: give the door the rest."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.close()
            asyncio.get_running_loop().call_later(LINGER, transport.abort)
