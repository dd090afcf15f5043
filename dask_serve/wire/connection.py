"""One authenticated, multiplexed connection: frames in both directions, writes coalesced per loop tick."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from . import auth
from .frames import MAX_BODY, Buffer, Frame, FrameError, FrameReader, LargeBody, encode_frame
from .in_place import InPlace
from .local import widen
from .messages import VERSIONS, Hello, Kind, Proof, decode_hello, decode_proof, encode

__all__ = ["HANDSHAKE_TIMEOUT", "CallerConnection", "Connection", "DoorConnection"]

logger = logging.getLogger("dask_serve.wire")

#: Seconds a peer has to prove itself.
HANDSHAKE_TIMEOUT = 5.0
#: Until it has, it may send no larger frame than this.
_STRANGER_LIMIT = 4096
#: Buffers at least this long are written by themselves, all smaller ones are joined.
_JOIN_BELOW = 32 * 1024
#: What is missing of a body is received in place if it is more than one read brings anyhow.
_IN_PLACE_FROM = 256 * 1024
#: Pieces of large buffers for transports that copy what they cannot send at once; about what a Unix socket takes.
_PIECE = 416 * 1024
#: Later ones keep references to what waits.
_ASYNCIO_COPIES = sys.version_info < (3, 12)

#: What malformed frames and headers raise; msgspec lets the last two through as they are.
_MALFORMED = (FrameError, msgspec.DecodeError, UnicodeDecodeError, RecursionError)

FrameHandler = Callable[[Any, Frame], None]


class Connection(asyncio.Protocol):
    """What both ends share; `CallerConnection` and `DoorConnection` differ in the handshake.

    Attributes
    ----------
    ready : bool
        The peer has proved itself. Frames sent earlier wait until then.
    closed : bool
        Nothing more will come or go.
    heard : float
        Monotonic time of the last byte from the peer.
    drained : float
        Monotonic time when enough of what was written had left for more to be written.
    """

    def __init__(self, secret: bytes, on_frame: FrameHandler, on_lost: Callable[[Any], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.ready = False
        self.closed = False
        self.paused = False
        self.heard = self.drained = self._since = time.monotonic()
        self.peer: object = None
        self._secret = secret
        self._nonce = auth.new_nonce()
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._reader = FrameReader(_STRANGER_LIMIT)
        self._out: list[Buffer] = []
        self._flush_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        #: How this transport takes large buffers, and whether it can receive in place.
        self._piecewise = self._in_place = False

    # ------------------------------------------------------------------ sending

    def send(self, kind: int, request: int, header: bytes, parts: Sequence[Buffer] = ()) -> None:
        """Queue one frame; all frames of one loop tick leave in one write. A closed connection drops it."""
        if self.closed:
            return
        encode_frame(kind, request, header, parts, self._out)
        if not self._flush_is_due and self.ready and not self.paused:
            self._flush_is_due = True
            self.loop.call_soon(self._flush)

    def flush(self) -> None:
        """Write now what waits for the end of the tick."""
        if self.ready and not self.paused:
            self._flush()

    def _flush(self) -> None:
        self._flush_is_due = False
        out = self._out
        if self.transport is None or self.closed or not out:
            return
        self._out = []
        if len(out) == 1 and not (self._piecewise and len(out[0]) >= _JOIN_BELOW):
            self.transport.write(out[0])
            return
        start = 0
        for i, buffer in enumerate(out):
            if len(buffer) >= _JOIN_BELOW:
                if i > start:
                    self.transport.write(b"".join(out[start:i]))
                start = i + 1
                if not self._piecewise:
                    self.transport.write(buffer)
                elif rest := self._write_pieces(memoryview(buffer)):
                    self._out[:0] = [rest, *out[start:]]
                    return
        if start < len(out):
            self.transport.write(b"".join(out[start:]) if start else b"".join(out))

    def _write_pieces(self, view: memoryview) -> memoryview:
        """Write as much of a large buffer as may be written now, and return the rest; `resume_writing` goes on."""
        transport = self.transport
        assert transport is not None
        while view and not self.paused:
            if transport.is_closing():
                # It is lost, and would complain about each piece.
                return view[:0]
            transport.write(view[:_PIECE])
            view = view[_PIECE:]
        return view

    @property
    def answered(self) -> bool:
        """The peer has sent something."""
        return self.heard > self._since

    @property
    def unsent(self) -> int:
        """Bytes that were written and have not left."""
        return 0 if self.transport is None or self.closed else self.transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.drained = time.monotonic()
        self._flush()

    # ------------------------------------------------------------------ receiving

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        try:
            for frame in self._reader.feed(data):
                if self.closed:
                    return
                if self.ready:
                    self._on_frame(self, frame)
                else:
                    self._handshake(frame)
        except _MALFORMED as error:
            self._refuse(str(error))
        except Exception:
            # A defect of ours: what it leaves behind is not known, so the connection ends, and with it nothing hangs.
            logger.exception("A frame from %s could not be handled", self.peer)
            self.abort()
        if self._reader.large is not None and self._in_place and not self.closed:
            self._receive_in_place(self._reader.large)

    def _receive_in_place(self, large: LargeBody) -> None:
        if large.missing > _IN_PLACE_FROM:
            assert self.transport is not None
            self.transport.set_protocol(InPlace(self))

    @property
    def large(self) -> LargeBody | None:
        """The large body that comes now."""
        return self._reader.large

    def _handshake(self, frame: Frame) -> None:
        raise NotImplementedError

    def _welcome(self) -> None:
        """The peer has proved itself."""
        self.ready = True
        self._reader.limit = MAX_BODY
        if self._timer is not None:
            self._timer.cancel()
        self._flush()

    def _refuse(self, why: str) -> None:
        if self.closed:
            return
        logger.warning("Closed the connection with %s: %s", self.peer, why)
        self.abort()

    # ------------------------------------------------------------------ life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self.peer = transport.get_extra_info("peername")
        sock = transport.get_extra_info("socket")
        # A tunnel has none. It copies nothing, and keeps its protocol.
        self._in_place = sock is not None
        if sock is not None:
            widen(sock)
        self._piecewise = transport.get_extra_info("ssl_object") is not None or (
            self._in_place and _ASYNCIO_COPIES and isinstance(self.loop, asyncio.SelectorEventLoop)
        )
        self._timer = self.loop.call_later(HANDSHAKE_TIMEOUT, self._refuse, "it did not prove itself in time")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        was_closed, self.closed = self.closed, True
        self._out.clear()
        self._reader.large = None
        if not was_closed:
            self._on_lost(self)

    def abort(self) -> None:
        """Close at once; what was queued is dropped, and ``on_lost`` is called."""
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            self.transport.abort()
        self._on_lost(self)

    def close(self) -> None:
        """Close after what was queued is written; ``on_lost`` follows."""
        if not self.closed and self.transport is not None:
            # Nobody tells a closed transport's protocol to go on.
            self._piecewise = False
            if self.ready:
                self._flush()
            self.transport.close()


class CallerConnection(Connection):
    """The end that dialled.

    Parameters
    ----------
    process : str
        The incarnation that must answer; another one is refused.
    on_ready : callable
        Called once the door has proved itself.
    """

    def __init__(
        self,
        secret: bytes,
        process: str,
        on_frame: FrameHandler,
        on_ready: Callable[[Any], None],
        on_lost: Callable[[Any], None],
    ) -> None:
        super().__init__(secret, on_frame, on_lost)
        self._process = process
        self._on_ready = on_ready

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        hello: list[Buffer] = []
        encode_frame(Kind.HELLO, 0, encode(Hello(list(VERSIONS), self._nonce)), (), hello)
        self.transport.write(hello[0])

    def take_over(self, other: CallerConnection) -> None:
        """Send what waits in another connection, which never was ready."""
        self._out, other._out = other._out + self._out, []
        self.flush()

    def _handshake(self, frame: Frame) -> None:
        if frame.kind != Kind.HELLO:
            self._refuse(f"it began with a frame of kind {frame.kind}")
            return
        hello = decode_hello(frame.header)
        if hello.process != self._process:
            self._refuse(f"process {hello.process[:80]!r} answered where {self._process} was expected")
            return
        if len(hello.nonce) != auth.NONCE_SIZE or not auth.same(
            hello.proof, auth.door_proof(self._secret, self._nonce, hello.nonce, hello.process)
        ):
            self._refuse("it does not know the cluster's secret")
            return
        if hello.versions[:1] not in [[version] for version in VERSIONS]:
            self._refuse(f"it speaks versions {hello.versions[:9]} of the wire, this side {list(VERSIONS)}")
            return
        assert self.transport is not None
        proof: list[Buffer] = []
        encode_frame(Kind.PROOF, 0, encode(Proof(auth.caller_proof(self._secret, self._nonce, hello.nonce))), (), proof)
        self.transport.write(proof[0])
        self._welcome()
        self._on_ready(self)


class DoorConnection(Connection):
    """The end that listened.

    Its frames may leave from another thread: see `write_from_thread`.

    Parameters
    ----------
    process : str
        This process's incarnation.
    """

    def __init__(self, secret: bytes, process: str, on_frame: FrameHandler, on_lost: Callable[[Any], None]) -> None:
        super().__init__(secret, on_frame, on_lost)
        self._process = process
        self._caller_nonce = b""
        # Reentrant: a TLS transport may ask for more while it is given something.
        self._writing = threading.RLock()
        # A descriptor of our own for the same connection: the loop may close its one while another thread writes.
        self._socket: socket.socket | None = None

    def write_from_thread(self, frames: Sequence[Buffer], size: int) -> bool:
        """Write frames from a thread that is not the loop's, if that can be done at once.

        Handing them to the loop costs a wake-up, which is two thirds of the latency of a lone call. Where something
        else waits to be written, the loop joins both.

        Parameters
        ----------
        frames : sequence of bytes-like
            What `encode_frame` made.
        size : int
            Bytes of all of them.

        Returns
        -------
        bool
            False: nothing was written; hand the frames to the loop.
        """
        if size >= _JOIN_BELOW or not self._writing.acquire(blocking=False):
            return False
        try:
            transport = self.transport
            if self._socket is None or transport is None or self.closed or self._out or self.paused:
                return False
            if transport.get_write_buffer_size():
                return False
            data = b"".join(frames)
            try:
                written = self._socket.send(data)
            except BlockingIOError:
                return False
            except OSError:
                # The loop hears of it too, and ends the connection.
                return True
            if written < size:
                self._out.insert(0, data[written:])
                self.loop.call_soon_threadsafe(self._flush)
            return True
        finally:
            self._writing.release()

    def _flush(self) -> None:
        with self._writing:
            super()._flush()

    def _welcome(self) -> None:
        super()._welcome()
        assert self.transport is not None
        sock = self.transport.get_extra_info("socket")
        if sock is not None and self.transport.get_extra_info("ssl_object") is None:
            self._socket = socket.socket(fileno=os.dup(sock.fileno()))

    def connection_lost(self, exc: Exception | None) -> None:
        self._close_socket()
        super().connection_lost(exc)

    def abort(self) -> None:
        self._close_socket()
        super().abort()

    def _close_socket(self) -> None:
        with self._writing:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _handshake(self, frame: Frame) -> None:
        if frame.kind == Kind.HELLO and not self._caller_nonce:
            hello = decode_hello(frame.header)
            version = next((v for v in VERSIONS if v in hello.versions), None)
            if version is None or len(hello.nonce) != auth.NONCE_SIZE:
                self._refuse(f"it speaks versions {hello.versions[:9]} of the wire, this side {list(VERSIONS)}")
                return
            self._caller_nonce = hello.nonce
            proof = auth.door_proof(self._secret, hello.nonce, self._nonce, self._process)
            answer: list[Buffer] = []
            encode_frame(Kind.HELLO, 0, encode(Hello([version], self._nonce, self._process, proof)), (), answer)
            assert self.transport is not None
            self.transport.write(answer[0])
        elif frame.kind == Kind.PROOF and self._caller_nonce:
            expected = auth.caller_proof(self._secret, self._caller_nonce, self._nonce)
            if not auth.same(decode_proof(frame.header).proof, expected):
                self._refuse("it does not know the cluster's secret")
                return
            self._welcome()
        else:
            self._refuse(f"it sent a frame of kind {frame.kind} before it proved itself")
