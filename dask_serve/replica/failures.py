"""What was raised, turned into an answer."""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from typing import TYPE_CHECKING

from .. import exceptions
from ..exceptions import ArgumentsError, BackPressureError, RequestCancelledError, RequestError
from ..wire import payloads
from ..wire.messages import Kind
from .execution import Answer, Execution

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["CANCELLED", "answer_for"]

logger = logging.getLogger("dask_serve.replica")

CANCELLED = Answer(Kind.ERROR, error="RequestCancelledError", message="the request was cancelled")

#: Modules and functions that call the functions of users.
_CALLING = {
    (f"{__package__}.user", "_run_async"),
    (f"{__package__}.user", "_blocking_answer"),
    (f"{__package__}.streams", "_stream"),
    (f"{__package__}.streams", "run"),
}


def answer_for(execution: Execution, error: BaseException) -> Answer:
    """Turn what was raised into an answer, and log what user code has to know of."""
    if isinstance(error, asyncio.CancelledError):
        return CANCELLED
    request_id = execution.call.request_id
    if execution.cancelled:
        if not isinstance(error, RequestCancelledError):
            logger.info("Request %s, which was cancelled, failed: %r", request_id, error)
        _let_go(error)
        return CANCELLED
    if isinstance(error, RequestError) and not _from_user_code(error):
        return _failure(error)
    user = execution.core.user
    if execution.user_context is not None and execution.user_context.spans is not None:
        execution.user_context.spans.failed(error)
    if isinstance(error, TypeError) and _is_of_the_call(error):
        return _failure(_misfit(user, execution.call.method, error))
    text, parts = payloads.dump_exception(error)
    logger.error("Request %s failed in replica %s:\n%s", request_id, user.id, text)
    user.on_error(request_id, text)
    return Answer(Kind.ERROR, parts, message=text)


def _failure(error: RequestError) -> Answer:
    """Answer with an error of ours, by its name."""
    name = type(error).__name__
    return Answer(
        Kind.ERROR,
        error=name if name in exceptions.__all__ else "RequestError",
        message=str(error),
        retry_after=error.retry_after_s if isinstance(error, BackPressureError) else None,
    )


def _from_user_code(error: RequestError) -> bool:
    """A request error that a called deployment answered, and user code let through: it keeps its remote traceback."""
    return isinstance(error.__cause__, payloads.RemoteTraceback)


def _misfit(user: UserCode, method: str, error: TypeError) -> ArgumentsError:
    try:
        takes = f"; it takes {inspect.signature(user.methods.find(method)[0])}"
    except (TypeError, ValueError):  # of a builtin
        takes = ""
    return ArgumentsError(f"method {method!r} of deployment {user.deployment!r} cannot be called so: {error}{takes}")


def _is_of_the_call(error: TypeError) -> bool:
    """It was raised by the step that calls the user's function: no frame of that function has begun."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    frame = None if trace is None else trace.tb_frame
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) in _CALLING


def _let_go(error: BaseException | None) -> None:
    """Empty the dead frames of an error. They may be part of a cycle, and the Dask futures there have to go now."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
