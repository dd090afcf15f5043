"""One request in a replica, from its CALL frame to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..context import RequestContext
from ..policy.timing import ASKS, told
from ..policy.tracing import Trace, read_trace
from ..wire.frames import Buffer
from ..wire.messages import MODEL_ID_HEADERS, Call, model_id_of

if TYPE_CHECKING:
    from .core import ReplicaCore
    from .inflow import Inflow
    from .outflow import Outflow

__all__ = ["Answer", "Execution"]


class Answer(Struct, frozen=True, gc=False):
    """What user code answered, on its way from a user thread to the door."""

    kind: int
    parts: Sequence[Buffer] = ()
    #: Name of the exception class, or "" for an exception of user code (kind ERROR).
    error: str = ""
    message: str = ""
    #: Of a BackPressureError.
    retry_after: float | None = None
    #: Name and size in the result store.
    stored: str = ""
    nbytes: int = 0
    #: HTTP status and headers.
    status: int = 0
    headers: list[tuple[bytes, bytes]] = []


class Execution:
    """One admitted request.

    The door's thread owns it; a user thread reads ``call`` and ``parts``, and sets ``task`` and ``started``.
    """

    __slots__ = (
        "answered",
        "began",
        "begun",
        "blocking",
        "call",
        "came",
        "cancelled",
        "connection",
        "core",
        "deadline",
        "ended",
        "entered",
        "found",
        "inflow",
        "least",
        "left",
        "on_cancel",
        "outflow",
        "parts",
        "request",
        "running",
        "started",
        "succeeded",
        "task",
        "timed",
        "user_context",
    )

    def __init__(  # noqa: PLR0917
        self, core: ReplicaCore, connection: Any, request: int, call: Call, parts: Sequence[Buffer], now: float
    ) -> None:
        self.core = core
        self.connection = connection
        self.request = request
        self.call = call
        self.parts = parts
        self.deadline = None if call.remaining is None else now + call.remaining
        self.came = self.began = now
        #: When user code began, and ended; 0.0: not yet.
        self.entered = 0.0
        self.ended = 0.0
        #: Requests that were in the replica when it came.
        self.found = 0
        #: Seconds that it takes at least; 0.0 where the replica has nothing else to do.
        self.least = 0.0
        #: Left the waiting line: user code has it.
        self.running = False
        #: User code runs, or did. Set before it looks at ``cancelled``, which is set before the door looks at this.
        self.begun = False
        self.cancelled = False
        #: Another request has its slot already: the user's thread went on with that.
        self.succeeded = False
        #: Cancelled before user code began, and answered: what comes from user threads is of no interest.
        self.left = False
        #: User code runs in a thread of the pool, where nothing can interrupt it.
        self.blocking = False
        #: The answer is to tell how long it waited and ran.
        self.timed = False
        #: What user code sees of it.
        self.user_context: RequestContext | None = None
        #: The answer is written already; only the books are left to be kept.
        self.answered = False
        #: A part of the answer has been sent.
        self.started = False
        self.task: asyncio.Task[None] | None = None
        #: The parts of a streamed answer on their way out.
        self.outflow: Outflow | None = None
        #: What the caller sends behind the call.
        self.inflow: Inflow | None = None
        self.on_cancel: asyncio.Event | None = None

    def context(self) -> RequestContext:
        """What user code can ask about the request."""
        context = self.user_context
        if context is None:
            call = self.call
            if call.http is None:
                model_id, trace = call.model_id, call.trace
            else:
                model_id, trace, self.timed = _asked(call.http.headers)
            context = RequestContext(call.request_id, self.deadline, model_id, call.background, trace)
            self.user_context = context
        return context

    def timing(self) -> tuple[bytes, bytes]:
        """Return the header that tells the proxy how long it waited here and ran."""
        return told(self.entered - self.came, time.monotonic() - self.entered)


def _asked(headers: Sequence[tuple[bytes, bytes]]) -> tuple[str, Trace | None, bool]:
    """Return the model that an HTTP request is for, the trace it belongs to, and whether it asks for times."""
    for name, _ in headers:
        if name in _ASKED:
            return model_id_of(headers), _trace(headers), any(name == ASKS for name, _ in headers)
    return "", None, False


def _trace(headers: Sequence[tuple[bytes, bytes]]) -> Trace | None:
    parents = [value for name, value in headers if name == b"traceparent"]
    return read_trace(parents, [value for name, value in headers if name == b"tracestate"])


_ASKED = frozenset({*MODEL_ID_HEADERS, b"traceparent", b"tracestate", ASKS})
