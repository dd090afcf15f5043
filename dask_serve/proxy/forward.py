"""The hot path: one HTTP request from its head to the last byte of its answer.

Routed by longest prefix, given an id and a deadline, put to the deployment's router, and answered with what the replica rendered.
No task, no queue and no pickle is made on the way; a client that goes away cancels its request by a callback.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
from collections import Counter, deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from .. import exceptions
from ..config import HTTPOptions
from ..exceptions import RequestError
from ..policy.routes import Routes
from ..routing.calls import Outgoing
from ..routing.fabric import Fabric
from ..routing.table import RouteEntry, Table
from ..wire.frames import Buffer
from ..wire.messages import Chunk, Failure, HttpHead, Reply
from .protocol import CONNECTION

__all__ = ["Forwarder", "HttpCall"]

#: Requests that may wait for a deployment at one proxy before more are refused, unless the deployment says otherwise.
MAX_QUEUED = 10_000
#: Seconds that a streamed answer may be silent.
STREAM_IDLE = 60.0
#: A replica lost before the first byte: methods that may be run twice are sent once more.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
#: Upper bounds of the latency histogram, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_valid_id = re.compile(rb"[!-~]{1,128}").fullmatch


class HttpCall(Outgoing):
    """A request on its way, and what has come of its answer."""

    __slots__ = ("_loop", "chunks", "ended", "error", "head", "status", "waiter")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__("__call__", parts, request_id, head)
        self._loop = loop
        self.status = 0
        self.head: list[tuple[bytes, bytes]] = []
        self.chunks: deque[Buffer] = deque()
        self.ended = False
        #: Status, name and text of what went wrong.
        self.error: tuple[int, str, str] | None = None
        self.waiter: asyncio.Future[None] = loop.create_future()

    async def more(self, timeout: float) -> None:
        """Wait until another part of the answer has come."""
        if not self.chunks and not self.ended:
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
            # The deadline is for the first byte.
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
        self.chunks.extend(parts)
        self._wake()

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        if failure.error:
            kind = getattr(exceptions, failure.error, RequestError)
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
        self.draining = False
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
        given_id: bytes | None = None
        timeout: float | None = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given_id = value if _valid_id(value) else None
            elif name == b"x-request-timeout-seconds":
                timeout = _timeout(value)
                if timeout is None:
                    text = f"the header X-Request-Timeout-Seconds is {value[:40]!r}: give a number of seconds above 0"
                    await self._refuse(send, began, self._new_id(), 400, "BadRequest", text)
                    return
        request_id = self._new_id() if given_id is None else given_id.decode()
        path = scope["path"]
        route = self.routes.match(path)
        if route is None:
            await self._refuse(send, began, request_id, 404, "NotFound", self._unknown(path))
            return
        body = await self._body(receive)
        if body is None:
            text = f"the body is larger than {self._options.body_limit} bytes (body_limit of serve.start)"
            await self._refuse(send, began, request_id, 413, "BodyTooLarge", text)
            return
        router = self._fabric.router(route.deployment)
        entry = router.entry
        limit = MAX_QUEUED if entry is None or entry.max_queued_requests is None else entry.max_queued_requests
        if timeout is None:
            timeout = entry.request_timeout_s if entry is not None else None
            if timeout is None:
                timeout = self._options.request_timeout_s
        method = scope["method"]
        head = HttpHead(
            method,
            path,
            "" if route.prefix == "/" else route.prefix,
            scope["query_string"],
            scope["headers"],
            scope["scheme"],
            scope["http_version"],
            scope["client"],
            scope["server"],
        )
        call = HttpCall((body,) if body else (), request_id, head, self._loop)
        if method in _SAFE:
            call.retries = 1
        connection = scope[CONNECTION]
        connection.on_disconnect = lambda: router.cancel(call)
        router.submit(call, timeout, limit)
        if not call.waiter.done():
            try:
                await call.waiter
            except asyncio.CancelledError:
                router.cancel(call)
                raise
        if call.error is not None:
            await self._refuse(send, began, request_id, *call.error)
            return
        headers = call.head
        headers.append((b"x-request-id", request_id.encode()))
        await send({"type": "http.response.start", "status": call.status, "headers": headers})
        if call.ended:
            body = call.chunks[0] if call.chunks else b""
            await send({"type": "http.response.body", "body": body})
            self._count(call.status, began)
        else:
            await self._stream(call, router, send, began)

    async def _stream(self, call: HttpCall, router: Any, send: Send, began: float) -> None:
        """Pass on a streamed answer; the replica sends no more than its window ahead of what the client has read."""
        status = call.status
        try:
            while True:
                while call.chunks:
                    chunk = bytes(call.chunks.popleft())
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    if call.target is not None and not call.ended:
                        call.target[1].link.widen(call.number, len(chunk))
                if call.ended:
                    break
                await call.more(STREAM_IDLE)
            if call.error is None:
                await send({"type": "http.response.body", "body": b""})
            else:
                # The head is out: to end without the last chunk is the only way left to say that it failed.
                status = call.error[0]
                raise _BrokenStreamError(call.error[2])
        except (asyncio.TimeoutError, _BrokenStreamError):
            router.cancel(call)
            raise _BrokenStreamError(f"request {call.request_id}: the stream ended early") from None
        except BaseException:
            router.cancel(call)
            raise
        finally:
            self._count(status, began)

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the whole body; None when it is larger than it may be."""
        message = await receive()
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            return body if len(body) <= self._options.body_limit else None
        pieces = [body]
        size = len(body)
        while message.get("more_body"):
            message = await receive()
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._options.body_limit:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    async def _refuse(
        self, send: Send, began: float, request_id: str, status: int, name: str, text: str
    ) -> None:
        """Answer with an error of ours."""
        self._count(status, began)
        body = msgspec.json.encode({"error": name, "message": text, "request_id": request_id})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        if status == 413:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _unknown(self, path: str) -> str:
        known = ", ".join(sorted(entry.prefix for entry in self.routes.entries)) or "none yet"
        return f"no application answers {path}; known route prefixes: {known}"

    def _new_id(self) -> str:
        return f"{self._id_prefix}{next(self._numbers):x}"

    def _count(self, status: int, began: float) -> None:
        seconds = monotonic() - began
        self.statuses[status] += 1
        self.seconds += seconds
        index = 0
        for bound in BUCKETS:
            if seconds <= bound:
                break
            index += 1
        self.buckets[index] += 1


class _BrokenStreamError(Exception):
    """Makes uvicorn close the connection instead of ending the answer as if it were whole."""


def _timeout(value: bytes) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds and math.isfinite(seconds) else None


