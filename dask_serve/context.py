"""What user code can ask about where and for whom it runs."""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

from .exceptions import ServeError

__all__ = [
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
    multiplexed_model_id : str
        The model that the request is for, or "". See `get_multiplexed_model_id`.
    background : bool
        The request lets online ones go first; so do the calls that it makes.
    """

    request_id: str
    deadline: float | None = None
    multiplexed_model_id: str = ""
    background: bool = False

    @property
    def request_class(self) -> str:
        """``"online"`` or ``"background"``."""
        return "background" if self.background else "online"


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
