"""Errors that the proxy answers with itself: small JSON bodies, or text for those who ask for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import count

import msgspec

__all__ = ["ID_HEADER", "Headers", "Refusal", "error_answer", "make_id", "request_id_in", "valid_id"]

Headers = Sequence[tuple[bytes, bytes]]
#: Status, type and text of an error of ours.
Refusal = tuple[int, str, str]


ID_HEADER = b"x-request-id"
valid_id = re.compile(rb"[!-~]{1,128}").fullmatch
_prefix = f"{os.urandom(6).hex()}-"
_numbers = count()


def make_id() -> str:
    """Return a new request id."""
    return f"{_prefix}{next(_numbers):x}"


def request_id_in(headers: Headers) -> str:
    """Return the request's own id, or a new one where it has none that is valid."""
    for name, value in headers:
        if name == ID_HEADER and valid_id(value):
            return value.decode()
    return make_id()


def error_answer(
    error: Refusal, request_id: str, headers: Headers, retry_after: int = 1
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an error.

    Parameters
    ----------
    error : tuple
        HTTP status (503 carries ``Retry-After``, 401 ``WWW-Authenticate``); what went wrong, in one word, the ``type``
        of the body; and a text for humans.
    request_id : str
    headers : sequence
        Of the request; what it accepts decides about the form.
    retry_after : int
        Seconds.
    """
    status, kind, message = error
    if wants_text(headers):
        body = f"{message}\n\n{kind}, request {request_id}\n".encode()
        content_type = b"text/plain; charset=utf-8"
    else:
        body = msgspec.json.encode({"type": kind, "message": message, "request_id": request_id})
        content_type = b"application/json"
    answer = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (ID_HEADER, request_id.encode()),
    ]
    if status == 503:
        answer.append((b"retry-after", b"%d" % retry_after))
    elif status == 401:
        answer.append((b"www-authenticate", b'Bearer realm="dask_serve"'))
    return answer, body


def wants_text(headers: Headers) -> bool:
    """Whether a client prefers plain text to JSON; one that does not care gets JSON."""
    accept = b",".join(value for name, value in headers if name == b"accept").lower()
    return b"text/" in accept and _quality(accept, b"text/plain") > _quality(accept, b"application/json")


def _quality(accept: bytes, kind: bytes) -> float:
    """Return the weight that the most specific range of an ``Accept`` header gives to a media type."""
    best, found = 0.0, -1
    for entry in accept.split(b","):
        name, *parameters = (part.strip() for part in entry.split(b";"))
        specific = (b"*/*", kind.split(b"/")[0] + b"/*", kind)
        if name in specific and specific.index(name) > found:
            found, best = specific.index(name), _weight(parameters)
    return best


def _weight(parameters: Iterable[bytes]) -> float:
    for parameter in parameters:
        if parameter.startswith(b"q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0
