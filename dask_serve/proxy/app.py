"""What a proxy serves: `/-/...` goes to a small Starlette application, all else takes the hot path in `forward`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import HTTPOptions
from ..routing.fabric import Fabric
from .errors import Refusal, error_answer, request_id_in
from .files import Watched
from .forwarded import TrustedProxies
from .metrics import all_counts
from .middleware import identified, wrap
from .observed import NOTED, ObservedForwarder, make_forwarder
from .own import make_own_app
from .presence import Presence
from .protocol import ProxyState, Refused
from .tokens import Tokens
from .websocket import WebSockets

__all__ = ["ProxyApp"]

logger = logging.getLogger("dask_serve.proxy")

#: How uvicorn's complaint about it begins.
_WRONG_LENGTH = "Response content "
#: Routes that need no token: those who ask have none, and learn no names.
_OPEN = ("/-/healthz", "/-/readyz")


class ProxyApp:
    """The ASGI callable: a dispatcher of a few lines, so that ordinary requests pay for nothing else.

    Attributes
    ----------
    admin : Starlette
        What the admin port leads to.
    watched : list of Watched
        Files to look at every now and then.

    Raises
    ------
    ConfigError
        A middleware or a file of tokens cannot be used.
    """

    def __init__(self, fabric: Fabric, options: HTTPOptions, presence: Presence) -> None:
        self.watched: list[Watched] = []
        self._fabric = fabric
        self._forwarder = make_forwarder(fabric, options)
        self._own = make_own_app(fabric, self._forwarder, presence, listing=options.admin_port is None)
        self.admin: Starlette = make_own_app(fabric, self._forwarder, presence, listing=True, public=False)
        self._own_prefix = options.root_path + "/-/"
        self._forward: ASGIApp = self._forwarder.serve
        self._sockets: ASGIApp = WebSockets(self._forwarder).serve
        self._websocket: ASGIApp = self._sockets
        self._tokens: Tokens | None = None
        if options.tokens_file is not None or options.application_tokens:
            self._tokens = Tokens(options)
            self.watched += self._tokens.watched
            self._forward = self._websocket = self._forward_allowed
        if options.middleware:
            inner = self._forward_allowed if self._tokens is not None else self._forward_either
            self._forward = self._websocket = identified(wrap(inner, options), self._note)
        self._trusted: TrustedProxies | None = None
        if options.trusted_proxies:
            self._trusted = TrustedProxies(options.trusted_proxies)
            self._behind, self._websocket_behind = self._forward, self._websocket
            self._forward = self._websocket = self._forward_relayed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            try:
                if scope["path"].startswith(self._own_prefix):
                    await self._answer(scope, receive, send)
                else:
                    await self._forward(scope, receive, send)
            except Exception as error:
                if not await self._failed(scope, send, error):
                    raise
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._own(scope, receive, send)

    async def _failed(self, scope: Scope, send: Send, error: Exception) -> bool:
        """Answer when a middleware, or the proxy itself, has raised; False where an answer has begun already."""
        cycle: Any = getattr(send, "__self__", None)
        request_id = request_id_in(scope["headers"])
        if cycle is not None and isinstance(error, RuntimeError) and str(error).startswith(_WRONG_LENGTH):
            # Its head is out.
            logger.error("Request %s: the answer's Content-Length is not that of its body; cut off", request_id)
            cycle.transport.close()
            return True
        if cycle is None or cycle.response_started:
            return False
        logger.error("Request %s failed in the proxy", request_id, exc_info=error)
        text = "the proxy failed; its log, on the scheduler's node, tells more"
        await self._refuse(scope, send, (500, "InternalServerError", text), request_id)
        return True

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one of the proxy's own routes."""
        if self._trusted is not None:
            self._trusted.read(scope)
        if self._tokens is not None and not scope["path"].endswith(_OPEN):
            why = self._tokens.allow(scope["headers"], None)
            if why is not None:
                await self._refuse(scope, send, (401, "Unauthorized", why))
                return
        await self._own(scope, receive, send)

    async def _forward_relayed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward requests, after what a trusted proxy says of their clients was read."""
        assert self._trusted is not None
        self._trusted.read(scope)
        behind = self._websocket_behind if scope["type"] == "websocket" else self._behind
        await behind(scope, receive, send)

    async def _forward_either(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or a WebSocket, that has passed the middleware."""
        forward = self._sockets if scope["type"] == "websocket" else self._forwarder.serve
        await forward(scope, receive, send)

    async def _forward_allowed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the requests that have a token, where one is needed."""
        assert self._tokens is not None
        route = self._forwarder.routes.match(scope["path"])
        # An unknown path is answered only to those who may use the service.
        application = None if route is None else route.deployment.rpartition("/")[0]
        why = self._tokens.allow(scope["headers"], application)
        if why is None:
            await self._forward_either(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": why})
        else:
            await self._refuse(scope, send, (401, "Unauthorized", why))

    async def _refuse(self, scope: Scope, send: Send, error: Refusal, request_id: str | None = None) -> None:
        status = error[0]
        self._forwarder.counts[""].statuses[status] += 1
        self._note(scope, status)
        headers, body = error_answer(error, request_id or request_id_in(scope["headers"]), scope["headers"])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _note(self, scope: Scope, status: int, began: float | None = None) -> None:
        """Let the access log have what the proxy, or a middleware, has answered by itself."""
        if isinstance(self._forwarder, ObservedForwarder) and not scope.get(NOTED):
            self._forwarder.note(status, monotonic() if began is None else began, "", scope)

    @property
    def on_refused(self) -> Callable[[Refused], None] | None:
        """What notes requests that connections refuse by themselves; None where there is no access log."""
        return self._forwarder.note_refused if isinstance(self._forwarder, ObservedForwarder) else None

    def flush(self) -> None:
        """Write what has been noted; called once a second."""
        if isinstance(self._forwarder, ObservedForwarder) and self._forwarder.access is not None:
            self._forwarder.access.flush()

    def stats(self, state: ProxyState) -> dict[str, Any]:
        """Return counts, and how many requests wait, for the controller; called once a second."""
        return {
            "counts": {name: counts.export() for name, counts in all_counts(self._forwarder, state).items()},
            "queued": {router.id: router.queued for router in self._fabric.routers.values() if router.queued},
        }
