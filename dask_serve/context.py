"""What user code can ask about where and for whom it runs."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .exceptions import ServeError

__all__ = [
    "BatchContext",
    "ReplicaContext",
    "RequestContext",
    "get_multiplexed_model_id",
    "get_replica_context",
    "get_request_context",
]


class ReplicaContext(NamedTuple):
    """Where this code runs.

    Attributes
    ----------
    app_name, deployment : str
        Names of the application and the deployment.
    replica_id : str
        Unique for ever.
    worker : str
        Dask address of the worker.
    servable_object : object
        The instance of the user's class (or the user's function); None while it is constructed.
    devices : tuple of int
        The devices that the option ``gpus`` gave to this replica, by their numbers in this process: use
        ``torch.device("cuda", device)``. All replicas of a process see the same devices, so it has to keep to its own.
    """

    app_name: str
    deployment: str
    replica_id: str
    worker: str
    servable_object: Any
    devices: tuple[int, ...] = ()


class RequestContext:
    """For whom this code runs.

    It also knows what the request has under way (the calls that it made, threads that wait for it), so that all of that
    ends when the request is cancelled. What has ended is forgotten at once; the end of the request itself ends nothing.

    Attributes
    ----------
    request_id : str
        The same through a whole chain of calls; over HTTP the ``X-Request-ID``.
    request_ids : tuple of str
        In a batch those of all its calls, else that one.
    deadline : float or None
        Monotonic time by which the answer is due.
    multiplexed_model_id : str
        The model that the request is for, or "". See `get_multiplexed_model_id`.
    background : bool
        The request lets online ones go first; so do the calls that it makes.
    cancelled : bool
        Nobody wants the answer any more. A ``def`` that computes for long may look at it.
    trace : tuple of str or None
        ``traceparent`` and ``tracestate`` together, as calls made onward carry them; None without a trace.
    """

    __slots__ = (
        "__weakref__",
        "_refuses",
        "_under_way",
        "background",
        "cancelled",
        "deadline",
        "leases",
        "multiplexed_model_id",
        "request_id",
        "spans",
        "trace",
    )

    def __init__(
        self,
        request_id: str,
        deadline: float | None = None,
        multiplexed_model_id: str = "",
        background: bool = False,
        trace: tuple[str, str] | None = None,
    ) -> None:
        self.request_id = request_id
        self.deadline = deadline
        self.multiplexed_model_id = multiplexed_model_id
        self.background = background
        self.trace = trace
        self.cancelled = False
        #: What gives back at its end what the request has the use of: models. Not None where something is to end.
        self.leases: dict[Any, Callable[[RequestContext], object]] | None = None
        #: Its OpenTelemetry spans, where the deployment has ``tracing``.
        self.spans: Any = None
        self._refuses = False
        #: By what is under way: how it is cancelled. Made with the first call, since most requests make none.
        self._under_way: dict[Any, Callable[[], object]] | None = None

    def __repr__(self) -> str:
        return f"<RequestContext {self.request_id}{', cancelled' if self.cancelled else ''}>"

    @property
    def request_class(self) -> str:
        """``"online"`` or ``"background"``."""
        return "background" if self.background else "online"

    @property
    def traceparent(self) -> str:
        """The W3C trace context of the request, as its client sent it; "" without a valid one."""
        return "" if self.trace is None else self.trace[0]

    @property
    def tracestate(self) -> str:
        """What goes with `traceparent`, or ""."""
        return "" if self.trace is None else self.trace[1]

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The request's id; in a batch those of all its calls."""
        return (self.request_id,)

    @property
    def refuses(self) -> bool:
        """It begins nothing any more: the code that it runs cannot be told otherwise that it was cancelled."""
        return self._refuses

    def refuses_call(self, call: Any, id: str) -> bool:
        """Whether it begins no call any more; one that it begins belongs to its spans, if it has any."""
        if self.spans is not None:
            # It hears of the call's end, whatever that is.
            call.request = self
            self.spans.call(id, call)
        return self._refuses

    def note(self, work: Any, cancel: Callable[[], object]) -> None:
        """Cancel ``work`` with the request, until `forget` is called. From any thread.

        A request that begins nothing any more cancels it at once. Who notes something that may have ended meanwhile
        forgets it then.
        """
        under_way = self._under_way
        if under_way is None:
            with _making:
                under_way = self._under_way
                if under_way is None:
                    under_way = self._under_way = {}
        under_way[work] = cancel
        # The other half is in `cancel`: whichever of the two comes second sees the other.
        if self._refuses:
            cancel()

    def forget(self, work: Any) -> None:
        """Its end: ``work`` is not under way any more. From any thread; takes no lock."""
        if self.spans is not None:
            self.spans.forget(work)
        if self._under_way is not None:
            self._under_way.pop(work, None)

    def end(self) -> None:
        """It is answered: give back what it has the use of. From any thread."""
        leases, self.leases = self.leases, None
        for give_back in list((leases or {}).values()):
            give_back(self)
        if self.spans is not None:
            self.spans.end()

    def cancel(self, refuse: bool) -> None:
        """Cancel what is under way.

        Parameters
        ----------
        refuse : bool
            Begin nothing afterwards either. For a ``def``, whose code cannot be interrupted where it runs; a coroutine
            is told by its ``CancelledError``, and may call whatever it needs for cleaning up.
        """
        self.cancelled = True
        self._refuses = self._refuses or refuse
        if self._under_way:
            for cancel in list(self._under_way.values()):
                cancel()


class BatchContext(RequestContext):
    """For whom a batch runs: several requests at once.

    ``request_id`` is that of the first one, the deadline that of the last. It is cancelled when nobody waits any more.

    Parameters
    ----------
    requests : sequence of RequestContext
    """

    __slots__ = ("requests",)

    def __init__(self, requests: Sequence[RequestContext]) -> None:
        first = requests[0] if requests else RequestContext("")
        deadlines = [request.deadline for request in requests]
        latest = None if not deadlines or None in deadlines else max(filter(None, deadlines))
        background = bool(requests) and all(request.background for request in requests)
        trace = first.trace if len(requests) == 1 else None
        super().__init__(first.request_id, latest, first.multiplexed_model_id, background, trace)
        self.requests = tuple(requests)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the requests, in the order of the batch."""
        return tuple(request.request_id for request in self.requests)


#: Two threads of one request may make their first calls at once.
_making = threading.Lock()


replica_context: contextvars.ContextVar[ReplicaContext] = contextvars.ContextVar("dask_serve_replica")
request_context: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar(
    "dask_serve_request", default=None
)


def get_replica_context() -> ReplicaContext:
    """Return the replica that runs this code.

    Raises
    ------
    ServeError
        This code does not run in a replica.
    """
    try:
        return replica_context.get()
    except LookupError:
        raise ServeError("get_replica_context() works inside a replica only") from None


def get_request_context() -> RequestContext:
    """Return the request that this code works for.

    Raises
    ------
    ServeError
        This code does not work for a request.
    """
    context = request_context.get()
    if context is None:
        raise ServeError("get_request_context() works while a request is answered only")
    return context


def get_multiplexed_model_id() -> str:
    """Return the model that the request is for.

    It is the option ``multiplexed_model_id`` of the handle that was called, or the HTTP header
    ``serve_multiplexed_model_id``.

    Returns
    -------
    str
        ``""`` where the caller gave none. Calls that the request makes in turn have none either, unless it is given.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Models:
    ...     def predict(self, x):
    ...         return serve.get_multiplexed_model_id(), x
    >>> # handle.predict.options(multiplexed_model_id="small").remote(1)

    Raises
    ------
    ServeError
        This code does not work for a request.
    """
    context = request_context.get()
    if context is None:
        raise ServeError("get_multiplexed_model_id() works while a request is answered only")
    return context.multiplexed_model_id
