"""Finding out what exactly cannot be pickled."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

import cloudpickle

from .apps import parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["blame"]


def blame(
    path: str, obj: Any, reason: Exception, failure: Callable[[Any], Exception | None]
) -> tuple[str, Any, Exception]:
    """Follow what cannot be pickled down to the innermost object that has a name.

    Parameters
    ----------
    path : str
        What ``obj`` is called in messages.
    obj : object
        Something that cannot be pickled.
    reason : Exception
        Why not.
    failure : callable
        Why an object cannot be pickled; None when it can.

    Returns
    -------
    path, obj, reason
        Of the innermost.
    """
    seen = {id(obj)}
    deeper = True
    while deeper:
        deeper = False
        for label, child in _children(obj):
            if id(child) in seen:
                continue
            why = failure(child)
            if why is not None:
                seen.add(id(child))
                path, obj, reason, deeper = path + label, child, why, True
                break
    return path, obj, reason


def _children(obj: Any) -> Iterable[tuple[str, Any]]:
    parts = parts_of(obj)
    if parts is not None:
        return parts
    if isinstance(obj, (staticmethod, classmethod)):
        return [("", obj.__func__)]
    if isinstance(obj, property):
        return [("", part) for part in (obj.fget, obj.fset, obj.fdel) if part is not None]
    if isinstance(obj, types.MethodType):
        return [(" of its instance", obj.__self__)]
    if isinstance(obj, types.FunctionType):
        return _function_children(obj)
    if isinstance(obj, type):
        own = [(f", attribute {name!r}", value) for name, value in vars(obj).items() if name not in _CLASS_INTERNALS]
        return own + [(f", base class {base.__name__}", base) for base in obj.__bases__ if base is not object]
    if isinstance(obj, dict):
        return [(f", item {key!r}", value) for key, value in obj.items()]
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [(f", item {index}", value) for index, value in enumerate(obj)]
    if isinstance(obj, types.ModuleType):
        return [(f", variable {name!r}", value) for name, value in vars(obj).items() if not name.startswith("__")]
    return _attributes(obj)


_CLASS_INTERNALS = frozenset({"__dict__", "__weakref__"})


def _attributes(obj: Any) -> list[tuple[str, Any]]:
    file = getattr(sys.modules.get(type(obj).__module__), "__file__", None) or ""
    if "site-packages" in file or "dist-packages" in file:
        # The inside of a library's object says nothing to its user.
        return []
    names = list(getattr(obj, "__dict__", {}))
    for kind in type(obj).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    found = []
    for name in names:
        with contextlib.suppress(AttributeError):
            found.append((f", attribute {name!r}", getattr(obj, name)))
    return found


def _function_children(function: types.FunctionType) -> list[tuple[str, Any]]:
    found = [(", default of an argument", value) for value in function.__defaults__ or ()]
    variables = inspect.getclosurevars(function)
    found += [(f", closure variable {name!r}", value) for name, value in variables.nonlocals.items()]
    # Globals that only an inner function uses travel too; cloudpickle finds them in the nested code.
    names = cloudpickle.cloudpickle._extract_code_globals(function.__code__)
    found += [
        (f", global variable {name!r}", function.__globals__[name]) for name in names if name in function.__globals__
    ]
    if hasattr(function, "__wrapped__"):
        found.append((", wrapped function", function.__wrapped__))
    return found
