"""Shipping ASGI applications by value: what frameworks hold that a pickle cannot, and how it is made anew.

A FastAPI application is full of what it derived from the declarations: closures, validators, caches with locks. Only
the declarations travel. A route is made again from them on the worker, once everything else of the blob is there: while
it is being opened, functions have no annotations yet.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
import threading
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..ingress import Ingress, routes_of

if TYPE_CHECKING:
    from .code import Reducers

__all__ = ["app_reducers", "declaration", "parts_of", "remaking"]

_Lock, _RLock = type(threading.Lock()), type(threading.RLock())

#: What applications derive when they are first used.
_DERIVED = ("middleware_stack", "openapi_schema", "_openapi_routes_version")

#: Where classes are that are made again from the arguments of their constructor.
_REMADE = (
    ("fastapi.routing", "APIRoute"),
    ("fastapi.routing", "APIWebSocketRoute"),
    ("fastapi.routing", "_IncludedRouter"),
)


class _Unfinished(threading.local):
    objects: list[tuple[Any, dict[str, Any]]]

    def __init__(self) -> None:
        self.objects = []


_unfinished = _Unfinished()


def app_reducers(ingress: Ingress) -> Reducers:
    """Return what to put in place of the parts of applications, for those frameworks that are loaded."""
    reducers: Reducers = {
        _Lock: lambda _: (threading.Lock, ()),
        _RLock: lambda _: (threading.RLock, ()),
        contextvars.ContextVar: _reduce_variable,
        types.FunctionType: _annotations,
    }
    if (module := sys.modules.get("starlette.datastructures")) is not None:
        reducers[module.State] = lambda state: (type(state), (state._state,))
    if (module := sys.modules.get("starlette.applications")) is not None:
        reducers.update(dict.fromkeys(_family(module.Starlette), _reduce_application))
    for name, attribute in _REMADE:
        kind = getattr(sys.modules.get(name), attribute, None)
        if kind is not None:
            reducers.update(dict.fromkeys(_family(kind), _reduce_declared))
    if not ingress.is_builder and not isinstance(ingress.app, types.FunctionType):
        reducers.setdefault(type(ingress.app), _reduce_foreign)
    return reducers


@contextlib.contextmanager
def remaking() -> Iterator[None]:
    """At the end, make again what was only declared in the blob that was opened meanwhile (in this thread)."""
    before, _unfinished.objects = _unfinished.objects, []
    try:
        yield
        for made, declared in _unfinished.objects:
            made.__init__(**declared)
    finally:
        _unfinished.objects = before


def _family(kind: type) -> Iterator[type]:
    yield kind
    other: type
    for other in kind.__subclasses__():
        yield from _family(other)


def _reduce_application(app: Any) -> tuple[Any, ...]:
    home = home_of(app)
    if home is not None and not any(_is_own(getattr(route, "endpoint", None)) for _, route in routes_of(app)):
        return getattr, home
    return _bare, (type(app),), {**vars(app), **{name: None for name in _DERIVED if name in vars(app)}}


def _reduce_foreign(app: Any) -> Any:
    """Let an application of another kind travel by reference where it can, else as any object."""
    home = home_of(app)
    return NotImplemented if home is None else (getattr, home)


def parts_of(app: Any) -> list[tuple[str, Any]] | None:
    """Return what users gave to an application, each with its name, for the search of what cannot travel."""
    if isinstance(app, Ingress):
        return [(", its application", app.app)]
    if not any(base.__module__.startswith("starlette.") for base in type(app).__mro__):
        return None
    if hasattr(app, "endpoint"):
        return [(f", {name}", value) for name, value in declaration(app).items()]
    if not hasattr(app, "user_middleware"):
        return None
    state = [(f", app.state.{name}", value) for name, value in app.state._state.items()]
    # Those of the framework's own pages refer to the application.
    routes = [
        (f", route {getattr(route, 'path', '')!r}", route)
        for _, route in routes_of(app)
        if not getattr(getattr(route, "endpoint", None), "__module__", "").startswith(("fastapi.", "starlette."))
    ]
    handlers = [(f", exception handler {kind!r}", handler) for kind, handler in app.exception_handlers.items()]
    middleware = [(f", middleware {index}", part) for index, part in enumerate(app.user_middleware)]
    return [*state, *routes, *handlers, *middleware, (", lifespan", app.router.lifespan_context)]


def _bare(kind: type) -> Any:
    return object.__new__(kind)


def _reduce_declared(made: Any) -> tuple[Any, ...]:
    return _bare, (type(made),), declaration(made), None, None, _declared_setstate


def _declared_setstate(made: Any, declared: dict[str, Any]) -> None:
    _unfinished.objects.append((made, declared))


def declaration(made: Any) -> dict[str, Any]:
    """Return the arguments that an object was made with, which it keeps under their names."""
    declared: dict[str, Any] = {}
    for kind in type(made).__mro__:
        for name in inspect.signature(vars(kind)["__init__"]).parameters if "__init__" in vars(kind) else ():
            if name != "self" and not name.startswith("_") and name in vars(made):
                declared.setdefault(name, getattr(made, name))
    if declared.get("stream_item_type", vars(made).get("stream_item_type")) is not None:
        # It was found in the annotation of what the generator yields, and will be again.
        declared.pop("response_model", None)
    return declared


def _annotations(function: types.FunctionType) -> dict[str, Any]:
    """Evaluate annotations that are texts: of a module's variables only those travel that the code itself mentions."""
    found = dict(function.__annotations__)
    for name, value in found.items():
        # One that only type checkers understand stays as it is.
        with contextlib.suppress(Exception):
            holder = types.SimpleNamespace(__annotations__={name: value})
            hints = typing.get_type_hints(holder, function.__globals__, include_extras=True)
            found[name] = None if value in {None, "None"} else hints[name]
    return found


def _reduce_variable(variable: contextvars.ContextVar[Any]) -> tuple[Any, ...]:
    home = home_of(variable)
    if home is not None:
        return getattr, home
    default = contextvars.Context().run(lambda: variable.get(_Missing))
    return (_variable, (variable.name,) if default is _Missing else (variable.name, default))


class _Missing:
    """No default."""


def _variable(name: str, *default: Any) -> contextvars.ContextVar[Any]:
    return contextvars.ContextVar(name, default=default[0]) if default else contextvars.ContextVar(name)


def home_of(value: Any) -> tuple[types.ModuleType, str] | None:
    """Find a module of an installed package that has something as one of its variables."""
    from .own import own_modules

    own = {module.__name__ for module in own_modules()} | _NO_HOMES
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module.__name__ not in own:
            for name, other in list(vars(module).items()):
                if other is value and sys.modules.get(module.__name__) is module:
                    return module, name
    return None


#: Interactive sessions keep their last value in the first.
_NO_HOMES = frozenset({"builtins", "__main__"})


def _is_own(endpoint: Any) -> bool:
    from .own import own_modules

    name = getattr(inspect.unwrap(endpoint), "__module__", None) if callable(endpoint) else None
    return name == "__main__" or any(module.__name__ == name for module in own_modules())
