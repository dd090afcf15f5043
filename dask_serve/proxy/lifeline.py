"""The pipe between the controller and a proxy process: frames, and both ends of it.

A frame is the length of its payload (4 bytes, little-endian), its kind (1 byte) and the payload. The controller sends
options, tables, signs of life and the order to drain; the proxy sends that it is ready, or why not, and statistics. The
end of the file is news too: at the proxy that its controller died, at the controller that the proxy did.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import cast

__all__ = [
    "APPLIED",
    "BACKLOGS",
    "DOORS",
    "DRAIN",
    "LOGS",
    "OPTIONS",
    "PING",
    "READY",
    "REFUSED",
    "STATS",
    "TABLE",
    "Frames",
    "Lifeline",
    "checksum",
    "connect",
    "encode",
]

#: From the controller, before the options: certificates for the doors, where the cluster has TLS.
DOORS = b"K"
OPTIONS = b"O"
TABLE = b"T"
DRAIN = b"D"
READY = b"R"
STATS = b"S"
#: From the controller, every second: it is there.
PING = b"P"
#: From the proxy: it cannot serve with these options, and why, in words.
REFUSED = b"X"
#: From the proxy: it routes by the table with this checksum (`checksum`) from now on.
APPLIED = b"A"
#: From the proxy: how many requests wait (`dask_serve.routing.backlogs.Backlogs`).
BACKLOGS = b"B"
#: From the proxy: its latest log records (`dask_serve.records.Records`).
LOGS = b"L"

#: More than any table can have: a length above it means that the stream is broken.
MAX_PAYLOAD = 1 << 28

_HEADER = struct.Struct("<Ic")


def checksum(table: bytes) -> bytes:
    """Tell tables apart: a slow proxy may have skipped some."""
    return zlib.crc32(table).to_bytes(4, "little")


def encode(kind: bytes, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return _HEADER.pack(len(payload), kind) + payload


class Frames:
    """Makes frames of bytes that arrive cut anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the kind and payload of each frame that is complete with ``data``.

        Raises
        ------
        ValueError
            A length that no frame can have.
        """
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _HEADER.size:
            length, kind = _HEADER.unpack_from(buffer)
            if length > MAX_PAYLOAD:
                raise ValueError(f"a frame of {length} bytes on the lifeline")
            end = _HEADER.size + length
            if len(buffer) < end:
                return
            payload = bytes(buffer[_HEADER.size : end])
            del buffer[:end]
            yield kind, payload


class Lifeline(asyncio.Protocol):
    """One end of the pipe.

    Parameters
    ----------
    on_frame : callable
        Called with the kind and payload of each frame.
    on_eof : callable
        Called once, when the other end is gone.
    """

    def __init__(self, on_frame: Callable[[bytes, bytes], None], on_eof: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_eof = on_eof
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._waiting: dict[bytes, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            frames = list(self._frames.feed(data))
        except ValueError:
            self.close()
            return
        for kind, payload in frames:
            self._on_frame(kind, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_eof()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        while self._waiting and not self._paused:
            kind = next(iter(self._waiting))
            self.send(kind, self._waiting.pop(kind))

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a frame now; nothing happens when the other end is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(kind, payload))

    def send_latest(self, kind: bytes, payload: bytes) -> None:
        """Send a frame that replaces earlier ones of its kind; of those a slow reader gets only the last."""
        if self._paused:
            self._waiting[kind] = payload
        else:
            self.send(kind, payload)

    def close(self) -> None:
        """Close this end; `on_eof` follows."""
        if self._transport is not None:
            self._transport.close()


async def connect(
    sock: socket.socket, on_frame: Callable[[bytes, bytes], None], on_eof: Callable[[], None]
) -> Lifeline:
    """Take over one socket of a pair as an end of the lifeline, in the running loop."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    _, lifeline = await loop.create_unix_connection(lambda: Lifeline(on_frame, on_eof), sock=sock)
    return lifeline
