"""Options as they are given, by keyword, in documents or as text: checked, changed, and told what they mean."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import Struct, UnsetType

from .config import AutoscalingConfig, RuntimeEnv
from .exceptions import ConfigError

__all__ = ["build_options", "change_options", "described", "documented", "parse_options"]

Options = TypeVar("Options", bound=Struct)


def build_options(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """Validate ``values`` into a ``kind``.

    Parameters
    ----------
    kind : type
        `DeploymentOptions`, `HTTPOptions` or `CallOptions`.
    values : dict
        Options by name; those that are `msgspec.UNSET` are left at their defaults.
    where : str
        What is being declared, for the error message.

    Raises
    ------
    ConfigError
        An unknown name (near misses are suggested), a wrong type or a value out of range.
    """
    given = {name: value for name, value in values.items() if not isinstance(value, UnsetType)}
    for name, value in list(given.items()):
        if name not in kind.__struct_fields__:
            near = difflib.get_close_matches(name, kind.__struct_fields__, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(kind.__struct_fields__)}"
            raise ConfigError(f"{where} has no option {name!r}; {hint}")
        nested = _NESTED.get(name)
        if nested is not None and isinstance(value, dict):
            given[name] = build_options(nested, value, f"{name} of {where}")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        if not path:
            raise ConfigError(f"{where}: {text.removesuffix(' - at `$`')}") from None
        name = path.rstrip("`").split("[")[0].split(".")[0]
        got = f" = {given[name]!r}" if name in given else ""
        repair = described(kind, name) or _in_python(text[:1].lower() + text[1:])
        raise ConfigError(f"{where}: option {name}{got} is not valid: {repair}") from None


#: Options that have options.
_NESTED: dict[str, type[Struct]] = {"autoscaling_config": AutoscalingConfig, "runtime_env": RuntimeEnv}


def _in_python(text: str) -> str:
    """Return what msgspec says with Python's names of types in place of JSON's."""
    return re.sub(r"\b(array|object|null)\b", lambda found: _PYTHON[found[1]], text)


_PYTHON = {"array": "list", "object": "dict", "null": "None"}


def described(kind: type[Struct], name: str) -> str | None:
    """Return what an option may be, where its declaration says so in words."""
    hint = get_type_hints(kind, include_extras=True).get(name)
    return next((meta.description for meta in getattr(hint, "__metadata__", ()) if meta.description), None)


def documented(kind: type[Struct]) -> dict[str, str]:
    """Return what each option means, as the docstring of its class says."""
    lines = iter(inspect.cleandoc(kind.__doc__ or "").splitlines())
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in lines:
        head = re.match(r"(\w+(?:, \w+)*) : ", line)
        if head:
            names = head[1].split(", ")
            found.update((name, []) for name in names)
        elif line.startswith("    "):
            for name in names:
                found[name].append(line.strip())
        elif line.strip():
            names = []
    return {name: " ".join(text) for name, text in found.items()}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return options written as ``name=value`` on a command line; values are JSON, or else text.

    Raises
    ------
    ConfigError
        There is no ``=``.
    """
    parsed: dict[str, Any] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"{text!r} is not an option: write NAME=VALUE, e.g. body_limit=1000000")
        try:
            parsed[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            parsed[name] = value
    return parsed


def change_options(options: Options, values: dict[str, Any], where: str) -> Options:
    """Return ``options`` with ``values`` replaced, validated as `build_options` does."""
    current = {name: getattr(options, name) for name in options.__struct_fields__}
    return build_options(type(options), {**current, **values}, where)
