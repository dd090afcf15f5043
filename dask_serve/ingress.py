"""ASGI applications as deployments: ``@serve.ingress(app)``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .exceptions import ConfigError

__all__ = ["Ingress", "ingress", "ingress_of", "is_asgi", "methods_by_id", "owner_of", "routes_of"]

Class = TypeVar("Class", bound=type)

#: Where a class keeps its application.
_ATTRIBUTE = "__serve_ingress__"

_BELOW = "write @serve.ingress(app) on the line below @serve.deployment, above the class"


class Ingress:
    """The application of a class, or the function that builds it in the replica.

    Attributes
    ----------
    app : ASGI application or callable
        What was given to `ingress`.
    is_builder : bool
        ``app`` is called for the application.
    takes_instance : bool
        The builder is given the instance of the user's class.
    """

    def __init__(self, app: Any, is_builder: bool, takes_instance: bool) -> None:
        self.app = app
        self.is_builder = is_builder
        self.takes_instance = takes_instance


def ingress(app: Any, /) -> Callable[..., Any]:
    """Let an ASGI application answer a deployment's HTTP requests.

    Goes below ``@serve.deployment`` on a class. Routes of a FastAPI application may be methods of that class: their
    ``self`` is the replica's instance. The class has its methods for handles as any other, and no ``__call__``.

    Each replica has the application for itself, as it was when `run` was called: it is made again there from its
    declarations, starts (lifespan) once the instance is there, and ends with the replica. One that cannot travel is
    built there by a function.

    Parameters
    ----------
    app : ASGI application or function
        FastAPI, a FastAPI ``APIRouter``, Starlette or anything else that is called with ``(scope, receive, send)``;
        or a function, ``def`` or ``async def``, that is called in the replica and returns one. A function with one
        parameter is given the instance of the class.

    Returns
    -------
    callable
        The decorator. Called without a class it returns one that has nothing but the application.

    Examples
    --------
    >>> import dask_serve as serve
    >>> from fastapi import FastAPI
    >>> app = FastAPI()
    >>> @serve.deployment
    ... @serve.ingress(app)
    ... class Shop:
    ...     def __init__(self, prices):
    ...         self.prices = prices
    ...     @app.get("/price/{name}")
    ...     async def price(self, name: str) -> float:
    ...         return self.prices[name]

    Raises
    ------
    ConfigError
        It is no application, or is put where none can be.
    """
    declared = _declare(app)

    def decorate(target: Class | None = None) -> Class | type:
        if target is None:
            return type("Ingress", (), {_ATTRIBUTE: declared, "__module__": __name__})
        if not isinstance(target, type):
            raise ConfigError(
                f"@serve.ingress takes a class, not {target!r}: {_BELOW}; without a class: "
                "serve.deployment(serve.ingress(app)())"
            )
        if _ATTRIBUTE in vars(target):
            raise ConfigError(
                f"class {target.__name__} has an application already: a deployment has one; mount the other in it, as "
                'in app.mount("/other", other), or deploy it by itself under a route_prefix of its own'
            )
        setattr(target, _ATTRIBUTE, declared)
        _forget_earlier(declared.app, target)
        return target

    return decorate


def _forget_earlier(app: Any, target: type) -> None:
    """Take routes out that are methods of an earlier class of this name: a notebook's cell was run again."""
    names = methods_by_id(target)
    for routes, route in routes_of(app):
        owner = owner_of(getattr(route, "endpoint", None))
        if owner == (target.__module__, target.__qualname__) and id(route.endpoint) not in names:
            routes.remove(route)


def ingress_of(target: Any) -> Ingress | None:
    """Return the application that was declared for a class, if there is one.

    Raises
    ------
    ConfigError
        The class also has a ``__call__``, so that nobody could say which of the two answers.
    """
    found: Ingress | None = getattr(target, _ATTRIBUTE, None) if isinstance(target, type) else None
    if found is not None and any("__call__" in vars(base) for base in target.__mro__):
        raise ConfigError(
            f"class {target.__name__} has an application (@serve.ingress), which answers HTTP, and a __call__: rename "
            "__call__ (handles call it by its new name), or make it a route of the application"
        )
    return found


def _declare(app: Any) -> Ingress:
    if isinstance(app, type):
        raise ConfigError(
            f"@serve.ingress was given the class {app.__name__}: give it the application, @serve.ingress(app), or a "
            "function that builds it"
        )
    if not callable(app):
        raise ConfigError(
            f"@serve.ingress takes an ASGI application or a function that builds one, not {app!r}, "
            f"a {type(app).__name__}"
        )
    if is_asgi(app):
        return Ingress(app, False, False)
    required = _required(app)
    if required > 1:
        wsgi = " (two parameters: is it WSGI? wrap it, as in asgiref.wsgi.WsgiToAsgi(app))" if required == 2 else ""
        raise ConfigError(
            f"@serve.ingress was given {app!r}, which is called with {required} arguments{wsgi}: an ASGI application "
            "is called with (scope, receive, send), a function that builds one with nothing or with the instance"
        )
    return Ingress(app, True, required == 1)


def is_asgi(app: Any) -> bool:
    """Tell whether something is called as an ASGI application is."""
    try:
        inspect.signature(app).bind("scope", "receive", "send")
    except (TypeError, ValueError):
        return False
    return _required(app) == 3 or not inspect.isfunction(app)


def _required(function: Any) -> int:
    """Count the arguments that must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(parameter.kind == inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return 3
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)


def methods_by_id(kind: type) -> dict[int, str]:
    """Return the names of a class's methods, inherited and wrapped ones included, by their ids."""
    names = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            if callable(value):
                names[id(value)] = names[id(inspect.unwrap(value))] = name
    return names


def owner_of(endpoint: Any) -> tuple[str, str] | None:
    """Return module and name of the class that an endpoint is a method of; None for other endpoints."""
    function = inspect.unwrap(endpoint) if callable(endpoint) else None
    if not inspect.isfunction(function):
        return None
    owner = function.__qualname__.rpartition(".")[0]
    if not owner or owner.endswith("<locals>") or next(iter(inspect.signature(function).parameters), "") != "self":
        return None
    return function.__module__, owner


def routes_of(app: Any) -> Iterator[tuple[list[Any], Any]]:
    """Go through the routes of an application of the Starlette family, those of what is inside it too.

    Yields
    ------
    routes, route
        The list that has the route, and the route.
    """
    yield from _routes(app, set())


def _routes(app: Any, seen: set[int]) -> Iterator[tuple[list[Any], Any]]:
    if app is None or id(app) in seen:
        return
    seen.add(id(app))
    if not _is_of_the_family(app):
        # It may be wrapped in middleware.
        yield from _routes(getattr(app, "app", None), seen)
        return
    for route in list(app.routes):
        yield app.routes, route
        yield from _routes(getattr(route, "original_router", None) or getattr(route, "app", None), seen)


def _is_of_the_family(app: Any) -> bool:
    applications, routing = sys.modules.get("starlette.applications"), sys.modules.get("starlette.routing")
    return (applications is not None and isinstance(app, applications.Starlette)) or (
        routing is not None and isinstance(app, routing.Router)
    )
