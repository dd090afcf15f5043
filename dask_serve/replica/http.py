"""The replica's side of HTTP: user code is given a Starlette request, and its answer leaves from here.

A plain answer is one frame; a streaming one is an ASGI conversation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from ..context import request_context
from ..exceptions import ArgumentsError, MethodNotFoundError, RequestError
from ..wire.messages import HttpHead, is_websocket
from .conversation import Conversation
from .execution import Answer, Execution
from .failures import answer_for
from .rendering import of_error, of_exception, plain, response_of
from .results import is_stream
from .websocket import WebSocketConversation

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["HttpAdapter"]


class HttpAdapter:
    """Serves HTTP requests with the user's application, or with ``__call__``."""

    def __init__(self, user: UserCode) -> None:
        self._user = user
        self._function: Callable[..., Any] | None = None
        self._is_async = False
        self._takes_request = True
        #: Why there is no function.
        self._error: RequestError
        #: The deployment is an ASGI application.
        self._app: ASGIApp | None = user.app
        if self._app is not None:
            return
        try:
            self._function, self._is_async = user.methods.find("__call__")
            self._takes_request = _takes_request(self._function)
            if _is_asgi(self._function):
                self._app = self._function
            elif unfit := _what_else_it_takes(self._function, self._takes_request):
                self._function = None
                self._error = ArgumentsError(
                    f"__call__ of deployment {user.deployment!r} cannot answer HTTP requests: beside the request it "
                    f"needs {unfit}; give these defaults, or read them from the request (its query, its JSON body)"
                )
        except MethodNotFoundError:
            self._error = MethodNotFoundError(
                f"deployment {user.deployment!r} has no __call__ and answers no HTTP requests; define "
                "`async def __call__(self, request: starlette.requests.Request)`, or give the class an ASGI "
                "application with @serve.ingress(app)"
            )

    async def serve(self, execution: Execution) -> None:
        """Answer one request; never raises."""
        user = self._user
        call = execution.call
        assert call.http is not None
        if execution.inflow is not None and is_websocket(call.http):
            user.send(execution, await self._websocket(execution, call.http))
            return
        conversation = Conversation(user, execution, call.http)
        try:
            if self._app is not None:
                user.enter(execution)
                answer = await conversation.run(self._app)
                user.send(execution, answer if not execution.timed else _timed(execution, answer))
                return
            if self._function is None:
                raise self._error
            function = self._function
            if self._is_async:
                user.enter(execution)
                result = await (function(conversation.request()) if self._takes_request else function())
            else:
                request = conversation.request()

                def run() -> Any:
                    # Not before: one that waits for its thread has not begun, and can still leave.
                    user.enter(execution, blocking=True)
                    result = function(request) if self._takes_request else function()
                    # Rendered here: a large one would hold up the loop.
                    return result if is_stream(result) or inspect.iscoroutine(result) else response_of(result)

                result = await user.in_pool(run)
                # What is left of it runs here.
                context = execution.context()
                request_context.set(context)
                if user.traces is not None:
                    user.traces.enter(execution, context)
                if inspect.iscoroutine(result):
                    # An async method behind a plain decorator.
                    result = await result
            if is_stream(result):
                answer = await conversation.stream(result)
            else:
                answer = await conversation.finish(response_of(result))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            answer = self._answer_for(execution, error, conversation.started)
        user.send(execution, answer if not execution.timed else _timed(execution, answer))

    async def _websocket(self, execution: Execution, head: HttpHead) -> Answer:
        user = self._user
        try:
            user.enter(execution)
            if self._app is None:
                return plain(PlainTextResponse(_NO_WEBSOCKETS.format(user.deployment), 403))
            return await WebSocketConversation(user, execution, head).run(self._app)
        except BaseException as error:  # noqa: BLE001
            return answer_for(execution, error)

    def _answer_for(self, execution: Execution, error: BaseException, started: bool) -> Answer:
        user = self._user
        # References to data that cannot be had are both; the proxy writes their answers.
        if isinstance(error, HTTPException) and not isinstance(error, RequestError) and not started:
            try:
                return plain(of_exception(error))
            except (TypeError, ValueError) as other:
                error = other
        answer = answer_for(execution, error)
        if user.debug and not started and not answer.error:
            return plain(of_error(error, execution.call.request_id, answer.message))
        return answer


def _timed(execution: Execution, answer: Answer) -> Answer:
    """Let a whole answer tell how long it took; of a stream the head has done so."""
    if not answer.status:
        return answer
    return msgspec.structs.replace(answer, headers=[*answer.headers, execution.timing()])


def _is_asgi(function: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(function).parameters) == ["scope", "receive", "send"]
    except (TypeError, ValueError):
        return False


_NO_WEBSOCKETS = (
    "deployment {!r} takes no WebSockets; make it an ASGI application: "
    "`async def __call__(self, scope, receive, send)`, or serve.ingress(app)"
)


def _what_else_it_takes(function: Callable[..., Any], takes_request: bool) -> str:
    """Return the parameters that a request would leave without a value."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    wild = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in wild]
    first = next(iter(parameters), None)
    if takes_request and needed and needed[0] is first:
        needed = needed[1:]
    return ", ".join(repr(parameter.name) for parameter in needed)


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind not in named for parameter in parameters)
