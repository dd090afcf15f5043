"""Every exception of dask_serve, with the HTTP status it becomes and whether trying again is safe.

::

    ServeError
    ├── ConfigError                (ValueError)    an option or a declaration is wrong
    ├── NotRunningError                            dask_serve does not run on this cluster
    ├── ApplicationNotFoundError   (KeyError)      no application, deployment or route of that name
    ├── DeploymentFailedError                      replicas could not be started
    │   └── ConflictError                          another session replaced or deleted the application meanwhile
    ├── StartTimeoutError          (TimeoutError)  replicas are still not up after the time given
    ├── ScoringError                               a partition of a Dask collection could not be scored
    └── RequestError                               one request failed, and not by user code
        ├── MethodNotFoundError    (AttributeError)
        ├── ArgumentsError         (TypeError)     the method does not take these arguments
        ├── DataReferenceError     (ValueError)    what a request refers to data with is no reference
        ├── DataNotFoundError      (KeyError)      there is no such data set for requests, or no such part of it
        ├── BatchError             (ValueError)    a batched method did not return one result for each call
        ├── PayloadError           (TypeError)     an argument or a result cannot be sent
        ├── DeploymentUnavailableError             nothing is there that could answer
        ├── BackPressureError                      refused: too many requests wait already
        ├── RequestTimeoutError    (TimeoutError)  the request's deadline passed
        ├── RequestCancelledError                  the caller cancelled it
        ├── ReplicaLostError                       the worker died with the request or its result
        └── UserCodeError                          stands for an exception that cannot be pickled

What user code raises arrives as itself and is none of these.
"""

from __future__ import annotations

import pickle
from typing import Any

__all__ = [
    "ApplicationNotFoundError",
    "ArgumentsError",
    "BackPressureError",
    "BatchError",
    "ConfigError",
    "ConflictError",
    "DataNotFoundError",
    "DataReferenceError",
    "DeploymentFailedError",
    "DeploymentUnavailableError",
    "MethodNotFoundError",
    "NotRunningError",
    "PayloadError",
    "ReplicaLostError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "ScoringError",
    "ServeError",
    "StartTimeoutError",
    "UserCodeError",
]


class ServeError(Exception):
    """The root of the tree.

    Attributes
    ----------
    status : int
        The HTTP status that an answer made from this error carries.
    retryable : bool
        True where the request was certainly not executed, so that trying again is safe.
    """

    status: int = 500
    retryable: bool = False

    def __str__(self) -> str:
        # KeyError, one of the bases below, would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class ConfigError(ServeError, ValueError):
    """An option or a declaration is wrong; the message names it, its value and the repair."""


class NotRunningError(ServeError):
    """dask_serve does not run on this cluster (or was shut down)."""

    status = 503


class ApplicationNotFoundError(ServeError, KeyError):
    """There is no application, deployment or route of that name; the message lists those there are."""

    status = 404


class DeploymentFailedError(ServeError):
    """Replicas could not be started; the message holds the reason, tracebacks as text included."""

    status = 503


class ConflictError(DeploymentFailedError):
    """Another session replaced or deleted the application meanwhile; the message says who, and when."""

    status = 409


class StartTimeoutError(ServeError, TimeoutError):
    """An application was not running after the time given; the message says what is missing."""

    status = 503


class ScoringError(ServeError):
    """A partition, block or item of a Dask collection could not be scored; the message names it, and why.

    Attributes
    ----------
    deployment : str
        ``app/deployment``.
    partition : int or tuple of int
        Which one: its number, or the index of the block.
    __cause__ : Exception or None
        What went wrong; None where it cannot be pickled.
    """

    def __init__(self, message: str = "", deployment: str = "", partition: Any = None) -> None:
        super().__init__(message, deployment, partition)
        self.deployment = deployment
        self.partition = partition

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            cause = pickle.dumps(self.__cause__)
        except Exception:  # noqa: BLE001 - that of another library
            cause = pickle.dumps(None)
        return _unpickle_scoring_error, (*self.args, cause)


def _unpickle_scoring_error(message: str, deployment: str, partition: Any, cause: bytes) -> ScoringError:
    error = ScoringError(message, deployment, partition)
    try:
        error.__cause__ = pickle.loads(cause)
    except Exception:  # noqa: BLE001 - its class may be missing here
        error.__cause__ = None
    return error


class RequestError(ServeError):
    """One request failed, and not by an exception of user code."""


class MethodNotFoundError(RequestError, AttributeError):
    """The deployment has no such method; the message lists those it has."""

    status = 404
    retryable = False


class ArgumentsError(RequestError, TypeError):
    """The method does not take the arguments of the call; the message tells which, and its signature."""


class DataReferenceError(RequestError, ValueError):
    """What a request refers to data with is no reference; the message says what is wrong with it."""

    status = 400


class DataNotFoundError(RequestError, KeyError):
    """Requests may not refer to a data set of that name, or there is none, or it has no such part."""

    status = 404


class BatchError(RequestError, ValueError):
    """A batched method did not return one result for each call, in their order."""


class PayloadError(RequestError, TypeError):
    """An argument or a result cannot be serialised; only the call that carries it fails."""


class DeploymentUnavailableError(RequestError):
    """The deployment has failed or was deleted: nothing is there that could answer."""

    status = 503
    retryable = True


class BackPressureError(RequestError):
    """Refused before it was executed: too many requests wait already, or its deadline would have been missed.

    Attributes
    ----------
    retry_after_s : float
        Seconds after which trying again makes sense, as far as can be told.
    """

    status = 503
    retryable = True

    def __init__(self, message: str = "", retry_after_s: float = 1.0) -> None:
        retry_after_s = float(retry_after_s)
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(RequestError, TimeoutError):
    """The request's deadline passed; the message says where it was at that moment."""

    status = 504


class RequestCancelledError(RequestError):
    """The caller cancelled the request, or went away."""

    status = 499


class ReplicaLostError(RequestError):
    """The worker process that ran the request, or held its result, is gone."""

    status = 502


class UserCodeError(RequestError):
    """Stands for an exception of user code that cannot be pickled; the message holds its traceback."""
