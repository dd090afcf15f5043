"""The replica's side of HTTP: user code is given a Starlette request, and its answer is rendered here.

A plain answer leaves as one frame. A streaming one is an ordinary ASGI conversation whose chunks move against a window: user
code waits in ``send`` while the caller has `WINDOW` bytes that it has not consumed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from ..context import RequestContext, request_context
from ..exceptions import MethodNotFoundError
from ..wire.messages import HttpHead, Kind
from .execution import Answer, Execution

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["HttpAdapter"]

#: Bytes of a streamed answer that may be on their way.
WINDOW = 256 * 1024


class HttpAdapter:
    """Serves HTTP requests with the user's ``__call__``."""

    def __init__(self, user: UserCode) -> None:
        self._user = user
        self._function: Callable[..., Any] | None = None
        self._is_async = False
        self._takes_request = True
        try:
            self._function, self._is_async = user.method("__call__")
            self._takes_request = _takes_request(self._function)
        except MethodNotFoundError:
            self._error = MethodNotFoundError(
                f"deployment {user.id.rsplit('/', 1)[0]!r} has no __call__ and answers no HTTP requests; "
                "define `async def __call__(self, request: starlette.requests.Request)`"
            )

    async def serve(self, execution: Execution) -> None:
        """Answer one request; never raises."""
        user = self._user
        call = execution.call
        assert call.http is not None
        try:
            request_context.set(RequestContext(call.request_id, execution.deadline))
            if self._function is None:
                raise self._error
            conversation = _Conversation(user, execution, _scope(call.http))
            function = self._function
            if self._is_async:
                result = await (function(conversation.request()) if self._takes_request else function())
            else:
                request = conversation.request()

                def run() -> Any:
                    user.check(execution)
                    return function(request) if self._takes_request else function()

                result = await user.in_pool(run)
            answer = await conversation.finish(_response(result))
        except HTTPException as error:
            answer = _plain(PlainTextResponse(str(error.detail), error.status_code, dict(error.headers or {})))
        except BaseException as error:
            answer = user.answer_for(execution, error)
        user.send(execution, answer)


class _Conversation:
    """One ASGI conversation, for the answers that need one."""

    def __init__(self, user: UserCode, execution: Execution, scope: dict[str, Any]) -> None:
        self._user = user
        self._execution = execution
        self._scope = scope
        self._body_taken = False

    def request(self) -> Request:
        return Request(self._scope, self._receive, self._send)

    async def finish(self, response: Response) -> Answer:
        """Return the last frame of the answer; the others are on their way by then."""
        if type(response).__call__ is Response.__call__ and response.background is None:
            return _plain(response)
        await response(self._scope, self._receive, self._send)
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
        if message["type"] == "http.response.start":
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self._user.send(execution, Answer(Kind.CHUNK, status=message["status"], headers=headers))
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body:
                await self._room()
                execution.outstanding += len(body)
                self._user.send(execution, Answer(Kind.CHUNK, (bytes(body),)))

    async def _room(self) -> None:
        execution = self._execution
        while execution.outstanding >= WINDOW:
            if execution.room is None:
                execution.room = asyncio.Event()
            execution.room.clear()
            await execution.room.wait()


def _scope(head: HttpHead) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
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


def _plain(response: Response) -> Answer:
    body = response.body
    return Answer(Kind.RESULT, (bytes(body),), status=response.status_code, headers=response.raw_headers)


def _response(result: Any) -> Response:
    """Make a response of whatever user code returned."""
    if isinstance(result, Response):
        return result
    if isinstance(result, str):
        return PlainTextResponse(result)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return Response(bytes(result), media_type="application/octet-stream")
    if inspect.isasyncgen(result) or inspect.isgenerator(result):
        return StreamingResponse(result, media_type="text/plain")
    return Response(msgspec.json.encode(result, enc_hook=_as_json), media_type="application/json")


def _as_json(value: Any) -> Any:
    """Render what JSON does not know: numpy arrays and scalars, pandas objects, pydantic models."""
    for method, kwargs in (("tolist", {}), ("model_dump", {"mode": "json"}), ("to_dict", {"orient": "records"})):
        convert = getattr(value, method, None)
        if convert is not None:
            return convert(**kwargs)
    raise TypeError(
        f"a {type(value).__name__} cannot be rendered as JSON; return a str, bytes, JSON-able value or starlette Response"
    )


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return any(parameter.kind in positional for parameter in parameters)
