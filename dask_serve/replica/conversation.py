"""One ASGI conversation: the scope, ``receive`` and ``send``, and what is streamed through them.

Its chunks move against a window: user code waits in ``send`` while the caller has a whole window that it has not
consumed.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ..wire.messages import HttpHead, Kind
from .execution import Answer, Execution
from .failures import answer_for
from .outflow import BodyFlow
from .rendering import WITHOUT_BODY, as_bytes, checked, plain
from .streams import TURN, forget_deadline, pour

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["Conversation", "scope_of"]

_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]
_BINARY = [(b"content-type", b"application/octet-stream")]


class Conversation:
    """One ASGI conversation, for the answers that need one.

    Attributes
    ----------
    started : bool
        The head of the answer is on its way: its status cannot change any more.
    """

    def __init__(self, user: UserCode, execution: Execution, head: HttpHead) -> None:
        self.started = False
        self._user = user
        self._execution = execution
        self._scope = scope_of(head, user.state, "http")
        self._scope["method"] = head.method
        self._body_taken = False
        #: The body is whole, and what ran behind it (background tasks) may still run.
        self.whole = False
        #: The head, and the body if it came at once, until the end of the tick that they came in.
        self._held: tuple[int, list[tuple[bytes, bytes]], bytes | None] | None = None
        self._without_body = False
        self._flow: BodyFlow | None = None
        self._paused = monotonic()

    def request(self) -> Request:
        return Request(self._scope, self._receive, self._send)

    async def finish(self, response: Response) -> Answer:
        """Return the last frame of the answer; the others are on their way by then."""
        if response.background is None and type(response).__call__ is Response.__call__:
            return plain(response)
        try:
            return await self.run(response)
        finally:
            source = getattr(response, "body_iterator", None)
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()

    async def run(self, app: ASGIApp) -> Answer:
        """Let an ASGI application answer; return the last frame.

        What it raises after its answer is only logged: it is Starlette's way to answer 500 first and then to raise, and
        background tasks come after the answer too.
        """
        try:
            await app(self._scope, self._receive, self._send)
        except BaseException as error:
            # A head of which nothing has left yet was of an answer that never came.
            if not self.whole:
                self._held = None
                raise
            answer_for(self._execution, error)
        if not self.whole:
            missing = "the rest of its answer" if self.started or self._held is not None else "an answer"
            self._held = None
            raise RuntimeError(f"the ASGI application ended without {missing}")
        if self._held is not None:
            status, headers, body = self._held
            self._held = None
            return Answer(Kind.RESULT, (body or b"",), status=status, headers=headers)
        return Answer(Kind.END)

    async def stream(self, generator: Any) -> Answer:
        """Send what a generator yields; the head waits for the first chunk: an error before it has its own status."""
        flow = BodyFlow(self._user, self._execution, self._user.tell)

        def put(chunk: Any) -> None:
            body = as_bytes(chunk)
            if not self.started:
                self.started = True
                flow.head(200, _TEXT if isinstance(chunk, str) else _BINARY)
            if body:
                flow.put(body)

        await pour(self._user, self._execution, generator, flow, put)
        if not self.started:
            flow.head(200, _TEXT)
        return Answer(Kind.END)

    async def _receive(self) -> dict[str, Any]:
        execution = self._execution
        if execution.inflow is not None and not self._body_taken:
            message = await execution.inflow.body()
            self._body_taken = message.get("more_body") is False
            return message
        if not self._body_taken:
            self._body_taken = True
            body = bytes(execution.parts[0]) if execution.parts else b""
            execution.parts = ()
            return {"type": "http.request", "body": body, "more_body": False}
        # Starlette waits here to hear that the client went away.
        if execution.on_cancel is None:
            execution.on_cancel = asyncio.Event()
        if not execution.cancelled:
            await execution.on_cancel.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self.started or self._held is not None:
                raise RuntimeError("ASGI allows one 'http.response.start' for a request; this is the second")
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            status = message["status"]
            self._held = status, checked(status, headers), None
            self._without_body = status in WITHOUT_BODY
            # An answer that is whole within this tick leaves as one frame.
            self._user.loop.call_soon(self._release)
        elif kind == "http.response.body":
            await self._send_body(bytes(message.get("body", b"")), bool(message.get("more_body")))
        else:
            raise RuntimeError(f"an answer over HTTP has no ASGI message {kind!r}")

    async def _send_body(self, body: bytes, more: bool) -> None:
        held = self._held
        if self.whole or (held is None and not self.started):
            raise RuntimeError(f"an ASGI 'http.response.body' came {'after the last' if self.whole else 'first'}")
        self.whole = not more
        forget_deadline()
        if self._without_body:
            body = b""
        if held is not None and not more:
            self._held = held[0], held[1], body
            return
        flow = self._release() or self._flow
        assert flow is not None
        if body:
            if flow.full or monotonic() - self._paused > TURN:
                await flow.pause()
                self._paused = monotonic()
            flow.put(body)
        if not more:
            # The client has its answer while background tasks run.
            flow.end()

    def _release(self) -> BodyFlow | None:
        """Send what was held."""
        held = self._held
        if held is None:
            return None
        self._held = None
        self.started = True
        flow = self._flow = BodyFlow(self._user, self._execution, self._user.tell)
        flow.head(held[0], held[1])
        if held[2] is not None:
            if held[2]:
                flow.put(held[2])
            flow.end()
        return flow


def scope_of(head: HttpHead, state: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what ASGI's scopes of requests and WebSockets have in common."""
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": head.http_version,
        "scheme": head.scheme,
        "path": head.path,
        "raw_path": head.raw_path or head.path.encode(),
        "root_path": head.root_path,
        "query_string": head.query,
        "headers": head.headers,
        "client": head.client,
        "server": head.server,
        "state": state.copy(),
    }
