"""Asks doors whether they are there, over connections that stay for the next time."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from ..routing.dial import Ways, reach
from ..wire.connection import CallerConnection
from ..wire.frames import Frame
from ..wire.messages import Kind

__all__ = ["Knocks"]


class Knocks:
    """The controller's own connections to doors: opened with the first question, and kept.

    Parameters
    ----------
    secret : bytes
        The cluster's secret.
    ssl : SSLContext or None
        For doors with TLS.
    """

    def __init__(self, secret: bytes, ssl: Any) -> None:
        self._secret = secret
        self._ssl = ssl
        self._connections: dict[str, CallerConnection] = {}
        #: By process: who waits to hear from it.
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def answers(self, process: str, door: str, patience: float) -> bool:
        """Tell whether a door answers within ``patience`` seconds."""
        connection = self._connections.get(process)
        try:
            if connection is None or connection.closed:
                # It proves itself, which is an answer.
                await asyncio.wait_for(self._open(process, door), patience)
            else:
                waiting = self._waiting[process] = asyncio.get_running_loop().create_future()
                connection.send(Kind.PING, 0, b"")
                await asyncio.wait_for(waiting, patience)
        except (OSError, asyncio.TimeoutError):
            return False
        return True

    async def _open(self, process: str, door: str) -> None:
        make = functools.partial(CallerConnection, self._secret, process, functools.partial(self._heard, process))
        ssl = self._ssl if door.startswith("tls") else None
        connection = await reach(process, door, ssl, Ways(), make=make, on_lost=functools.partial(self._lost, process))
        self._connections[process] = connection

    def _lost(self, process: str, connection: CallerConnection) -> None:
        if self._connections.get(process) is connection:
            self.forget(process)

    def _heard(self, process: str, connection: CallerConnection, frame: Frame) -> None:
        waiting = self._waiting.pop(process, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def keep(self, processes: set[str]) -> None:
        """Close the connections to all others."""
        for process in self._connections.keys() - processes:
            self.forget(process)

    def forget(self, process: str) -> None:
        """A process is of no interest any more, or gone."""
        self._waiting.pop(process, None)
        connection = self._connections.pop(process, None)
        if connection is not None and not connection.closed:
            connection.close()

    def close(self) -> None:
        """Close all connections."""
        self.keep(set())
