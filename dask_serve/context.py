"""What user code can ask about where and for whom it runs."""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

from .exceptions import ServeError

__all__ = ["ReplicaContext", "RequestContext", "get_replica_context", "get_request_context"]


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
        The instance of the user's class (or the user's function).
    """

    app_name: str
    deployment: str
    replica_id: str
    worker: str
    servable_object: Any


class RequestContext(NamedTuple):
    """For whom this code runs.

    Attributes
    ----------
    request_id : str
        The same through a whole chain of calls; over HTTP the ``X-Request-ID``.
    deadline : float or None
        Monotonic time by which the answer is due.
    """

    request_id: str
    deadline: float | None = None


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
