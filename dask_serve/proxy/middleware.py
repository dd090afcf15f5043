"""ASGI middleware around the applications, by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import HTTPOptions
from ..exceptions import ConfigError
from .errors import ID_HEADER, request_id_in
from .observed import ID, NOTED

__all__ = ["Innermost", "identified", "wrap"]


class _Request:
    """Stands for uvicorn's request cycle where middleware is around the applications: it may have changed anything.

    Whoever forwards a request looks at the cycle behind ``send`` to save time.
    """

    default_headers = ()
    waiting_for_100_continue = False
    #: Answers are not written past the middleware.
    response_started = True
    keep_alive = True

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.body = bytearray()
        self.more_body = True
        self.disconnected = False
        self.transport: Any = None
        self._receive = receive
        self._send = send

    async def begin(self) -> None:
        """Read the first part of the body, which nearly always is all."""
        message = await self._receive()
        self.disconnected = message["type"] == "http.disconnect"
        self.body += message.get("body", b"")
        self.more_body = message.get("more_body", False)

    async def receive(self) -> Message:
        if self.disconnected:
            return {"type": "http.disconnect"}
        if self.body or not self.more_body:
            body = bytes(self.body)
            self.body.clear()
            return {"type": "http.request", "body": body, "more_body": self.more_body}
        message = await self._receive()
        self.disconnected = message["type"] == "http.disconnect"
        self.more_body = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        await self._send(message)


class Innermost:
    """Lets an application of the proxy's be called as ASGI says, by whoever has no request cycle of uvicorn's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send)
        await request.begin()
        await self._app(scope, request.receive, request.send)


def identified(app: ASGIApp, note: Callable[[Scope, int, float], None]) -> ASGIApp:
    """Return ``app`` with a request id on all its answers, those that a middleware gives by itself included.

    Parameters
    ----------
    app : ASGIApp
    note : callable
        Called with scope, status and the time of the beginning for each answer over HTTP.
    """

    async def identify(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began = monotonic()
        # One list for all copies of the scope.
        scope[NOTED] = []

        status = 0

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                if not any(name.lower() == ID_HEADER for name, _ in headers):
                    scope[ID] = request_id_in(scope["headers"])
                    message = {**message, "headers": [*headers, (ID_HEADER, scope[ID].encode())]}
            await send(message)

        await app(scope, receive, send_identified)
        if status:
            note(scope, status, began)

    return identify


def wrap(app: ASGIApp, options: HTTPOptions) -> ASGIApp:
    """Return ``app`` within the middleware of ``options``, or itself where there is none.

    Raises
    ------
    ConfigError
        A middleware cannot be imported or does not take its arguments.
    """
    if not options.middleware:
        return app
    wrapped: ASGIApp = Innermost(app)
    for entry in reversed(options.middleware):
        path, arguments = (entry, {}) if isinstance(entry, str) else entry
        kind = _load(path)
        try:
            wrapped = kind(wrapped, **arguments)
        except Exception as error:  # noqa: BLE001 - code of others
            raise ConfigError(f"middleware {path!r} does not take {arguments}: {error}") from None
    return wrapped


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # noqa: BLE001 - code of others
        raise ConfigError(
            f"middleware {path!r} cannot be imported where the proxies run: {type(error).__name__}: {error}"
        ) from None
    return found
