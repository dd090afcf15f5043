"""The response header ``Server-Timing``, for requests that ask for it."""

from __future__ import annotations

from time import monotonic

from ..policy.timing import ASKS, TOLD, server_timing
from ..routing.calls import Outgoing
from .errors import Headers

__all__ = ["ASKS", "TOLD", "add_total", "asks", "with_timing"]


def with_timing(call: Outgoing, headers: list[tuple[bytes, bytes]], began: float) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer with the header in the place of what the replica told."""
    replica = next(value for name, value in headers if name == TOLD)
    routed = abs(call.sent) - call.since if call.sent else 0.0
    value = server_timing(replica, routed, monotonic() - began)
    return [*(header for header in headers if header[0] != TOLD), (b"server-timing", value)]


def asks(headers: Headers) -> bool:
    """Whether a request asks for it."""
    return any(name == ASKS for name, _ in headers)


def add_total(headers: list[tuple[bytes, bytes]], began: float) -> None:
    """Tell, with an error of the proxy's own, how long that took."""
    headers.append((b"server-timing", server_timing(b"", 0.0, monotonic() - began)))
