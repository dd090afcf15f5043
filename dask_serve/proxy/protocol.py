"""HTTP/1.1 as uvicorn speaks it with httptools, plus what uvicorn leaves open.

Disconnects reach the application by a callback instead of a task that waits for them. Connections are limited in
number, the head of a request (its request line and headers) in size and time, its body in slowness. A connection can be
drained. What is refused here, before any application has seen it, is answered in the form of `errors`.
"""

from __future__ import annotations

import re
from asyncio import TimerHandle, Transport
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from ..config import HTTPOptions
from .complaints import Complaints
from .errors import error_answer, request_id_in
from .http10 import restrain
from .lingering import linger

__all__ = ["ANSWERED", "CONNECTION", "ProxyProtocol", "ProxyState", "Refused", "limited"]

#: Where the ASGI scope of a request holds its `ProxyProtocol`.
CONNECTION = "dask_serve.connection"
#: Where it holds the status that its connection has answered, and counted, while an application was at work on it.
ANSWERED = "dask_serve.answered"

# What happens for each request calls the base by name: before Python 3.12 super() makes an object each time.
_message_begin = HttpToolsProtocol.on_message_begin
_headers_complete = HttpToolsProtocol.on_headers_complete
_response_complete = HttpToolsProtocol.on_response_complete

# A name, an IPv4 address or one of IPv6 in brackets, and maybe a port; or nothing, where the target has no authority.
_valid_host = re.compile(
    rb"(\[[0-9A-Fa-f:.]+\]|([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(:[0-9]{0,5})?|"
).fullmatch


class Refused(NamedTuple):
    """A request that a connection has answered by itself; of one that is no HTTP method, path and version are ``-``."""

    client: Any
    method: str
    path: bytes
    version: str
    status: int
    request_id: str


class ProxyState(ServerState):
    """What all connections of a server share."""

    def __init__(self) -> None:
        super().__init__()
        #: While true each response says ``Connection: close``.
        self.draining = False
        #: What connections refused by themselves, by HTTP status.
        self.refused: Counter[int] = Counter()
        #: Told of each, for the access log.
        self.on_refused: Callable[[Refused], None] | None = None
        self.complaints = Complaints()


class HeadRefusedError(Exception):
    """Ends the parser; never leaves this module."""


class ProxyProtocol(HttpToolsProtocol):
    """One connection of a client.

    Nothing here costs a task or a timer per request: the only timer is one per connection, until its first head is
    complete, and one per head or body that comes in pieces.

    Attributes
    ----------
    on_disconnect : callable or None
        Set by the application for the request it runs; called without arguments when the client goes away before the
        response is complete. Cleared when the response is complete.
    """

    # uvicorn's own attributes nearly fill the dictionary that instances share their keys in; more than 30 names would
    # make every one of them slower to reach (half a microsecond a request).
    __slots__ = (
        "_body_bytes",
        "_body_timer",
        "_head_at_most",
        "_head_bytes",
        "_head_timer",
        "_host",
        "_in_head",
        "_refusal",
        "on_disconnect",
    )

    #: Most bytes of a request line and headers, together; above it 431.
    max_head_bytes = 64 * 1024
    #: Most headers of a request; above it 431.
    max_headers = 128
    #: Seconds for the head to arrive, from the connection or its first byte; after that 408.
    head_timeout = 30.0
    #: Seconds for the next `least_body` bytes of a body, or its end, to arrive; after that 408.
    body_timeout = 30.0
    least_body = 1024
    #: Connections of this process; one more gets 503.
    max_connections = 10_000
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
        # Of an earlier request on this connection: most clients send the same again.
        self._host = b""
        self._refusal: tuple[int, str, str] | None = None
        self._body_timer: TimerHandle | None = None
        self._body_bytes = 0

    # Events of the transport

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            text = f"{self.max_connections} connections are open already (max_connections)"
            self.refuse(503, "TooManyConnections", text)
            return
        self._head_timer = self.loop.call_later(self.head_timeout, self._head_timed_out)

    def data_received(self, data: bytes) -> None:
        self._head_at_most = self._head_bytes + len(data)
        # uvicorn's own way writes a line of log for each request that is not valid.
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse_invalid()
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._unsupported_upgrade_warning()
        if self._in_head:
            self._head_incomplete()
        elif (cycle := self.cycle) is not None and cycle.more_body:
            self._body_incomplete(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        in_progress = self.cycle is not None and not self.cycle.response_complete
        on_disconnect, self.on_disconnect = self.on_disconnect, None
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._cancel_head_timer()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
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
            text = f"the request has more than {self.max_headers} headers (max_headers)"
            self._refuse_head(431, "HeadTooLarge", text)
        # Nearly always the whole read is smaller than the limit and nothing has to be added up.
        if self._head_at_most > self.max_head_bytes and self._head_size() > self.max_head_bytes:
            self._refuse_head(431, "HeadTooLarge", self._too_large())
        self._check_host()
        _headers_complete(self)
        if self.scope["http_version"] != "1.1" and self.cycle is not None and self.cycle.scope is self.scope:
            restrain(self.cycle)
        if self.server_state.draining:
            self.drain()

    def on_chunk_header(self) -> None:
        # What comes behind the last chunk looks like headers to the parser, and must not become any of the request.
        if not self.parser.should_upgrade():
            self.headers = _NO_TRAILERS

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
                self.refuse(431, "HeadTooLarge", self._too_large())
                return
            # The read may have begun with the rest of an earlier body, and the parser does not tell where it ended:
            # count from the next read on.
            self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self._head_timed_out)

    def _too_large(self) -> str:
        return f"the request line and headers are larger than {self.max_head_bytes} bytes (head_limit)"

    def _check_host(self) -> None:
        host: bytes | None = None
        for name, value in self.headers:
            if name == b"host":
                if host is not None:
                    self._refuse_head(400, "BadRequest", "the request has more than one Host header")
                host = value
        if host is None:
            if self.parser.get_http_version() == "1.1":
                self._refuse_head(400, "BadRequest", "the request has no Host header, which HTTP/1.1 demands")
        elif host != self._host:
            if not _valid_host(host):
                self._refuse_head(400, "BadRequest", "the Host header is no name or address, with or without a port")
            self._host = host

    def _refuse_head(self, status: int, kind: str, text: str) -> None:
        # An exception is the only way to stop the parser.
        self._refusal = (status, kind, text)
        raise HeadRefusedError

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._in_head:
            self.refuse(408, "HeadTooSlow", f"the headers did not arrive within {self.head_timeout:g} s")
        else:
            # Not one byte came: nobody waits for an answer.
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Limits of the body

    def _body_incomplete(self, size: int) -> None:
        self._body_bytes += size
        if self._body_timer is None:
            self._body_bytes = 0
            self._body_timer = self.loop.call_later(self.body_timeout, self._body_timed_out, self.cycle)

    def _body_timed_out(self, cycle: Any) -> None:
        self._body_timer = None
        current = self.cycle
        if current is None or not current.more_body or self.transport.is_closing():
            return
        # An application that answers while it reads, or does not read, decides itself how long that may take.
        at_our_pace = self.flow.read_paused or (current.response_started and not current.response_complete)
        if current is not cycle or at_our_pace or self._body_bytes >= self.least_body:
            self._body_bytes = 0
            self._body_timer = self.loop.call_later(self.body_timeout, self._body_timed_out, current)
            return
        text = f"less than {self.least_body} bytes of the body arrived in {self.body_timeout:g} s"
        self._fail_body(408, "BodyTooSlow", text)

    def _fail_body(self, status: int, kind: str, text: str) -> None:
        """End a request whose body will never be complete."""
        cycle = self.cycle
        if cycle.response_started or self.pipeline:
            # Nothing can be said any more, or not before others have been answered.
            self.transport.close()
            return
        # What its application still does is for nobody, and is not counted again.
        cycle.scope[ANSWERED] = status  # type: ignore[literal-required]
        cycle.disconnected = True
        cycle.message_event.set()
        on_disconnect, self.on_disconnect = self.on_disconnect, None
        if on_disconnect is not None:
            on_disconnect()
        self._answer(status, kind, text)

    # Refusals

    def _refuse_invalid(self) -> None:
        self.server_state.complaints.note(self.client[0] if self.client else "")
        self.refuse(*(self._refusal or (400, "BadRequest", "this is not HTTP/1.1 as it should be")))

    def refuse(self, status: int, kind: str, text: str) -> None:
        """Answer with an error that no application has seen, and close the connection.

        With a response under way on the connection the error cannot be said; the connection then closes after it.
        """
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not self._in_head and self._refusal is None:
            self._fail_body(status, kind, text)
        elif cycle is not None and not cycle.response_complete:
            self._close_after_response()
        else:
            self._answer(status, kind, text)

    def _answer(self, status: int, kind: str, text: str) -> None:
        cycle = self.cycle
        # Where no request has begun the headers are those of the one before.
        is_own = self._in_head or self._refusal is not None or (cycle is not None and cycle.more_body)
        request = list(self.scope["headers"]) if is_own and self.scope is not None else []
        request_id = request_id_in(request)
        headers, body = error_answer((status, kind, text), request_id, request)
        head = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers, (b"connection", b"close")):
            head += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self.server_state.refused[status] += 1
        if self.server_state.on_refused is not None:
            refused = Refused(self.client, "-", b"-", "-", status, request_id)
            # What has no target may have no method either.
            if is_own and self.url:
                method, version = self.parser.get_method().decode(), self.parser.get_http_version()
                refused = refused._replace(method=method, path=self.url.partition(b"?")[0], version=version)
            self.server_state.on_refused(refused)
        # What else is in the read that brought us here must not be answered a second time.
        self._in_head = False
        self._cancel_head_timer()
        if cycle is not None:
            cycle.more_body = False
        self._linger()

    def _linger(self) -> None:
        self._unset_keepalive_if_required()
        linger(self.transport, self, self.linger)

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

    def _unsupported_upgrade_warning(self) -> None:
        # Answered as if it had not asked; what it sends after that is not HTTP, as far as the parser is concerned.
        if self.cycle is not None and not self.cycle.response_complete:
            self._close_after_response()

    def handle_websocket_upgrade(self) -> None:
        if self.server_state.draining:
            self.refuse(503, "Draining", "this proxy is stopping; connect again")
            return
        super().handle_websocket_upgrade()
        taken: Any = self.transport.get_protocol()
        if not getattr(taken, "handshake_initiated", True):
            # websockets reads heads more strictly than we do, and then says nothing, for ever.
            self.connections.discard(taken)
            self.connections.add(self)
            self.transport.set_protocol(self)
            self._refusal = (400, "BadRequest", "this is no beginning of a WebSocket: its method, or a header")
            self._refuse_invalid()


class _Trailers(list[tuple[bytes, bytes]]):
    """Takes fields and keeps none."""

    def append(self, field: tuple[bytes, bytes]) -> None:
        pass


_NO_TRAILERS = _Trailers()


def limited(options: HTTPOptions) -> type[ProxyProtocol]:
    """Return the protocol with the limits of ``options``."""
    limits = {
        "__slots__": (),
        "max_head_bytes": options.head_limit,
        "max_headers": options.max_headers,
        "head_timeout": options.head_timeout_s,
        "body_timeout": options.body_timeout_s,
        "max_connections": options.max_connections,
    }
    return type("LimitedProtocol", (ProxyProtocol,), limits)
