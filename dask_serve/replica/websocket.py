"""The replica's side of a WebSocket: ASGI's scope, ``receive`` and ``send`` for an application."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from ..wire.frames import Buffer
from ..wire.messages import LEAST, Event, HttpHead, Kind, encode
from .conversation import scope_of
from .execution import Answer, Execution
from .outflow import BodyFlow
from .rendering import check
from .streams import forget_deadline

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["ClientDisconnected", "WebSocketConversation"]

#: Bytes that the reason of a close may have.
REASON = 123


class ClientDisconnected(OSError):
    """What ``send`` raises once the client is gone: ASGI wants an OSError."""


class EventFlow(BodyFlow):
    """The steps of a WebSocket; or, where it is denied, an answer as to any other request."""

    __slots__ = ()

    def event(self, event: Event, parts: tuple[Buffer, ...] = ()) -> None:
        """Send a step."""
        self._append((event, parts), max(LEAST, sum(len(part) for part in parts)) if parts else 0)

    def _send(self, entries: list[Any]) -> None:
        execution = self._execution
        answer: list[Any] = []
        for entry in entries:
            if type(entry) is tuple:
                execution.connection.send(Kind.EVENT, execution.request, encode(entry[0]), entry[1])
            else:
                answer.append(entry)
        if answer:
            super()._send(answer)


class WebSocketConversation:
    """One WebSocket of an ASGI application."""

    def __init__(self, user: UserCode, execution: Execution, head: HttpHead) -> None:
        assert execution.inflow is not None
        self.scope = _scope(head, user.state)
        self._execution = execution
        self._inflow = execution.inflow
        self._flow = EventFlow(user, execution, user.tell)
        self._state = "new"
        self._disconnect: dict[str, Any] | None = None

    async def run(self, app: ASGIApp) -> Answer:
        """Run an application on it; what it raises is for the caller."""
        await app(self.scope, self.receive, self.send)
        return Answer(Kind.END)

    async def receive(self) -> dict[str, Any]:
        """ASGI's ``receive``."""
        if self._state == "new":
            self._state = "connecting"
            return {"type": "websocket.connect"}
        if self._disconnect is not None:
            return self._disconnect
        event, parts = await self._inflow.event()
        if event.type == "message":
            body = bytes(parts[0])
            if event.text:
                return {"type": "websocket.receive", "text": body.decode()}
            return {"type": "websocket.receive", "bytes": body}
        self._disconnect = {"type": "websocket.disconnect", "code": event.code, "reason": event.reason}
        return self._disconnect

    async def send(self, message: Any) -> None:
        """ASGI's ``send``."""
        kind = message["type"]
        takes = _MOVES.get(kind, ())
        if self._state not in takes:
            raise RuntimeError(f"a WebSocket that is {_NAMES[self._state]} takes no {kind!r}")
        if self._inflow.gone:
            raise ClientDisconnected("the client of the WebSocket is gone")
        await getattr(self, f"_{kind.removeprefix('websocket.').replace('.', '_')}")(message)

    async def _accept(self, message: Any) -> None:
        self._state = "open"
        forget_deadline()
        self._flow.event(Event("accept", subprotocol=message.get("subprotocol"), headers=_headers(message)))

    async def _send(self, message: Any) -> None:
        body, text = message.get("bytes"), message.get("text")
        if self._flow.full:
            await self._flow.pause()
            if self._inflow.gone:
                raise ClientDisconnected("the client of the WebSocket is gone")
        if body is None:
            self._flow.event(Event("message", text=True), (text.encode(),))
        else:
            self._flow.event(Event("message"), (bytes(body),))

    async def _close(self, message: Any) -> None:
        self._state = "closed"
        code = message.get("code")
        self._flow.event(Event("close", 1000 if code is None else int(code), _text(message.get("reason") or "")))

    async def _http_response_start(self, message: Any) -> None:
        self._state = "denied"
        self._flow.head(message["status"], _headers(message))

    async def _http_response_body(self, message: Any) -> None:
        body = message.get("body", b"")
        if body:
            self._flow.put(bytes(body))
        if not message.get("more_body"):
            self._state = "closed"


_NAMES = {
    "new": "new",
    "connecting": "not accepted",
    "open": "open",
    "denied": "being denied",
    "closed": "closed",
}

#: In which states a message may come.
_MOVES = {
    "websocket.accept": ("new", "connecting"),
    "websocket.send": ("open",),
    "websocket.close": ("new", "connecting", "open"),
    "websocket.http.response.start": ("new", "connecting"),
    "websocket.http.response.body": ("denied",),
}


def _text(reason: Any) -> str:
    """Return the reason of a close as a frame can have it; FastAPI gives a list of what was not valid."""
    text = reason if isinstance(reason, str) else json.dumps(reason, default=str)
    return text.encode()[:REASON].decode(errors="ignore")


def _headers(message: Any) -> list[tuple[bytes, bytes]]:
    headers = [(bytes(name), bytes(value)) for name, value in message.get("headers") or ()]
    check(headers)
    return headers


def _scope(head: HttpHead, state: dict[str, Any]) -> dict[str, Any]:
    asked = b",".join(value for name, value in head.headers if name == b"sec-websocket-protocol")
    scope = scope_of(head, state, "websocket")
    scope["subprotocols"] = [name.strip().decode("latin-1") for name in asked.split(b",") if name.strip()]
    scope["extensions"] = {"websocket.http.response": {}}
    return scope
