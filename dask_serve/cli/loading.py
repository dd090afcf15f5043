"""The application that MODULE:APP names."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .messages import Failure, Misused

__all__ = ["describe", "load", "parse_arguments", "reload"]


def parse_arguments(texts: Iterable[str]) -> dict[str, str]:
    """Return the arguments of a builder, written as ``key=value``."""
    arguments = {}
    for text in texts:
        key, found, value = text.partition("=")
        if not (found and key.isidentifier()):
            raise Misused(f"{text!r} is no argument of a builder", "write KEY=VALUE, e.g. model=small")
        arguments[key] = value
    return arguments


def load(target: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the application that ``module:attribute`` names, or that the function of that name returns.

    Parameters
    ----------
    target : str
        ``module:attribute``; modules of the working directory come first.
    arguments : dict, optional
        Arguments of a function, as text where they come from a command line; see `dask_serve.cli.builders.call`.

    Raises
    ------
    Misused
        ``target`` is not written so.
    Failure
        There is no such module or attribute, it cannot be imported, or it is no application.
    """
    from ..deployment import Application

    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise Misused(f"{target!r} does not name an application", "write MODULE:APP, e.g. main:app")
    found = _attribute(_import(module_name), module_name, path)
    if inspect.isfunction(found):
        from .builders import call

        built = call(found, target, arguments or {})
        if not isinstance(built, Application):
            raise Failure(f"{target}() returned {_name(built)}, not an application", _hint(built))
        return built
    if not isinstance(found, Application):
        raise Failure(f"{target} is {_name(found)}, not an application", _hint(found))
    if arguments:
        raise Failure(
            f"{target} is an application, which takes no arguments ({', '.join(arguments)})",
            "name a function that takes them and returns an application",
        )
    return found


def reload(target: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return the application as `load` does, from the files as they are now.

    The application's own modules are imported anew. Where that fails, those that were there stay.
    """
    from ..shipping.code import own_modules

    own = {module.__name__: module for module in own_modules()}
    for name in own:
        del sys.modules[name]
    importlib.invalidate_caches()
    try:
        return load(target, arguments)
    except BaseException:
        sys.modules.update(own)
        raise


def _import(name: str) -> Any:
    cwd = str(Path.cwd())
    if sys.path[:1] != [cwd]:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there may import one that is not.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _broken(name, error) from error
        raise Failure(
            f"there is no module {error.name!r} (looked in {cwd} and on sys.path)",
            "start the command in the directory of the module, or install the module",
        ) from None
    except Exception as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> Failure:
    return Failure(
        f"module {name!r} cannot be imported: {describe(error)}",
        "mend the module; --debug shows the whole traceback",
    )


def describe(error: BaseException) -> str:
    """Say what an exception of user code is, and where it was raised."""
    text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


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
