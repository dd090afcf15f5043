"""From what user code returned to a response, and from a response to an answer."""

from __future__ import annotations

import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from ..wire.messages import Kind
from .execution import Answer
from .jsonable import to_json

__all__ = ["WITHOUT_BODY", "as_bytes", "check", "checked", "of_error", "of_exception", "plain", "response_of"]

#: What no header may contain; a proxy would have to break the connection.
_bad_name = re.compile(rb"[\x00-\x20\x7f()<>@,;:\[\]={}\\\"]").search
_bad_value = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
#: Statuses whose answers end with their head: a client takes what follows for the next answer.
WITHOUT_BODY = frozenset({204, 304})
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


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
    status = response.status_code
    headers = checked(status, response.raw_headers)
    body = b"" if status in WITHOUT_BODY else bytes(response.body)
    return Answer(Kind.RESULT, (body,), status=status, headers=headers)


def checked(status: int, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that an answer may have; `ValueError` for a status or header that HTTP forbids."""
    if not 200 <= status <= 599:
        raise ValueError(f"an answer over HTTP has a status from 200 to 599, not {status!r}")
    check(headers)
    if status in WITHOUT_BODY:
        return [header for header in headers if header[0].lower() not in _FRAMING]
    return headers


def check(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise `ValueError` for a header that HTTP forbids."""
    for name, value in headers:
        if _bad_value(value) or _bad_name(name) or (name == b"content-length" and not value.isdigit()):
            raise ValueError(f"HTTP forbids the header {name!r} with the value {value!r}")


def of_exception(error: HTTPException) -> Response:
    """Make a response of an exception that says what it wants to be: with a text, or with FastAPI's ``detail``."""
    headers = dict(error.headers or {})
    if error.status_code in WITHOUT_BODY:
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
