"""The replica's side of HTTP: user code is given a Starlette request, and its answer is rendered here.

A plain answer leaves as one frame. A streaming one is an ordinary ASGI conversation whose chunks move against a window:
user code waits in ``send`` while the caller has a whole window that it has not consumed.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..exceptions import MethodNotFoundError
from ..wire.messages import HttpHead, Kind
from .execution import Answer, Execution
from .outflow import BodyFlow
from .results import is_stream, refuse_futures
from .streams import TURN, forget_deadline, pour

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["HttpAdapter"]

#: What no header may contain; a proxy would have to break the connection.
_bad_name = re.compile(rb"[\x00-\x20\x7f()<>@,;:\[\]={}\\\"]").search
_bad_value = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search

_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]
_BINARY = [(b"content-type", b"application/octet-stream")]


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
        conversation = _Conversation(user, execution, call.http)
        try:
            user.enter(execution)
            if self._function is None:
                raise self._error
            function = self._function
            if self._is_async:
                result = await (function(conversation.request()) if self._takes_request else function())
            else:
                request = conversation.request()

                def run() -> Any:
                    user.enter(execution, blocking=True)
                    return function(request) if self._takes_request else function()

                result = await user.in_pool(run)
                if inspect.iscoroutine(result):
                    # An async method behind a plain decorator.
                    result = await result
            if is_stream(result):
                answer = await conversation.stream(result)
            else:
                answer = await conversation.finish(_response(result))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            answer = self._answer_for(execution, error, conversation.started)
        user.send(execution, answer)

    def _answer_for(self, execution: Execution, error: BaseException, started: bool) -> Answer:
        if isinstance(error, HTTPException) and not started:
            try:
                return _plain(_of_exception(error))
            except ValueError as other:
                error = other
        return self._user.answer_for(execution, error)


class _Conversation:
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
                return _plain(response)
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
            body = _as_bytes(chunk)
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
            _check(headers)
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


def _plain(response: Response) -> Answer:
    body = response.body
    _check(response.raw_headers)
    return Answer(Kind.RESULT, (bytes(body),), status=response.status_code, headers=response.raw_headers)


def _check(headers: list[tuple[bytes, bytes]]) -> None:
    for name, value in headers:
        if _bad_value(value) or _bad_name(name):
            raise ValueError(f"HTTP forbids the header {name!r} with the value {value!r}")


def _of_exception(error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=headers)
    return PlainTextResponse(str(error.detail), error.status_code, headers)


def _as_bytes(chunk: Any) -> bytes:
    if isinstance(chunk, str):
        return chunk.encode()
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return bytes(chunk)
    raise TypeError(f"a streamed answer is made of str or bytes; the generator yielded a {type(chunk).__name__}")


def _response(result: Any) -> Response:
    """Make a response of whatever user code returned."""
    if isinstance(result, Response):
        return result
    if isinstance(result, str):
        return PlainTextResponse(result)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return Response(bytes(result), media_type="application/octet-stream")
    return Response(msgspec.json.encode(result, enc_hook=_as_json), media_type="application/json")


def _as_json(value: Any) -> Any:
    """Render what JSON does not know: numpy arrays and scalars, pandas objects, pydantic models."""
    refuse_futures(value)
    for method, kwargs in (("tolist", {}), ("model_dump", {"mode": "json"}), ("to_dict", {"orient": "records"})):
        convert = getattr(value, method, None)
        if convert is not None:
            return convert(**kwargs)
    raise TypeError(
        f"a {type(value).__name__} cannot be rendered as JSON; "
        "return a str, bytes, JSON-able value or starlette Response"
    )


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind not in named for parameter in parameters)
