"""An end that reaches a client which is still sending.

Closing with unread bytes in the kernel resets the connection, and the client would lose what it was told last. So only
our direction closes, and for a moment what comes is read and thrown away.
"""

from __future__ import annotations

from asyncio import Protocol, Transport, get_running_loop

__all__ = ["linger"]


def linger(transport: Transport, protocol: Protocol, seconds: float) -> None:
    """Close a connection, at the latest after so many seconds; ``protocol`` hears of its end and of nothing else."""
    if transport.is_closing():
        return
    if not transport.can_write_eof():
        # TLS.
        transport.close()
        return
    transport.write_eof()
    transport.set_protocol(_Discard(transport, protocol, seconds))


class _Discard(Protocol):
    def __init__(self, transport: Transport, protocol: Protocol, seconds: float) -> None:
        self._protocol = protocol
        self._timer = get_running_loop().call_later(seconds, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._protocol.connection_lost(exc)
