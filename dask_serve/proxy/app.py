"""What a proxy serves: `/-/...` goes to a small Starlette application, all else takes the hot path in `forward`."""

from __future__ import annotations

from typing import Any

from starlette.types import Receive, Scope, Send

from ..config import HTTPOptions
from ..routing.fabric import Fabric
from .forward import Forwarder
from .own import make_own_app

__all__ = ["ProxyApp", "create_app"]


class ProxyApp:
    """The ASGI callable: a dispatcher of a few lines, so that ordinary requests pay for nothing else."""

    def __init__(self, fabric: Fabric, options: HTTPOptions) -> None:
        self._forwarder = Forwarder(fabric, options)
        self._forward = self._forwarder.serve
        self._own = make_own_app(fabric, self._forwarder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            if scope["path"].startswith("/-/"):
                await self._own(scope, receive, send)
            else:
                await self._forward(scope, receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003, "reason": "WebSockets are not supported"})
        else:
            await self._own(scope, receive, send)

    def stats(self) -> dict[str, Any]:
        """Counts for the controller."""
        return {"statuses": {str(status): count for status, count in self._forwarder.statuses.items()}}


def create_app(fabric: Fabric, options: HTTPOptions) -> ProxyApp:
    """Return the ASGI application of a proxy process."""
    return ProxyApp(fabric, options)
