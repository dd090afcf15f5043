"""Functions that build an application from arguments, each of which has the type that the function asks for."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .loading import describe
from .messages import Failure

__all__ = ["call"]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call(builder: Callable[..., Any], target: str, arguments: Mapping[str, Any]) -> Any:
    """Call a builder.

    One that takes a single dictionary gets all arguments in it; one that takes a single pydantic model, msgspec struct
    or dataclass gets that, made of them; any other gets them by name. Text becomes what the annotations say.

    Parameters
    ----------
    builder : function
        What returns the application.
    target : str
        What the user calls it.
    arguments : dict
        Text, or values of any kind.

    Raises
    ------
    Failure
        The arguments do not fit, or the function raises.
    """
    parameters = list(inspect.signature(builder).parameters.values())
    hints = _hints(builder)
    only = parameters[0] if len(parameters) == 1 and parameters[0].kind in _NAMED else None
    kind = hints.get(only.name) if only is not None else None
    if only is not None and only.name not in arguments and (arguments or only.default is only.empty):
        if _is_dict(kind) or (kind is None and only.default is only.empty):
            return _run(builder, target, {only.name: dict(arguments)})
        if _is_model(kind):
            return _run(builder, target, {only.name: _model(kind, target, arguments)})
    _check_names(parameters, target, arguments)
    given = {}
    for parameter in parameters:
        if parameter.name in arguments:
            hint = hints.get(parameter.name) or _type_of_default(parameter)
            given[parameter.name] = _convert(arguments[parameter.name], hint, parameter.name, target)
    given.update({name: value for name, value in arguments.items() if name not in given})
    return _run(builder, target, given)


def _run(builder: Callable[..., Any], target: str, arguments: dict[str, Any]) -> Any:
    try:
        return builder(**arguments)
    except Exception as error:
        raise Failure(f"{target}() raised {describe(error)}", "--debug shows the whole traceback") from error


def _check_names(parameters: list[inspect.Parameter], target: str, arguments: Mapping[str, Any]) -> None:
    known = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    unknown = [name for name in arguments if name not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise Failure(f"{target}() has no argument {unknown[0]!r}", takes)
    missing = [p.name for p in parameters if p.kind in _NAMED and p.default is p.empty and p.name not in arguments]
    if missing:
        written = " ".join(f"{name}=..." for name in missing)
        raise Failure(f"{target}() needs the arguments {', '.join(missing)}", f"write them behind it: {written}")


def _hints(builder: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(builder)
    except (NameError, TypeError):
        # Names that are imported for type checkers only.
        return {}


def _is_dict(kind: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and (
        dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct) or hasattr(kind, "model_validate")
    )


def _model(kind: Any, target: str, arguments: Mapping[str, Any]) -> Any:
    validate = getattr(kind, "model_validate", None)
    if validate is not None:
        try:
            return validate({name: _opened(value) for name, value in arguments.items()})
        except ValueError as error:
            lines = str(error).splitlines()
            raise Failure(f"the arguments of {target}() do not fit: {' '.join(map(str.strip, lines[1:3]))}") from error
    hints = typing.get_type_hints(kind)
    unknown = [name for name in arguments if name not in hints]
    if unknown:
        raise Failure(f"{target}() has no argument {unknown[0]!r}", f"it takes {', '.join(hints)}")
    values = {name: _convert(value, hints[name], name, target) for name, value in arguments.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise Failure(f"the arguments of {target}() do not fit: {error}", f"it takes {', '.join(hints)}") from error


def _type_of_default(parameter: inspect.Parameter) -> Any:
    kind = type(parameter.default)
    return kind if kind in (bool, int, float) else None


def _convert(value: Any, kind: Any, name: str, target: str) -> Any:
    """Return ``value`` as an annotation wants it; text may be JSON."""
    if kind is None or kind is Any:
        return value
    try:
        return _lax(value, kind)
    except msgspec.ValidationError:
        pass
    except TypeError:
        # A type that only the function understands.
        return value
    try:
        return _lax(_opened(value), kind)
    except msgspec.ValidationError as error:
        raise Failure(
            f"argument {name}={value} of {target}() does not fit: {error}",
            f"it is annotated as {getattr(kind, '__name__', kind)}",
        ) from error


def _lax(value: Any, kind: Any) -> Any:
    return msgspec.convert(value, kind, strict=False)


def _opened(value: Any) -> Any:
    """Return what text that is a JSON list or object stands for."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
    return value
