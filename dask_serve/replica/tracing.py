"""The spans of a replica: each request with its wait and user code, the calls that it makes, and batches."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .. import spans
from ..context import RequestContext

if TYPE_CHECKING:
    from ..routing.outcome import PythonCall
    from .batch_items import Batch
    from .execution import Execution

__all__ = ["BatchSpans", "ReplicaTraces", "RequestSpans"]


class ReplicaTraces:
    """Begins the spans of a replica's requests; they end with those.

    Parameters
    ----------
    replica : str
        The replica's id.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._deployment = replica.rsplit("/", 1)[0]
        spans.tracer()

    def enter(self, execution: Execution, context: RequestContext) -> None:
        """User code begins, or goes on elsewhere: its span is the current one of the present context."""
        if context.spans is None:
            call = execution.call
            attributes = {
                "dask_serve.deployment": self._deployment,
                "dask_serve.replica": self._replica,
                "dask_serve.request_id": call.request_id,
                "code.function.name": call.method,
            }
            name = f"{self._deployment}.{call.method}"
            server = spans.start(name, spans.SERVER, context.trace, since=execution.came, attributes=attributes)
            spans.child("queue", server, execution.came, execution.entered)
            user = spans.start("user code", spans.INTERNAL, server, since=execution.entered)
            context.spans = RequestSpans(server, user, execution)
            if context.leases is None:
                # Who answers it looks there, whether something is to end.
                context.leases = {}
            context.trace = spans.trace_of(user)
        spans.attach(context.spans.user)


class RequestSpans:
    """The spans of one request.

    Attributes
    ----------
    user : span
        Of user code: what it does belongs to that.
    """

    def __init__(self, server: Any, user: Any, execution: Execution | None = None) -> None:
        self.user = user
        self._server = server
        self._execution = execution
        #: Those of calls that it has under way.
        self._calls: dict[Any, Any] = {}

    def call(self, id: str, state: PythonCall) -> None:
        """It calls another deployment; ends with `forget`."""
        attributes = {"dask_serve.deployment": id, "dask_serve.request_id": state.request_id}
        span = spans.start(
            f"call {id}.{state.method}", spans.CLIENT, spans.current() or self.user, attributes=attributes
        )
        state.trace = spans.trace_of(span)
        self._calls[state] = span

    def forget(self, work: Any) -> None:
        """Something that it had under way has ended: a call, perhaps."""
        span = self._calls.pop(work, None)
        if span is None:
            return
        if work.sent:
            spans.child("queue", span, work.since, abs(work.sent))
        if work.status != "finished":
            spans.set_failed(span, work.status)
        span.end()

    def begin_batch(self, batch: Batch) -> None:
        """A batch begins whose first request this is, or another part of it."""
        context = batch.context
        if context.spans is None:
            others = [request.spans for request in context.requests if request.spans is not None]
            now = time.monotonic()
            for item in batch.items:
                if item.request is not None and item.request.spans is not None:
                    spans.child("wait for batch", item.request.spans.user, item.since, now)
            links = [other.user for other in others[1:]]
            attributes = {"dask_serve.batch_size": len(batch.items)}
            span = spans.start(f"batch {batch.name}", spans.INTERNAL, self.user, attributes=attributes, links=links)
            for other in links:
                spans.link(other, span)
            context.spans = BatchSpans(span, span)
            context.trace = spans.trace_of(span)
        spans.attach(context.spans.user)

    def failed(self, error: BaseException) -> None:
        """User code has raised."""
        for span in {self.user, self._server}:
            spans.set_failed(span, type(error).__qualname__)

    def end(self) -> None:
        """It has been answered."""
        execution, self._execution = self._execution, None
        ended = (0.0 if execution is None else execution.ended) or time.monotonic()
        spans.end(self.user, ended)
        if self._server is not self.user:
            spans.end(self._server, ended)


class BatchSpans(RequestSpans):
    """The one span of a batch, which stands for both."""
