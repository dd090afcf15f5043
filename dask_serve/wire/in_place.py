"""Receiving a large body straight into its memory, without the bytes objects in between."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["InPlace"]

#: Room for what comes behind the body, where the transport does not say how much that is.
_BEHIND = 64 * 1024


class InPlace(asyncio.BufferedProtocol):
    """Stands in for a connection at its transport while a large body comes.

    Small frames are cheaper as bytes objects, which is why the connection itself is a protocol of the other kind.
    All that a transport tells other than bytes goes to the connection.

    Parameters
    ----------
    connection : Connection
        Its reader has a large body under way.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._behind: memoryview | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        large = self._connection.large
        if large is not None:
            self._behind = None
            return large.room()
        # TLS transports of Python 3.10 hand out all of one read to the protocol that they began with.
        self._behind = memoryview(bytearray(sizehint if sizehint > 0 else _BEHIND))
        return self._behind

    def buffer_updated(self, nbytes: int) -> None:
        connection = self._connection
        if self._behind is not None:
            connection.data_received(bytes(self._behind[:nbytes]))
            return
        large = connection.large
        if large is None:  # the connection has ended
            return
        large.missing -= nbytes
        if large.missing:
            connection.heard = time.monotonic()
        else:
            # First, because handling the frame may end the connection, or begin the next large body.
            cast("asyncio.Transport", connection.transport).set_protocol(connection)
            connection.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
