"""The hot path: one HTTP request from its head to the last byte of its answer.

Routed by longest prefix, given an id and a deadline, put to the deployment's router, and answered with what the replica
rendered.
No task, no queue and no pickle is made on the way; a client that goes away cancels its request by a callback.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from time import monotonic

from starlette.types import Receive, Scope, Send

from ..config import HTTPOptions
from ..exceptions import RequestCancelledError
from ..measures.counts import HttpCounts
from ..policy.routes import Routes
from ..routing.calls import ONCE
from ..routing.fabric import Fabric
from ..routing.router import Router
from ..routing.table import RouteEntry, Table
from ..wire.messages import HttpHead, model_id_of
from .answers import respond, write_whole
from .calls import HttpCall
from .errors import ID_HEADER, Refusal, error_answer, make_id, valid_id
from .forwarded import is_local
from .protocol import ANSWERED, CONNECTION, ProxyProtocol
from .stream import cut_off, pass_on
from .timing import TOLD, add_total, asks, with_timing
from .upload import UploadCall, begin, refuse_rest, too_large

__all__ = ["Forwarder"]

logger = logging.getLogger("dask_serve.proxy")

#: Requests that may wait for a deployment at one proxy before more are refused, unless the deployment says otherwise.
MAX_QUEUED = 10_000
#: A replica lost before the first byte: methods that may be run twice are sent once more.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Forwarder:
    """Serves the requests of all applications.

    Attributes
    ----------
    counts : dict
        What was answered, by deployment; "" stands for requests of none.
    """

    def __init__(self, fabric: Fabric, options: HTTPOptions) -> None:
        self.counts: defaultdict[str, HttpCounts] = defaultdict(HttpCounts)
        self._fabric = fabric
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._table: Table | None = None
        self._routes: Routes[RouteEntry] = Routes()

    @property
    def routes(self) -> Routes[RouteEntry]:
        """Return the routes of the present table."""
        table = self._fabric.table
        if table is not self._table:
            self._table = table
            root = self._options.root_path
            # uvicorn puts the root path in front of every path.
            self._routes = Routes(
                RouteEntry(root + entry.prefix.rstrip("/") or "/", entry.deployment)
                for entry in (table.routes if table is not None else ())
            )
        return self._routes

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = monotonic()
        request_id, timeout, refusal = self.read_head(scope)
        route = self.routes.match(scope["path"])
        if refusal is None and route is None:
            refusal = (404, "NotFound", self.unknown(scope))
        # The parser is usually at the end of the request already: no need to ask for messages.
        cycle = send.__self__  # type: ignore[attr-defined]
        if refusal is None and (cycle.more_body or cycle.disconnected):
            await self._upload(scope, receive, send, began, (request_id, timeout))
            return
        if refusal is None:
            assert route is not None
            router = self._fabric.router(route.deployment)
            body = bytes(cycle.body)
            if body and len(body) > (limit := self._body_limit(router)):
                refusal = too_large(limit)
        if refusal is not None:
            refuse_rest(scope[CONNECTION])
            await self._refuse(scope, send, began, request_id, refusal, "" if route is None else route.deployment)
            return
        assert route is not None
        call = HttpCall((body,) if body else (), request_id, http_head(scope, route.prefix), self._loop)
        if scope["method"] in _SAFE:
            call.retries = ONCE
        connection: ProxyProtocol = scope[CONNECTION]
        connection.on_disconnect = lambda: router.cancel(call)
        self.submit(router, call, timeout, scope)
        if not call.waiter.done():
            try:
                await call.waiter
            except asyncio.CancelledError:
                router.cancel(call)
                raise
        await self._answer(call, router, scope, send, began)

    async def _upload(
        self, scope: Scope, receive: Receive, send: Send, began: float, asked: tuple[str, float | None]
    ) -> None:
        """Answer a request whose body did not come whole with its head."""
        request_id, timeout = asked
        cycle = send.__self__  # type: ignore[attr-defined]
        route = self.routes.match(scope["path"])
        assert route is not None
        router = self._fabric.router(route.deployment)
        limit = self._body_limit(router)
        body, more, refusal = await begin(cycle, receive, limit)
        if body is None:
            self._count_refused(499, began, router.id, scope)
            return
        if refusal is not None:
            refuse_rest(scope[CONNECTION])
            await self._refuse(scope, send, began, request_id, refusal, router.id)
            return
        kind: type[HttpCall] = UploadCall if more else HttpCall
        call = kind((body,) if body else (), request_id, http_head(scope, route.prefix), self._loop)
        if scope["method"] in _SAFE and not more:
            call.retries = ONCE
        connection: ProxyProtocol = scope[CONNECTION]
        connection.on_disconnect = lambda: router.cancel(call)
        self.submit(router, call, timeout, scope)
        if isinstance(call, UploadCall):
            call.start(router, receive, limit)
        try:
            await call.waiter
            if isinstance(call, UploadCall) and call.ended:
                call.stop(connection)
            await self._answer(call, router, scope, send, began)
        except asyncio.CancelledError:
            router.cancel(call)
            raise
        finally:
            if isinstance(call, UploadCall):
                call.stop(connection)

    async def _answer(self, call: HttpCall, router: Router, scope: Scope, send: Send, began: float) -> None:
        """Pass on what the replica answered, or why there is nothing."""
        if call.error is not None:
            await self._refuse(scope, send, began, call.request_id, call.error, router.id, call.retry_after)
            return
        headers = call.head
        names = [name for name, _ in headers]
        if ID_HEADER not in names:
            headers.append((ID_HEADER, call.request_id.encode()))
        if TOLD in names:
            headers = with_timing(call, headers, began)
        if call.ended:
            chunks = call.chunks
            # A short stream may have come as a whole.
            body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            if not write_whole(send.__self__, call.status, headers, body):  # type: ignore[attr-defined]
                await respond(send, call.status, headers, body)
            self.count(call.status, began, router.id, scope)
        else:
            await send({"type": "http.response.start", "status": call.status, "headers": headers})
            await self._stream(call, router, scope, send, began)

    def read_head(self, scope: Scope) -> tuple[str, float | None, Refusal | None]:
        """Return the request's id, its own deadline in seconds, and why it cannot be served."""
        request_id: str | None = None
        timeout: float | None = None
        refusal = None
        for name, value in scope["headers"]:
            if name == ID_HEADER:
                request_id = value.decode() if valid_id(value) else None
            elif name == b"x-request-timeout-seconds":
                timeout = _timeout(value)
                if timeout is None:
                    given = value[:40].decode("latin-1")
                    text = f"the header X-Request-Timeout-Seconds is {given!r}: give a number of seconds above 0"
                    refusal = (400, "BadRequest", text)
        if request_id is None:
            request_id = make_id()
        return request_id, timeout, refusal

    def submit(self, router: Router, call: HttpCall, timeout: float | None, scope: Scope) -> None:
        """Put a request to its router."""
        if router.knows_models and call.http is not None:
            call.model_id = model_id_of(call.http.headers)
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
        connection: ProxyProtocol = scope[CONNECTION]
        try:
            if scope["method"] != "HEAD":
                await pass_on(call, send)
            if call.error is not None:
                status = call.error[0]
                if status != RequestCancelledError.status:
                    logger.warning("Request %s: its stream ended early: %s", call.request_id, call.error[2])
                # The head is out: to end without the last chunk is the only way left to say that it failed.
                await cut_off(connection)
            else:
                if isinstance(call, UploadCall):
                    call.stop(connection)
                await send({"type": "http.response.body", "body": b""})
        finally:
            self.count(status, began, router.id, scope)
            # When the body is whole its background tasks go on.
            if not call.whole:
                router.cancel(call)

    def _body_limit(self, router: Router) -> int:
        entry = router.entry
        return self._options.body_limit if entry is None or entry.body_limit is None else entry.body_limit

    async def _refuse(  # noqa: PLR0917
        self,
        scope: Scope,
        send: Send,
        began: float,
        request_id: str,
        refusal: Refusal,
        deployment: str,
        retry_after: int = 1,
    ) -> None:
        """Answer with an error of ours."""
        status = refusal[0]
        self._count_refused(status, began, deployment, scope)
        headers, body = error_answer(refusal, request_id, scope["headers"], retry_after)
        if asks(scope["headers"]):
            add_total(headers, began)
        if not write_whole(send.__self__, status, headers, body):  # type: ignore[attr-defined]
            await respond(send, status, headers, body)

    def _count_refused(self, status: int, began: float, deployment: str, scope: Scope) -> None:
        """Count an error, unless the connection has answered with another one, and counted that."""
        if ANSWERED in scope:
            self.end(scope[ANSWERED], deployment, scope)
        else:
            self.count(status, began, deployment, scope)

    def end(self, status: int, deployment: str, scope: Scope) -> None:
        """Take note that a request has ended which is not counted here."""

    def router(self, deployment: str) -> Router:
        """Return the router of a deployment."""
        return self._fabric.router(deployment)

    def routers(self) -> list[Router]:
        """Return all routers that there are."""
        return list(self._fabric.routers.values())

    def unknown(self, scope: Scope) -> str:
        said = f"no application answers {scope['path']}"
        # Strangers need not know what else there is.
        if self._options.admin_port is not None or not is_local(scope):
            return said
        known = ", ".join(sorted(entry.prefix for entry in self.routes.entries)) or "none yet"
        return f"{said}; known route prefixes: {known}"

    def count(self, status: int, began: float, deployment: str, scope: Scope) -> None:
        """Count an answer; "" is the deployment of requests that are of none."""
        self.counts[deployment].add(status, monotonic() - began)


def http_head(scope: Scope, prefix: str) -> HttpHead:
    path, raw_path = scope["path"], scope["raw_path"]
    return HttpHead(
        scope["method"],
        path,
        "" if prefix == "/" else prefix,
        scope["query_string"],
        scope["headers"],
        scope["scheme"],
        scope["http_version"],
        scope["client"],
        scope["server"],
        b"" if raw_path == path.encode() else raw_path,
    )


def _timeout(value: bytes) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if seconds > 0 and math.isfinite(seconds) else None
