"""The proxies' own routes: health, readiness, routes, metrics."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..measures.prometheus import render
from ..routing.fabric import Fabric
from ..routing.router import Router
from .errors import error_answer, request_id_in
from .forwarded import is_local
from .metrics import proxy_families
from .presence import Presence
from .protocol import CONNECTION, ProxyState

if TYPE_CHECKING:
    from .forward import Forwarder

__all__ = ["make_own_app"]


#: Seconds that `/-/readyz` waits for the first connection to a replica that the table lists.
FIRST_CONTACT = 1.0


def make_own_app(
    fabric: Fabric, forwarder: Forwarder, presence: Presence, *, listing: bool, public: bool = True
) -> Starlette:
    """Return the application behind ``/-/``.

    Parameters
    ----------
    fabric : Fabric
    forwarder : Forwarder
    presence : Presence
        Of the controller.
    listing : bool
        Whether routes and metrics are answered at all.
    public : bool
        Whether strangers may ask: then routes and metrics are for clients on this machine only.
    """

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        if request.scope[CONNECTION].server_state.draining:
            return PlainTextResponse("draining", 503)
        if not forwarder.routes.entries:
            return PlainTextResponse(_joined("no application is routed yet", presence.away), 503)
        if not await _reachable(fabric, forwarder):
            return PlainTextResponse(_joined("no replica can be reached", presence.away), 503)
        return PlainTextResponse(_joined("ready", presence.away))

    async def routes(request: Request) -> Response:
        check(request)
        return JSONResponse({entry.prefix: entry.deployment for entry in forwarder.routes.entries})

    async def metrics(request: Request) -> Response:
        check(request)
        state: ProxyState = request.scope[CONNECTION].server_state
        text = render(proxy_families(forwarder, state))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def check(request: Request) -> None:
        if not listing or (public and not is_local(request.scope)):
            raise HTTPException(404)

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sent = request.scope["headers"]
        text = f"{request.method} {request.url.path} is not answered here"
        kind = "NotFound" if error.status_code == 404 else error.detail.replace(" ", "")
        headers, body = error_answer((error.status_code, kind, text), request_id_in(sent), sent)
        more = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
        answer = Response(body, error.status_code)
        answer.raw_headers = headers + more
        return answer

    return Starlette(
        routes=[
            Route("/-/healthz", healthz),
            Route("/-/readyz", readyz),
            Route("/-/routes", routes),
            Route("/-/metrics", metrics),
        ],
        exception_handlers={HTTPException: failed},
    )


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


async def _reachable(fabric: Fabric, forwarder: Forwarder) -> bool:
    """Whether some replica of a routed deployment can be reached; waits a moment for the first contact."""
    deadline = monotonic() + FIRST_CONTACT
    while True:
        routers = [fabric.router(entry.deployment) for entry in forwarder.routes.entries]
        if any(router.ready or _wakes(router) for router in routers):
            return True
        expected = any(router.entry is not None and router.entry.replicas for router in routers)
        if not expected or monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)


def _wakes(router: Router) -> bool:
    """Whether there are no replicas only because nobody asks for them."""
    entry = router.entry
    return router.scales and entry is not None and not entry.replicas and entry.failure is None
