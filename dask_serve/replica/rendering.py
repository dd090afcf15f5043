"""From what user code returned to a response, and from a response to an answer."""

from __future__ import annotations

import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from ..wire.messages import Kind
from .execution import Answer
from .jsonable import to_json

__all__ = ["as_bytes", "check", "of_error", "of_exception", "plain", "response_of"]

#: What no header may contain; a proxy would have to break the connection.
_bad_name = re.compile(rb"[\x00-\x20\x7f()<>@,;:\[\]={}\\\"]").search
_bad_value = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search


def response_of(result: Any) -> Response:
    """Make a response of whatever user code returned."""
    if isinstance(result, Response):
        return result
    if isinstance(result, str):
        return PlainTextResponse(result)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return Response(bytes(result), media_type="application/octet-stream")
    return Response(to_json(result), media_type="application/json")


def plain(response: Response) -> Answer:
    """Make a whole answer of a response that has its body."""
    body = response.body
    check(response.raw_headers)
    return Answer(Kind.RESULT, (bytes(body),), status=response.status_code, headers=response.raw_headers)


def check(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise `ValueError` for a header that HTTP forbids."""
    for name, value in headers:
        if _bad_value(value) or _bad_name(name):
            raise ValueError(f"HTTP forbids the header {name!r} with the value {value!r}")


def of_exception(error: HTTPException) -> Response:
    """Make a response of an exception that says what it wants to be: with a text, or with FastAPI's ``detail``."""
    headers = dict(error.headers or {})
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=headers)
    if isinstance(error.detail, str) and not any(base.__module__.startswith("fastapi") for base in type(error).__mro__):
        return PlainTextResponse(error.detail, error.status_code, headers)
    return Response(to_json({"detail": error.detail}), error.status_code, headers, "application/json")


def of_error(error: BaseException, request_id: str, traceback: str) -> Response:
    """Make a response of an exception of user code that shows everything (``debug=True``)."""
    body = {"type": type(error).__name__, "message": str(error), "request_id": request_id, "traceback": traceback}
    return Response(to_json(body), 500, media_type="application/json")


def as_bytes(chunk: Any) -> bytes:
    """Return a piece of a streamed answer as bytes."""
    if isinstance(chunk, str):
        return chunk.encode()
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return bytes(chunk)
    raise TypeError(f"a streamed answer is made of str or bytes; the generator yielded a {type(chunk).__name__}")
