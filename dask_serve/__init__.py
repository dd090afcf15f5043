"""Online serving of Python models on a Dask cluster.

The idiom is ``import dask_serve as serve``. Names are looked up when they are first used: a proxy process imports
parts of this package and must not pay for Dask.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics, testing
    from .api import (
        delete,
        get_app_handle,
        get_deployment_handle,
        run,
        shutdown,
        start,
        status,
        url,
    )
    from .batching import batch, method
    from .context import get_multiplexed_model_id, get_replica_context, get_request_context
    from .data import resolve
    from .deployment import Application, Deployment, deployment
    from .exceptions import (
        ApplicationNotFoundError,
        ArgumentsError,
        BackPressureError,
        BatchError,
        ConfigError,
        ConflictError,
        DataNotFoundError,
        DataReferenceError,
        DeploymentFailedError,
        DeploymentUnavailableError,
        MethodNotFoundError,
        NotRunningError,
        PayloadError,
        ReplicaLostError,
        RequestCancelledError,
        RequestError,
        RequestTimeoutError,
        ScoringError,
        ServeError,
        StartTimeoutError,
        UserCodeError,
    )
    from .gathering import gather
    from .handle import DeploymentHandle
    from .ingress import ingress
    from .mapping import RefMap
    from .multiplex import multiplexed
    from .response import DeploymentResponse
    from .streaming import DeploymentResponseGenerator
    from .versions import history, rollback, scale

__version__ = "0.1.0"

__all__ = [
    "Application",
    "ApplicationNotFoundError",
    "ArgumentsError",
    "BackPressureError",
    "BatchError",
    "ConfigError",
    "ConflictError",
    "DataNotFoundError",
    "DataReferenceError",
    "Deployment",
    "DeploymentFailedError",
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "DeploymentUnavailableError",
    "MethodNotFoundError",
    "NotRunningError",
    "PayloadError",
    "RefMap",
    "ReplicaLostError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "ScoringError",
    "ServeError",
    "StartTimeoutError",
    "UserCodeError",
    "__version__",
    "batch",
    "delete",
    "deployment",
    "gather",
    "get_app_handle",
    "get_deployment_handle",
    "get_multiplexed_model_id",
    "get_replica_context",
    "get_request_context",
    "history",
    "ingress",
    "method",
    "metrics",
    "multiplexed",
    "resolve",
    "rollback",
    "run",
    "scale",
    "shutdown",
    "start",
    "status",
    "testing",
    "url",
]

_MODULES = {
    "api": (
        "delete",
        "get_app_handle",
        "get_deployment_handle",
        "run",
        "shutdown",
        "start",
        "status",
        "url",
    ),
    "batching": ("batch", "method"),
    "context": ("get_multiplexed_model_id", "get_replica_context", "get_request_context"),
    "data": ("resolve",),
    "deployment": ("Application", "Deployment", "deployment"),
    "gathering": ("gather",),
    "handle": ("DeploymentHandle",),
    "ingress": ("ingress",),
    "mapping": ("RefMap",),
    "multiplex": ("multiplexed",),
    "response": ("DeploymentResponse",),
    "streaming": ("DeploymentResponseGenerator",),
    "versions": ("history", "rollback", "scale"),
}
#: Modules that are part of the API as such: ``serve.metrics.Counter``.
_PARTS = ("metrics", "testing")
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f".{name}", __name__)
    home = _HOME.get(name)
    if home is None and name in __all__:
        home = "exceptions"
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps ``serve.deployment`` and ``serve.ingress`` the decorators, although submodules have the same names."""

    @property
    def deployment(self) -> Any:
        return importlib.import_module(".deployment", __name__).deployment

    @deployment.setter
    def deployment(self, submodule: types.ModuleType) -> None:
        """Importing a submodule binds it here; that must not hide the decorator."""

    @property
    def ingress(self) -> Any:
        return importlib.import_module(".ingress", __name__).ingress

    @ingress.setter
    def ingress(self, submodule: types.ModuleType) -> None:
        """As above."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By name, as cloudpickle does with plain modules: user code mentions `serve`.
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
