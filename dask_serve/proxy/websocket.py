"""WebSockets: uvicorn speaks to the client, the replica holds the conversation, and messages pass both ways here.

Each way has its window: what user code has not read stays with the client, and what the client has not read holds up
user code.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..exceptions import ReplicaLostError
from ..routing.router import Router
from ..wire.frames import Buffer
from ..wire.messages import LEAST, WINDOW_STEP, Event, Failure, HttpHead
from .calls import FollowedCall
from .errors import ID_HEADER, Headers, Refusal, error_answer
from .forward import Forwarder, http_head

__all__ = ["WebSockets"]

logger = logging.getLogger("dask_serve.proxy")

#: Seconds that user code has to end once its client is gone; then it is cancelled.
GRACE = 10.0
#: Bytes that the reason of a close may have.
_REASON = 123


class SocketCall(FollowedCall):
    """A WebSocket: a request whose answer are events."""

    __slots__ = ("close_code", "events", "opened")

    def __init__(self, parts: Sequence[Buffer], request_id: str, head: HttpHead, loop: Any) -> None:
        super().__init__(parts, request_id, head, loop)
        #: Steps that have come from the replica.
        self.events: deque[tuple[Event, Sequence[Buffer]]] = deque()
        #: The replica has accepted it, or not.
        self.opened = False
        #: How to close it after an error: the replica's process is gone.
        self.close_code = 1011

    async def more(self, timeout: float | None) -> None:
        if not self.events:
            await super().more(timeout)

    def on_event(self, event: Event, parts: Sequence[Buffer]) -> None:
        if not self.opened:
            self.opened = True
            self.retries = 0
            # The deadline is for the first step.
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
        self.events.append((event, parts))
        self._wake()

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        if failure.error == ReplicaLostError.__name__:
            # The replica says it itself: it is stopped, and another one can be had.
            self.close_code = 1012
        super().on_error(failure, parts)


class WebSockets:
    """Serves the WebSockets of all applications.

    Parameters
    ----------
    forwarder : Forwarder
        Knows routes, routers and counts.
    """

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry one WebSocket, from the client's request to its close."""
        forwarder = self._forwarder
        began = monotonic()
        await receive()
        request_id, timeout, refusal = forwarder.read_head(scope)
        route = forwarder.routes.match(scope["path"])
        if refusal is None and route is None:
            refusal = (404, "NotFound", forwarder.unknown(scope))
        if refusal is not None:
            await _send_all(send, _refusal(scope["headers"], request_id, refusal))
            forwarder.count(refusal[0], began, "" if route is None else route.deployment, scope)
            return
        assert route is not None
        loop = asyncio.get_running_loop()
        call = SocketCall((), request_id, http_head({**scope, "method": "GET"}, route.prefix), loop)
        call.retries = 1
        router = forwarder.router(route.deployment)
        forwarder.submit(router, call, timeout, scope)
        carrying = loop.create_task(_carry(call, router, receive))
        conversation = _Conversation(call, send, scope["headers"])
        try:
            await conversation.run()
        finally:
            carrying.cancel()
            if not call.ended:
                router.cancel(call)
            forwarder.count(conversation.status, began, router.id, scope)


class _Conversation:
    """What the replica says, on its way to the client."""

    def __init__(self, call: SocketCall, send: Send, asked: Headers) -> None:
        self.status = 499
        self._call = call
        self._send = send
        #: Headers of the request.
        self._asked = asked
        self._gone = False
        self._accepted = False
        self._closed = False
        self._consumed = 0

    async def run(self) -> None:
        call = self._call
        while True:
            while call.events:
                await self._pass_on(*call.events.popleft())
            if call.ended:
                break
            await call.more(None)
        if self._closed or self._gone:
            return
        if self._accepted:
            await self._close()
        elif call.error is not None:
            self.status = call.error[0]
            await self._tell(_refusal(self._asked, call.request_id, call.error))
        elif call.status:
            # The application answers as to any other request.
            self.status = call.status
            headers = [*call.head, (ID_HEADER, call.request_id.encode())]
            await self._tell(_answer(call.status, headers, b"".join(call.chunks)))
        else:
            self.status = 500
            why = (500, "InternalServerError", "the deployment ended without accepting the WebSocket")
            await self._tell(_refusal(self._asked, call.request_id, why))

    async def _close(self) -> None:
        """The replica said nothing of a close, as it has failed, or user code just ended."""
        call = self._call
        if call.error is None:
            await self._tell([{"type": "websocket.close", "code": 1000}])
            return
        _, name, text = call.error
        logger.warning("Request %s: its WebSocket ended early: %s", call.request_id, text)
        reason = f"{name}, request {call.request_id}"[:_REASON]
        await self._tell([{"type": "websocket.close", "code": call.close_code, "reason": reason}])

    async def _pass_on(self, event: Event, parts: Sequence[Buffer]) -> None:
        kind = event.type
        if kind == "message":
            body = bytes(parts[0])
            key, value = ("text", body.decode()) if event.text else ("bytes", body)
            await self._tell([{"type": "websocket.send", key: value}])
            self._consumed += max(LEAST, len(body))
            if self._consumed >= WINDOW_STEP and not self._call.ended:
                # To a client that is gone too: user code that still sends is to come to its end.
                self._call.target[1].link.widen(self._call.number, self._consumed)
                self._consumed = 0
        elif kind == "accept":
            self._accepted = True
            self.status = 101
            headers = [*event.headers, (ID_HEADER, self._call.request_id.encode())]
            await self._tell([{"type": "websocket.accept", "subprotocol": event.subprotocol, "headers": headers}])
        elif kind == "close":
            if not self._accepted:
                # uvicorn makes that of it.
                self.status = 403
            await self._tell([{"type": "websocket.close", "code": event.code, "reason": event.reason}])
            self._closed = True

    async def _tell(self, messages: list[Message]) -> None:
        if self._gone or self._closed:
            return
        try:
            await _send_all(self._send, messages)
        except OSError:
            # uvicorn's way to say that the client is gone; `_carry` hears of it too, and tells the replica.
            self._gone = True


async def _carry(call: SocketCall, router: Router, receive: Receive) -> None:
    """Pass on what the client says."""
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        body = message["bytes"] if text is None else text.encode()
        await call.room_for_more()
        call.room -= max(LEAST, len(body))
        call.target[1].link.send_event(call.number, Event("message", text=text is not None), (body,))
    if call.opened and not call.ended:
        event = Event("disconnect", message.get("code") or 1005, message.get("reason") or "")
        call.target[1].link.send_event(call.number, event)
        await asyncio.sleep(GRACE)
    router.cancel(call)


async def _send_all(send: Send, messages: list[Message]) -> None:
    for message in messages:
        await send(message)
    if messages[-1]["type"] == "websocket.http.response.body":
        # uvicorn would log that an error: it knows denials, and forgets them here.
        protocol: Any = getattr(send, "__self__", None)
        if hasattr(protocol, "handshake_complete"):
            protocol.handshake_complete = True


def _refusal(asked: Headers, request_id: str, why: Refusal) -> list[Message]:
    return _answer(why[0], *error_answer(why, request_id, asked))


def _answer(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> list[Message]:
    return [
        {"type": "websocket.http.response.start", "status": status, "headers": headers},
        {"type": "websocket.http.response.body", "body": body},
    ]
