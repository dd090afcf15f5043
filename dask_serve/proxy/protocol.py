"""HTTP/1.1 as uvicorn speaks it with httptools, plus what uvicorn leaves open.

Disconnects reach the application by a callback instead of a task that waits for them, the head of a request (its
request line and headers) has a size and a time limit, and a connection can be drained.
"""

from __future__ import annotations

from asyncio import Protocol, TimerHandle, Transport
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

__all__ = ["CONNECTION", "ProxyProtocol", "ProxyState"]

#: Where the ASGI scope of a request holds its `ProxyProtocol`.
CONNECTION = "dask_serve.connection"

# What happens for each request calls the base by name: before Python 3.12 super() makes an object each time.
_feed = HttpToolsProtocol.data_received
_message_begin = HttpToolsProtocol.on_message_begin
_headers_complete = HttpToolsProtocol.on_headers_complete
_response_complete = HttpToolsProtocol.on_response_complete


class ProxyState(ServerState):
    """What all connections of a server share."""

    def __init__(self) -> None:
        super().__init__()
        #: While true each response says ``Connection: close``.
        self.draining = False


class HeadTooLargeError(Exception):
    """Ends the parser; never leaves this module."""


class ProxyProtocol(HttpToolsProtocol):
    """One connection of a client.

    Nothing here costs a task or a timer per request: the only timer is one per connection, until its first head is
    complete, and one per head that comes in pieces.

    Attributes
    ----------
    on_disconnect : callable or None
        Set by the application for the request it runs; called without arguments when the client goes away before the
        response is complete. Cleared when the response is complete.
    """

    # uvicorn's own attributes nearly fill the dictionary that instances share their keys in; more than 30 names would
    # make every one of them slower to reach (half a microsecond a request).
    __slots__ = ("_head_at_most", "_head_bytes", "_head_timer", "_in_head", "_refusal", "on_disconnect")

    #: Most bytes of a request line and headers, together; above it 431.
    max_head_bytes = 64 * 1024
    #: Most headers of a request; above it 431.
    max_headers = 128
    #: Seconds for the head to arrive, from the connection or its first byte; after that 408.
    head_timeout = 30.0
    #: Seconds that a refused client may take to read why.
    linger = 1.0

    server_state: ProxyState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_disconnect: Callable[[], None] | None = None
        self._in_head = False
        # Bytes of an incomplete head in earlier reads, and the most its head can have with the present one.
        self._head_bytes = 0
        self._head_at_most = 0
        self._head_timer: TimerHandle | None = None
        self._refusal: tuple[int, str] | None = None

    # Events of the transport

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_timeout, self._head_timed_out)

    def data_received(self, data: bytes) -> None:
        self._head_at_most = self._head_bytes + len(data)
        _feed(self, data)
        if self._in_head:
            self._head_incomplete()

    def connection_lost(self, exc: Exception | None) -> None:
        in_progress = self.cycle is not None and not self.cycle.response_complete
        on_disconnect, self.on_disconnect = self.on_disconnect, None
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._cancel_head_timer()
        # The scope refers to this object: without this each connection would wait for the garbage collector.
        self.pipeline.clear()
        self.scope = self.cycle = cast("Any", None)
        if in_progress and on_disconnect is not None:
            on_disconnect()

    # Events of the parser

    def on_message_begin(self) -> None:
        _message_begin(self)
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._cancel_head_timer()
        if len(self.headers) > self.max_headers:
            self._refuse_head()
        # Nearly always the whole read is smaller than the limit and nothing has to be added up.
        if self._head_at_most > self.max_head_bytes and self._head_size() > self.max_head_bytes:
            self._refuse_head()
        _headers_complete(self)
        if self.server_state.draining:
            self.drain()

    def on_response_complete(self) -> None:
        self.on_disconnect = None
        _response_complete(self)

    # Limits of the head

    def _head_size(self) -> int:
        line = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n")
        return line + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) + len("\r\n")

    def _head_incomplete(self) -> None:
        if self.transport.is_closing():
            return
        self._head_bytes = self._head_at_most
        if self._head_at_most > self.max_head_bytes:
            if self.cycle is None or self._head_timer is not None:
                self.refuse(431, "Request headers are too large.")
                return
            # The read may have begun with the rest of an earlier body, and the parser does not tell where it ended:
            # count from the next read on.
            self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self._head_timed_out)

    def _refuse_head(self) -> None:
        # An exception is the only way to stop the parser; data_received turns it into send_400_response.
        self._refusal = (431, "Request headers are too large or too many.")
        raise HeadTooLargeError

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._in_head:
            self.refuse(408, "Request headers did not arrive in time.")
        else:
            # Not one byte came: nobody waits for an answer.
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        status, text = self._refusal or (400, msg)
        self.refuse(status, text)

    def refuse(self, status: int, text: str) -> None:
        """Answer with an error that no application has seen, and close the connection.

        With a response under way on the connection the error cannot be said; the connection then closes after it.
        """
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._close_after_response()
            return
        head = [STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            head += [name, b": ", value, b"\r\n"]
        head.append(b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n")
        head.append(b"content-length: %d\r\n\r\n" % len(text))
        self.transport.write(b"".join(head) + text.encode("ascii"))
        self._linger()

    def _linger(self) -> None:
        # Closing with unread bytes in the kernel resets the connection, and the client, still sending, would lose
        # the answer. So only our direction closes, and for a moment what comes is read and thrown away.
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.set_protocol(_Discard(self))
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.linger, self.timeout_keep_alive_handler)

    # Draining

    @property
    def idle(self) -> bool:
        """Whether no request is in progress, nor has the head of one begun."""
        return not self._in_head and (self.cycle is None or self.cycle.response_complete)

    def drain(self) -> None:
        """Close after the response in progress, if the client can still be told.

        After a response whose headers are out already the client may send another request at any moment, so closing
        then would fail it; the one after it carries ``Connection: close``.
        """
        if self.cycle is not None and not self.cycle.response_started:
            self._close_after_response()

    def _close_after_response(self) -> None:
        cycle = self.cycle
        if cycle.keep_alive:
            cycle.keep_alive = False
            # uvicorn says so by itself since 0.53 only, and takes this for an answer that says it already.
            cycle.default_headers = [*cycle.default_headers, (b"connection", b"close")]

    def handle_websocket_upgrade(self) -> None:
        if self.server_state.draining:
            self.refuse(503, "This server is stopping.")
        else:
            super().handle_websocket_upgrade()


class _Discard(Protocol):
    """Takes the place of a `ProxyProtocol` that refused its client."""

    def __init__(self, refused: ProxyProtocol) -> None:
        self._refused = refused

    def connection_lost(self, exc: Exception | None) -> None:
        self._refused.connection_lost(exc)
