"""The hot path: one HTTP request from its head to the last byte of its answer.

Routed by longest prefix, given an id and a deadline, put to the deployment's router, and answered with what the replica
rendered.
No task, no queue and no pickle is made on the way; a client that goes away cancels its request by a callback.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from .. import exceptions
from ..config import HTTPOptions
from ..exceptions import ReplicaLostError, RequestCancelledError, RequestError
from ..policy.routes import Routes
from ..routing.calls import Outgoing
from ..routing.fabric import Fabric
from ..routing.router import Router
from ..routing.table import RouteEntry, Table
from ..wire.frames import Buffer
from ..wire.messages import LEAST, WINDOW_STEP, Chunk, Failure, HttpHead, Reply
from .protocol import CONNECTION, ProxyProtocol

__all__ = ["Forwarder", "HttpCall"]

logger = logging.getLogger("dask_serve.proxy")

#: Requests that may wait for a deployment at one proxy before more are refused, unless the deployment says otherwise.
MAX_QUEUED = 10_000
#: Seconds that a streamed answer may be silent.
STREAM_IDLE = 60.0
#: Seconds that a client may take to read what was sent before its connection is cut off.
LINGER = 5.0
#: A replica lost before the first byte: methods that may be run twice are sent once more.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Upper bounds of the latency histogram, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

#: Headers that say how the body is framed, or what becomes of the connection.
_SPECIAL = frozenset({b"connection", b"transfer-encoding"})
#: Bodies below this are copied behind their head.
_JOIN_BELOW = 64 * 1024
_ID_HEADER = b"x-request-id"
_valid_id = re.compile(rb"[!-~]{1,128}").fullmatch


#: Status, name and text of an error of ours.
Refusal = tuple[int, str, str]


class HttpCall(Outgoing):
    """A request on its way, and what has come of its answer."""

    __slots__ = ("_loop", "chunks", "ended", "error", "head", "status", "waiter", "whole")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__("__call__", parts, request_id, head)
        self._loop = loop
        self.status = 0
        self.head: list[tuple[bytes, bytes]] = []
        self.chunks: deque[Buffer] = deque()
        #: The answer's body has come; after `ended` nothing follows, else background tasks still run in the replica.
        self.whole = False
        self.ended = False
        #: What went wrong.
        self.error: Refusal | None = None
        self.waiter: asyncio.Future[None] = loop.create_future()

    async def more(self, timeout: float) -> None:
        """Wait until another part of the answer has come."""
        if not self.chunks and not self.whole and not self.ended:
            self.waiter = self._loop.create_future()
            await asyncio.wait_for(self.waiter, timeout)

    def _wake(self) -> None:
        if not self.waiter.done():
            self.waiter.set_result(None)

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        if not self.status:
            self.status = reply.status
            self.head = reply.headers
        self.chunks.extend(parts)
        self.ended = True
        self._wake()

    def on_chunk(self, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        if chunk.status:
            self.status = chunk.status
            self.head = chunk.headers
            # A part of the answer may be with the client already.
            self.retries = 0
            # The deadline is for the first byte.
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
        elif not parts:
            self.whole = True
        self.chunks.extend(parts)
        self._wake()

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        if failure.error:
            kind = getattr(exceptions, failure.error, RequestError)
            if kind is RequestCancelledError:
                # Not by the client, whose cancellation is answered on this side.
                text = "the replica gave the request up: it was stopped, or its code raised CancelledError"
                self._end(ReplicaLostError.status, ReplicaLostError.__name__, text)
            else:
                self._end(kind.status, failure.error, failure.message)
        else:
            # The traceback is in the replica's log, under the request's id; no client sees it.
            self._end(500, "InternalServerError", "the deployment raised an exception")

    def fail(self, error: RequestError) -> None:
        self._end(error.status, type(error).__name__, str(error))

    def _end(self, status: int, name: str, text: str) -> None:
        self.error = (status, name, text)
        self.ended = True
        self._wake()


class Forwarder:
    """Serves the requests of all applications.

    Attributes
    ----------
    statuses : Counter
        Answers by HTTP status; 499 where the client went away first.
    buckets : list of int
        Answers by latency, cumulative only when rendered; the last one is above all bounds.
    seconds : float
        Sum of the latencies.
    """

    def __init__(self, fabric: Fabric, options: HTTPOptions) -> None:
        self.statuses: Counter[int] = Counter()
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self._fabric = fabric
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._table: Table | None = None
        self._routes: Routes[RouteEntry] = Routes()
        self._id_prefix = f"{os.urandom(6).hex()}-"
        self._numbers = itertools.count()

    @property
    def routes(self) -> Routes[RouteEntry]:
        """Return the routes of the present table."""
        table = self._fabric.table
        if table is not self._table:
            self._table = table
            self._routes = Routes(table.routes if table is not None else ())
        return self._routes

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = monotonic()
        request_id, timeout, refusal = self._read_head(scope)
        route = self.routes.match(scope["path"])
        if refusal is None and route is None:
            refusal = (404, "NotFound", self._unknown(scope["path"]))
        if refusal is None:
            # The parser is usually at the end of the request already: no need to ask for messages.
            cycle = send.__self__  # type: ignore[attr-defined]
            body = await self._body(receive) if cycle.more_body or cycle.disconnected else bytes(cycle.body)
            if body is None:
                self._count(499, began)
                return
            if len(body) > self._options.body_limit:
                text = f"the body is larger than {self._options.body_limit} bytes (body_limit of serve.start)"
                refusal = (413, "BodyTooLarge", text)
        if refusal is not None:
            await self._refuse(send, began, request_id, refusal)
            return
        assert route is not None
        call = HttpCall((body,) if body else (), request_id, _http_head(scope, route.prefix), self._loop)
        if scope["method"] in _SAFE:
            call.retries = 1
        router = self._fabric.router(route.deployment)
        connection: ProxyProtocol = scope[CONNECTION]
        connection.on_disconnect = lambda: router.cancel(call)
        self._submit(router, call, timeout)
        if not call.waiter.done():
            try:
                await call.waiter
            except asyncio.CancelledError:
                router.cancel(call)
                raise
        if call.error is not None:
            await self._refuse(send, began, request_id, call.error)
            return
        headers = call.head
        if _ID_HEADER not in [name for name, _ in headers]:
            headers.append((_ID_HEADER, request_id.encode()))
        if call.ended:
            chunks = call.chunks
            # A short stream may have come as a whole.
            await _respond(send, call.status, headers, chunks[0] if len(chunks) == 1 else b"".join(chunks))
            self._count(call.status, began)
        else:
            await send({"type": "http.response.start", "status": call.status, "headers": headers})
            await self._stream(call, router, scope, send, began)

    def _read_head(self, scope: Scope) -> tuple[str, float | None, Refusal | None]:
        """Return the request's id, its own deadline in seconds, and why it cannot be served."""
        request_id: str | None = None
        timeout: float | None = None
        refusal = None
        for name, value in scope["headers"]:
            if name == _ID_HEADER:
                request_id = value.decode() if _valid_id(value) else None
            elif name == b"x-request-timeout-seconds":
                timeout = _timeout(value)
                if timeout is None:
                    given = value[:40].decode("latin-1")
                    text = f"the header X-Request-Timeout-Seconds is {given!r}: give a number of seconds above 0"
                    refusal = (400, "BadRequest", text)
        if request_id is None:
            request_id = f"{self._id_prefix}{next(self._numbers):x}"
        return request_id, timeout, refusal

    def _submit(self, router: Router, call: HttpCall, timeout: float | None) -> None:
        entry = router.entry
        limit = MAX_QUEUED
        if entry is not None:
            if entry.max_queued_requests is not None:
                limit = entry.max_queued_requests
            if timeout is None:
                timeout = entry.request_timeout_s
        router.submit(call, self._options.request_timeout_s if timeout is None else timeout, limit)

    async def _stream(self, call: HttpCall, router: Router, scope: Scope, send: Send, began: float) -> None:
        """Pass on a streamed answer; the replica sends no more than its window ahead of what the client has read."""
        status = call.status
        try:
            if scope["method"] != "HEAD":
                await self._pass_on(call, send)
            if call.error is not None:
                status = call.error[0]
                if status != RequestCancelledError.status:
                    logger.warning("Request %s: its stream ended early: %s", call.request_id, call.error[2])
                # The head is out: to end without the last chunk is the only way left to say that it failed.
                await self._cut_off(scope[CONNECTION])
            else:
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._count(status, began)
            # When the body is whole its background tasks go on.
            if not call.whole:
                router.cancel(call)

    async def _pass_on(self, call: HttpCall, send: Send) -> None:
        """Send the chunks as they come, until the body is whole or has failed."""
        consumed = 0
        while True:
            while call.chunks:
                chunk = bytes(call.chunks.popleft())
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                consumed += max(LEAST, len(chunk))
                if consumed >= WINDOW_STEP and not call.ended:
                    call.target[1].link.widen(call.number, consumed)
                    consumed = 0
            if call.whole or call.ended:
                return
            try:
                await call.more(STREAM_IDLE)
            except asyncio.TimeoutError:
                call.error = (504, "RequestTimeoutError", f"nothing came for {STREAM_IDLE:g} s")
                return

    async def _cut_off(self, connection: ProxyProtocol) -> None:
        """Close a connection without the end of the answer, once what was sent is read."""
        if connection.transport.is_closing():
            return
        closed = self._loop.create_future()
        connection.on_disconnect = partial(closed.set_result, None)
        connection.transport.close()
        try:
            await asyncio.wait_for(closed, LINGER)
        except asyncio.TimeoutError:
            connection.on_disconnect = None
            connection.transport.abort()
            await asyncio.sleep(0)

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the whole body, or a little more than may be; None when the client went away before its end."""
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body: bytes = message["body"]
        if not message["more_body"]:
            return body
        pieces = [body]
        size = len(body)
        while message["more_body"] and size <= self._options.body_limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message["body"])
            size += len(message["body"])
        return b"".join(pieces)

    async def _refuse(self, send: Send, began: float, request_id: str, refusal: Refusal) -> None:
        """Answer with an error of ours."""
        status, name, text = refusal
        self._count(status, began)
        body = msgspec.json.encode({"error": name, "message": text, "request_id": request_id})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (_ID_HEADER, request_id.encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await _respond(send, status, headers, body)

    def _unknown(self, path: str) -> str:
        known = ", ".join(sorted(entry.prefix for entry in self.routes.entries)) or "none yet"
        return f"no application answers {path}; known route prefixes: {known}"

    def _count(self, status: int, began: float) -> None:
        seconds = monotonic() - began
        self.statuses[status] += 1
        self.seconds += seconds
        self.buckets[bisect_left(BUCKETS, seconds)] += 1


def _http_head(scope: Scope, prefix: str) -> HttpHead:
    return HttpHead(
        scope["method"],
        scope["path"],
        "" if prefix == "/" else prefix,
        scope["query_string"],
        scope["headers"],
        scope["scheme"],
        scope["http_version"],
        scope["client"],
        scope["server"],
    )


async def _respond(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> None:
    """Send a whole answer: in one write where nothing is special about it; uvicorn's ``send`` makes two."""
    cycle = send.__self__  # type: ignore[attr-defined]
    length = b""
    usual = cycle.scope["method"] != "HEAD" and not (
        cycle.disconnected or cycle.response_started or cycle.flow.write_paused
    )
    out: list[Buffer] = [STATUS_LINE[status]]
    for name, value in (*cycle.default_headers, *headers):
        out += (name, b": ", value, b"\r\n")
        if name == b"content-length":
            length = value
        elif name in _SPECIAL:
            usual = False
    if not usual or length != b"%d" % len(body):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(body)})
        return
    out.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    if len(body) < _JOIN_BELOW:
        out.append(body)
        cycle.transport.write(b"".join(out))
    else:
        cycle.transport.write(b"".join(out))
        cycle.transport.write(body)
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()


def _timeout(value: bytes) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if seconds > 0 and math.isfinite(seconds) else None
