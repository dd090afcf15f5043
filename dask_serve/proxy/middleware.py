"""ASGI middleware around the applications, by import path."""

from __future__ import annotations

import importlib
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import HTTPOptions
from ..exceptions import ConfigError

__all__ = ["wrap"]


class _Sender:
    """What `Forwarder` needs to know of a request whose answer goes through middleware; see its use of `send`."""

    default_headers = ()
    more_body = True
    response_started = True
    disconnected = False

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self._send = send

    async def send(self, message: Message) -> None:
        await self._send(message)


class _Innermost:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, _Sender(scope, send).send)


def wrap(app: ASGIApp, options: HTTPOptions) -> ASGIApp:
    """Return ``app`` within the middleware of ``options``, or itself where there is none.

    Raises
    ------
    ConfigError
        A middleware cannot be imported or does not take its arguments.
    """
    if not options.middleware:
        return app
    wrapped: ASGIApp = _Innermost(app)
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
