"""The way between event loops of one process, without any socket: for `dask_serve.testing`.

It looks to both protocols like a socket's transport: the same frames pass, after the same handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from .frames import Buffer

__all__ = ["SCHEME", "connect_within", "offer", "withdraw"]

#: Addresses of such doors begin with it; the incarnation follows.
SCHEME = "within://"

_offered: dict[str, tuple[asyncio.AbstractEventLoop, Callable[[], asyncio.Protocol]]] = {}


def offer(process: str, loop: asyncio.AbstractEventLoop, make: Callable[[], asyncio.Protocol]) -> str:
    """Let others of this process connect; ``make`` is called on ``loop`` for each. Returns the address."""
    _offered[process] = loop, make
    return SCHEME + process


def withdraw(process: str) -> None:
    """Nobody can connect any more."""
    _offered.pop(process, None)


async def connect_within(process: str, protocol: asyncio.Protocol) -> None:
    """Connect a protocol of the running loop to a door of this process.

    Raises
    ------
    ConnectionError
        There is no such door here.
    """
    offered = _offered.get(process)
    if offered is None:
        raise ConnectionRefusedError(f"there is no door of {process} in this process (any more)")
    there, make = offered
    here = _End(asyncio.get_running_loop())
    far = _End(there)
    here.peer, far.peer = far, here
    # The far side first: it must not be told of bytes before it is there.
    far.soon(lambda: far.begin(make()))
    here.begin(protocol)


class _End(asyncio.Transport):
    """One end. What its owner writes is handed to the other end's loop."""

    peer: _End

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": "this process"})
        self._loop = loop
        self._protocol: asyncio.Protocol | None = None
        self._closing = False

    def begin(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function on the loop of this end, from any thread; a loop that is closed has ended its side."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def write(self, data: Buffer) -> None:
        """Send bytes; they are copied if they could change."""
        if not self._closing:
            sent = bytes(data)
            self.peer.soon(lambda: self.peer._receive(sent))

    def _receive(self, data: bytes) -> None:
        if not self._closing and self._protocol is not None:
            self._protocol.data_received(data)

    def get_write_buffer_size(self) -> int:
        """Return 0: nothing waits here."""
        return 0

    def is_closing(self) -> bool:
        """Return whether it is closed."""
        return self._closing

    def can_write_eof(self) -> bool:
        """Return False: both directions end together."""
        return False

    def close(self) -> None:
        """Close it; what was written still arrives."""
        if not self._closing:
            self._closing = True
            self.soon(self._lose)
            self.peer.soon(self.peer.close)

    def abort(self) -> None:
        """Close it."""
        self.close()

    def _lose(self) -> None:
        if self._protocol is not None:
            self._protocol.connection_lost(None)
