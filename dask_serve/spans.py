"""OpenTelemetry: the one place that knows it. Imported only where spans are asked for.

A process whose program has set a tracer provider uses that. Elsewhere one is made as the environment says: by
``OTEL_TRACES_EXPORTER``, ``OTEL_EXPORTER_OTLP_*``, ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME`` and their like.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from .exceptions import ConfigError
from .policy.tracing import Trace

try:
    from opentelemetry import context as otel_context
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError(
        f"tracing=True needs OpenTelemetry, which this process does not have ({error}): "
        "install dask-serve[otel] where proxies and replicas run, or leave tracing out"
    ) from None

__all__ = ["attach", "child", "current", "end", "link", "set_failed", "start", "trace_of"]

logger = logging.getLogger("dask_serve.spans")

CLIENT, INTERNAL, SERVER = trace.SpanKind.CLIENT, trace.SpanKind.INTERNAL, trace.SpanKind.SERVER

_propagator = TraceContextTextMapPropagator()
_lock = threading.Lock()
_tracer: Any = None


def start(
    name: str,
    kind: Any,
    parent: Any,
    *,
    since: float | None = None,
    attributes: Mapping[str, Any] | None = None,
    links: Sequence[Any] = (),
) -> Any:
    """Begin a span.

    Parameters
    ----------
    name : str
    kind : opentelemetry.trace.SpanKind
    parent : span, (traceparent, tracestate) or None
    since : float, optional
        Monotonic time of its beginning; by default now.
    attributes : dict, optional
    links : sequence of spans
        Others that it belongs to.
    """
    if parent is None:
        above = otel_context.Context()
    elif isinstance(parent, tuple):
        above = _propagator.extract({"traceparent": parent[0], "tracestate": parent[1]}, otel_context.Context())
    else:
        above = trace.set_span_in_context(parent, otel_context.Context())
    return tracer().start_span(
        name,
        above,
        kind,
        attributes=attributes,
        links=[trace.Link(other.get_span_context()) for other in links],
        start_time=None if since is None else epoch(since),
    )


def child(name: str, parent: Any, since: float, until: float) -> None:
    """Tell of a part of a span that has ended."""
    if parent.is_recording():
        end(start(name, INTERNAL, parent, since=since), until)


def end(span: Any, until: float) -> None:
    """End a span at a monotonic time. Both clocks are read anew each time, and not at the same moment."""
    span.end(max(epoch(until), getattr(span, "start_time", None) or 0))


def link(span: Any, other: Any) -> None:
    """Let a span that has begun refer to another one."""
    span.add_link(other.get_span_context())


def set_failed(span: Any, kind: str) -> None:
    """Mark a span as failed, with the name of what went wrong. The text of an error may hold what was asked."""
    span.set_status(trace.Status(trace.StatusCode.ERROR))
    span.set_attribute("error.type", kind)


def trace_of(span: Any) -> Trace:
    """Return what travels with calls that are made within a span."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, otel_context.Context()))
    return carrier.get("traceparent", ""), carrier.get("tracestate", "")


def attach(span: Any) -> None:
    """Make a span the current one of the present context, which is that of one request."""
    otel_context.attach(trace.set_span_in_context(span))


def current() -> Any:
    """Return the current span of the present context, or None."""
    span = trace.get_current_span()
    return span if span.get_span_context().is_valid else None


def epoch(moment: float) -> int:
    """Return a monotonic time as spans have it: nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)


def tracer() -> Any:
    """Return the tracer of this process; the first call looks at the environment."""
    global _tracer
    if _tracer is None:
        with _lock:
            if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
                trace.set_tracer_provider(_provider())
            _tracer = trace.get_tracer("dask_serve")
    return _tracer


def _provider() -> TracerProvider:
    attributes = {"service.instance.id": f"{socket.gethostname()}:{os.getpid()}"}
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = "dask-serve"
    provider = TracerProvider(resource=Resource.create(attributes))
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        exporter = _exporter(name.strip())
        if exporter is not None:
            provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(name: str) -> Any:
    if name in {"", "none"}:
        return None
    if name == "console":
        return ConsoleSpanExporter()
    for found in _names(name):
        for point in entry_points(group="opentelemetry_traces_exporter", name=found):
            try:
                return point.load()()
            except Exception as error:  # noqa: BLE001 - code of others
                logger.warning("Spans are not exported: the exporter %r does not start: %s", found, error)
                return None
    logger.warning(
        "Spans are not exported: there is no exporter %r here; install opentelemetry-exporter-otlp-proto-http, or set "
        "OTEL_TRACES_EXPORTER to one that is installed, or to none",
        name,
    )
    return None


def _names(name: str) -> Sequence[str]:
    """Return the entry points that an exporter may have."""
    if name != "otlp":
        return (name,)
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", ""))
    both = ("otlp_proto_http", "otlp_proto_grpc")
    return ("otlp_proto_grpc",) if protocol == "grpc" else both[:1] if protocol else both
