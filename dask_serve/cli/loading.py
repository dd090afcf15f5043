"""The application that MODULE:APP names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .messages import Failure, Misused

__all__ = ["load"]


def load(target: str) -> Any:
    """Return the application that ``module:attribute`` names."""
    import inspect

    from ..deployment import Application

    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise Misused(f"{target!r} does not name an application", "write MODULE:APP, e.g. main:app")
    found = _attribute(_import(module_name), module_name, path)
    if inspect.isfunction(found):
        built = found()
        if not isinstance(built, Application):
            raise Failure(f"{target}() returned {_name(built)}, not an application", _hint(built))
        return built
    if not isinstance(found, Application):
        raise Failure(f"{target} is {_name(found)}, not an application", _hint(found))
    return found


def _import(name: str) -> Any:
    cwd = str(Path.cwd())
    if sys.path[:1] != [cwd]:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there and imports one that is not shows its own traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise Failure(
            f"there is no module {error.name!r} (looked in {cwd} and on sys.path)",
            "start the command in the directory of the module, or install the module",
        ) from None


def _attribute(module: Any, module_name: str, path: str) -> Any:
    found = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            from ..deployment import Application

            there = sorted(key for key, value in vars(module).items() if isinstance(value, Application))
            hint = f"its applications: {', '.join(there)}" if there else _hint(None)
            raise Failure(f"module {module_name!r} has no attribute {path!r}", hint) from None
    return found


def _name(found: Any) -> str:
    kind = type(found).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    named = getattr(found, "__name__", None) or getattr(found, "name", None)
    return f"{article} {kind} ({named})" if isinstance(named, str) else f"{article} {kind}"


def _hint(found: Any) -> str:
    from ..deployment import Deployment

    if isinstance(found, Deployment):
        return "write .bind() behind it"
    if isinstance(found, type):
        return "decorate the class with @serve.deployment and bind it: app = Model.bind()"
    return "an application is what .bind() of a deployment returns"
