"""From an application, a graph of bound deployments, to what the controller is given."""

from __future__ import annotations

import dataclasses
import re
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..deployment import Application, Deployment, check_name, methods, rows
from ..exceptions import ConfigError
from ..ingress import ingress_of
from ..policy.desired import ApplicationSpec, DeploymentSpec, Source, deployment_id
from .apps import app_reducers
from .code import REPAIR, bound_handle, pack
from .environment import resolve
from .revision import revision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Builder", "Built", "Unbound", "applications_in", "build", "check_route"]

#: What to do about an application that cannot be pickled.
_BUILDER = (
    "Create it in `__init__` of the class, in the application's lifespan, or together with the application in a "
    "function that runs on the worker: `def build(): ...; return app` and `@serve.ingress(build)`."
)


class Built(Struct, frozen=True):
    """An application as it goes to the controller."""

    spec: ApplicationSpec
    #: Blobs by revision, and the files of environments by their keys.
    code: dict[str, bytes]


def build(
    target: Application,
    name: str = "default",
    route_prefix: str | None = "/",
    *,
    change: Callable[[str, Deployment], Deployment] | None = None,
    source: Source | None = None,
) -> Built:
    """Turn an application into its deployments: bound applications become handles, code becomes bytes.

    Parameters
    ----------
    target : Application
        Its deployment is the ingress.
    name : str
        Name of the application.
    route_prefix : str or None
        Where HTTP finds it; None: nowhere.
    change : callable, optional
        Gets each deployment with its name, and returns what to take in its place.
    source : Source, optional
        Where it was loaded from.

    Raises
    ------
    ConfigError
        A name or the route is not valid, or something cannot be sent to the workers.
    """
    check_name(name, "an application")
    builder = Builder(name, change)
    ingress = builder.add(target)
    spec = ApplicationSpec(
        name=name,
        route_prefix=check_route(route_prefix),
        ingress=ingress,
        deployments=builder.specs,
        source=source,
    )
    return Built(spec=spec, code=builder.code)


def check_route(prefix: Any) -> str | None:
    """Return a route prefix, or raise `ConfigError` where it is none."""
    if prefix is None:
        return None
    if not isinstance(prefix, str) or not re.fullmatch(r"/|(/[^/{}?#\s]+)+", prefix):
        raise ConfigError(
            f'route_prefix must start with "/" and not end with it (except for "/" itself), without braces, spaces, '
            f'"?" and "#", or be None for no HTTP; not {prefix!r}'
        )
    return prefix


class Builder:
    """Goes through an application, and gives each of its deployments a name of its own."""

    def __init__(self, app: str, change: Callable[[str, Deployment], Deployment] | None = None) -> None:
        self.app = app
        self._change = change
        self.specs: list[DeploymentSpec] = []
        self.code: dict[str, bytes] = {}
        # Held by object and not only by id, so that no id can be used twice.
        self._names: dict[int, tuple[Application, str]] = {}

    def add(self, application: Application) -> str:
        """Build an application and what it is bound to, once; return the name of its deployment."""
        if id(application) in self._names:
            return self._names[id(application)][1]
        name = self._unique(application.deployment.name)
        self._names[id(application)] = application, name
        for child in applications_in((application.args, application.kwargs)):
            self.add(child)
        self._pack(application, name)
        return name

    def _unique(self, name: str) -> str:
        taken = {other for _, other in self._names.values()}
        if name not in taken:
            return name
        number = next(n for n in range(1, len(taken) + 2) if f"{name}_{n}" not in taken)
        warnings.warn(
            f"application {self.app!r} has several deployments called {name!r}: one of them is deployed as "
            f"'{name}_{number}'. Name them with .options(name=...), or bind one application to several places to "
            "share it.",
            UserWarning,
            stacklevel=2,
        )
        return f"{name}_{number}"

    def _pack(self, application: Application, name: str) -> None:
        deployment = application.deployment
        if self._change is not None:
            deployment = self._change(name, deployment)
        ingress = ingress_of(deployment.func_or_class)
        packed = pack(
            deployment.func_or_class,
            application.args,
            application.kwargs,
            where=f"deployment {name!r}",
            reducers={Application: self._reduce, **(app_reducers(ingress) if ingress is not None else {})},
            repair=REPAIR if ingress is None else _BUILDER,
        )
        environment, archives = resolve(deployment.all_options.runtime_env, f"deployment {name!r}")
        identity = deployment_id(self.app, name)
        revised = revision(packed, deployment.all_options, identity, "" if environment is None else environment.id)
        self.code.update({**archives, revised: packed.blob})
        self.specs.append(
            DeploymentSpec(
                name=name,
                revision=revised,
                options=deployment.all_options,
                methods=methods(deployment.func_or_class),
                keys=packed.keys,
                environment=environment,
                rows=rows(deployment.func_or_class),
            )
        )

    def _reduce(self, application: Application) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        known = self._names.get(id(application))
        if known is not None:
            return bound_handle, (self.app, known[1])
        # Code of a module may mention applications that it does not use; they are left behind.
        return unbound, (application.deployment.name,)


class Unbound:
    """Stands on a worker for an application that was not among the bound arguments."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ConfigError(
            f"the application of deployment {self._name!r} is no handle here: bind it into the deployment that uses "
            "it, as an argument or inside a list, tuple, set, dict, dataclass or the like"
        )


def unbound(name: str) -> Unbound:
    """Stand in a blob for an application that was not bound."""
    return Unbound(name)


def applications_in(value: Any, seen: set[int] | None = None) -> Iterator[Application]:
    """Find the applications inside bound arguments, in order."""
    seen = set() if seen is None else seen
    if isinstance(value, Application):
        yield value
        return
    items: Any = ()
    if isinstance(value, dict):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = value
    elif not isinstance(value, type):
        items = [getattr(value, name, None) for name in _fields(value)]
    if items and id(value) not in seen:
        seen.add(id(value))
        for item in items:
            yield from applications_in(item, seen)


def _fields(value: Any) -> Iterable[str]:
    """Return the names of an object's declared fields: of a dataclass, attrs, msgspec, pydantic, a namespace."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, SimpleNamespace):
        return vars(value)
    kind = type(value)
    attrs = getattr(kind, "__attrs_attrs__", None)
    if attrs is not None:
        return [attribute.name for attribute in attrs]
    return getattr(kind, "__struct_fields__", None) or getattr(kind, "model_fields", None) or ()
