"""Starlette requests as arguments of calls: what was asked, and the body; not the connection that it came over."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..exceptions import PayloadError

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["reducer_for"]

#: What of a request's scope means something elsewhere. The rest (the application, its router, connections in
#: ``state``) belongs to the process that accepted it.
KEPT = frozenset(
    {
        "asgi",
        "client",
        "headers",
        "http_version",
        "method",
        "path",
        "path_params",
        "query_string",
        "raw_path",
        "root_path",
        "scheme",
        "server",
        "type",
    }
)


def reducer_for(kind: type) -> Callable[[Any], Any] | None:
    """Return how requests are pickled; None for other types. Nobody has one where Starlette was never imported."""
    module = sys.modules.get("starlette.requests")
    return _reduce if module is not None and kind is module.Request else None


def _reduce(request: Request) -> tuple[Any, ...]:
    scope = {name: value for name, value in request.scope.items() if name in KEPT}
    return _rebuild, (scope, _body(request))


def _body(request: Request) -> bytes:
    """Return the body, which in a replica is there when the request is."""
    if not hasattr(request, "_body"):
        if request._stream_consumed:
            raise PayloadError(
                "its body was consumed as a stream; read it with `await request.body()`, or pass what you made of it"
            )
        if _has_channel(request):
            request._body = _read_at_once(request)
        else:
            request._body = b""
    return request._body


def _has_channel(request: Request) -> bool:
    from starlette.requests import empty_receive

    return request._receive is not empty_receive


def _read_at_once(request: Request) -> bytes:
    """Read a body that is there already. One that is still on its way is left as it was."""
    received: list[Any] = []
    receive = request._receive
    while not received or received[-1].get("more_body", False):
        step = receive()
        try:
            step.send(None)  # type: ignore[attr-defined]
        except StopIteration as done:
            received.append(done.value)
        else:
            step.close()  # type: ignore[attr-defined]
            request._receive = _replay(received, receive)
            raise PayloadError("its body has not arrived yet: do `await request.body()` before you pass the request on")
        if received[-1]["type"] != "http.request":
            raise PayloadError("its client went away before the body was there")
    return b"".join(message.get("body", b"") for message in received)


def _replay(received: list[Any], receive: Callable[[], Any]) -> Callable[[], Any]:
    """Receive what was received once more, then the rest."""
    again = iter(received)

    async def replay() -> Any:
        message = next(again, None)
        return await receive() if message is None else message

    return replay


def _rebuild(scope: dict[str, Any], body: bytes) -> Request:
    """Make the request anew, where the call arrived."""
    from starlette.requests import Request

    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        message = next(messages, None)
        # Who passed it on is there until it is answered: no disconnect comes.
        return await asyncio.get_running_loop().create_future() if message is None else message

    return Request({**scope, "state": {}}, receive)
