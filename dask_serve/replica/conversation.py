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

from ..wire.messages import HttpHead, Kind
from .execution import Answer, Execution
from .outflow import BodyFlow
from .rendering import as_bytes, check, plain
from .streams import TURN, forget_deadline, pour

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["Conversation"]

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
        self._scope = _scope(head)
        self._body_taken = False
        self._runs_on = False
        self._flow: BodyFlow | None = None
        self._paused = monotonic()

    def request(self) -> Request:
        return Request(self._scope, self._receive, self._send)

    async def finish(self, response: Response) -> Answer:
        """Return the last frame of the answer; the others are on their way by then."""
        if response.background is None:
            if type(response).__call__ is Response.__call__:
                return plain(response)
        else:
            self._runs_on = True
        try:
            await response(self._scope, self._receive, self._send)
        finally:
            source = getattr(response, "body_iterator", None)
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()
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
        execution = self._execution
        flow = self._flow
        if flow is None:
            flow = self._flow = BodyFlow(self._user, execution, self._user.tell)
        if message["type"] == "http.response.start":
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            check(headers)
            self.started = True
            flow.head(message["status"], headers)
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body:
                if flow.full or monotonic() - self._paused > TURN:
                    await flow.pause()
                    self._paused = monotonic()
                flow.put(bytes(body))
                forget_deadline()
            if self._runs_on and not message.get("more_body"):
                # The body is whole, and the client has its answer while background tasks run.
                flow.end()


def _scope(head: HttpHead) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": head.http_version,
        "method": head.method,
        "scheme": head.scheme,
        "path": head.path,
        "raw_path": head.path.encode(),
        "root_path": head.root_path,
        "query_string": head.query,
        "headers": head.headers,
        "client": head.client,
        "server": head.server,
        "state": {},
    }
