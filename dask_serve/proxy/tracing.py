"""The spans of a proxy: one for each request, and how long it waited for a replica."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.types import Scope

from .. import spans
from ..policy.tracing import read_trace
from .calls import HttpCall

__all__ = ["ProxyTraces"]

#: Where the scope of a request holds its `_Traced`.
TRACED = "dask_serve.traced"
_CONTEXT = frozenset({b"traceparent", b"tracestate"})


class _Traced(NamedTuple):
    span: Any
    #: The request's call, once there is one.
    calls: list[HttpCall]


class ProxyTraces:
    """Begins and ends the spans of requests."""

    def __init__(self) -> None:
        # The first request need not wait for what the environment asks for.
        spans.tracer()

    def begin(self, scope: Scope, prefix: str, request_id: str) -> None:
        """Begin a request's span, and let what it becomes belong to it.

        Parameters
        ----------
        scope : dict
            Its headers are replaced: the trace of the client by the span.
        prefix : str
            The route, or "".
        request_id : str
        """
        headers = scope["headers"]
        parents = [value for name, value in headers if name == b"traceparent"]
        parent = read_trace(parents, [value for name, value in headers if name == b"tracestate"]) if parents else None
        method = scope.get("method", "WEBSOCKET")
        attributes = {
            "http.request.method": method,
            "http.route": prefix,
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
            "dask_serve.request_id": request_id,
        }
        span = spans.start(f"{method} {prefix}".strip(), spans.SERVER, parent, attributes=attributes)
        traceparent, tracestate = spans.trace_of(span)
        kept = [header for header in headers if header[0] not in _CONTEXT]
        kept.append((b"traceparent", traceparent.encode()))
        if tracestate:
            kept.append((b"tracestate", tracestate.encode()))
        scope["headers"] = kept
        scope[TRACED] = _Traced(span, [])

    def submitted(self, scope: Scope, call: HttpCall) -> None:
        """It has become a call."""
        scope[TRACED].calls.append(call)

    def end(self, scope: Scope, status: int, deployment: str) -> None:
        """It has been answered."""
        traced = scope.get(TRACED)
        if traced is None:
            return
        span, calls = traced
        if calls and calls[0].sent:
            spans.child("queue", span, calls[0].since, abs(calls[0].sent))
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("dask_serve.deployment", deployment)
        if status >= 500:
            spans.set_failed(span, str(status))
        span.end()
