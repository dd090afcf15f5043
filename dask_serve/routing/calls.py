"""A request on the caller's side, from the router's queue to its one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from ..exceptions import RequestError
from ..wire.frames import Buffer
from ..wire.messages import Attachment, Chunk, Event, Failure, HttpHead, Reply

__all__ = ["Outgoing"]

#: Values of `Outgoing.retries`: as the deployment declares, and where it declares nothing never, or once.
AS_DECLARED, ONCE = -1, -2


class Outgoing:
    """One request of a router. Subclasses say what becomes of its answer.

    Exactly one of `on_result`, `on_error` (an ERROR frame) and `fail` (decided on this side) is called, on the
    router's loop; for a streamed answer after any number of `on_chunk`, with `on_result` as its end.

    Attributes
    ----------
    timeout : float or None
        Seconds until the deadline when the request came to the router.
    retries : int
        How often it may be sent again after its replica was lost; `AS_DECLARED` or `ONCE` until that matters.
    model_id : str
        The model that it is for, or "".
    background : bool
        It lets others go first while it waits at the router.
    trace : tuple of str or None
        ``traceparent`` and ``tracestate`` of the request that makes the call.
    stream : bool
        The answer is a stream of Python objects.
    prefers : frozenset of str or None
        Processes (incarnations) or workers (addresses) that have its largest argument.
    follows : bool
        ``parts`` is not all: the rest of the body, or a WebSocket's messages, follow once `on_window` was called.
    patient : bool
        It waits for as long as it takes: what the deployment declares of deadlines and queues is not for it.
    """

    stream: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    patient: ClassVar[bool] = False

    __slots__ = (
        "attachments",
        "background",
        "deadline",
        "dropped",
        "found",
        "http",
        "method",
        "model_id",
        "number",
        "parts",
        "prefers",
        "request_id",
        "retries",
        "sent",
        "since",
        "target",
        "timer",
        "trace",
        "urgent",
    )

    def __init__(
        self,
        method: str,
        parts: Sequence[Buffer],
        request_id: str,
        http: HttpHead | None = None,
        attachments: Sequence[Attachment] = (),
    ) -> None:
        self.method = method
        self.parts = parts
        self.request_id = request_id
        self.http = http
        self.attachments = attachments
        self.retries = AS_DECLARED
        self.model_id = ""
        self.background = False
        self.trace: tuple[str, str] | None = None
        self.prefers: frozenset[str] | None = None
        #: Admitted even where results have no room. What comes over HTTP leaves none.
        self.urgent = http is not None
        self.since = 0.0
        #: When it was sent, negative once what it took is noted, and how many others were at its replica; 0.0: not yet.
        self.sent = 0.0
        self.found = 0
        #: Monotonic time; None: no deadline.
        self.deadline: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        #: Given up by the caller, or past its deadline: its answer, if one comes, is dropped.
        self.dropped = False
        #: Where it is: the target and its number on that connection; None while it waits here.
        self.target: Any = None
        self.number = 0

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        """The answer, or the end of a streamed one."""
        raise NotImplementedError

    def on_chunk(self, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        """A piece of a streamed answer."""
        raise NotImplementedError

    def on_window(self, nbytes: int) -> None:
        """The replica takes so many bytes more; the first time: it has accepted the request."""
        raise NotImplementedError

    def on_event(self, event: Event, parts: Sequence[Buffer]) -> None:
        """A step of a WebSocket."""
        raise NotImplementedError

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        """The replica answered with an error."""
        raise NotImplementedError

    def fail(self, error: RequestError) -> None:
        """The request failed on this side."""
        raise NotImplementedError
