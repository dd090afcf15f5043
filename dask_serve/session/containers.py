"""Containers with refs in them: the refs taken out, and the same containers built with what those stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from distributed import Future

from ..response import DeploymentResponse
from .assigned import Assigned

__all__ = ["LEFT_OUT", "collect", "or_none", "rebuild"]

#: Stands for the value of a ref that is to be left out.
LEFT_OUT: Any = object()


def collect(value: Any, found: list[Any]) -> None:
    """List the refs and futures in a structure, in the order in which `rebuild` comes by them."""
    kind = type(value)
    if kind is DeploymentResponse or isinstance(value, Future):
        found.append(value)
    elif kind is Assigned:
        found.append(value.ref)
    elif kind in _COLLECTIONS or _is_named_tuple(value):
        for item in value:
            collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, found)


def rebuild(value: Any, values: Iterator[Any]) -> Any:
    kind = type(value)
    if isinstance(value, (Future, Assigned)):
        return next(values)
    if kind in _COLLECTIONS:
        items = [rebuild(item, values) for item in value]
        return kind([item for item in items if item is not LEFT_OUT])
    if _is_named_tuple(value):
        return kind(*[or_none(rebuild(item, values)) for item in value])
    if isinstance(value, dict):
        pairs = [(key, rebuild(item, values)) for key, item in value.items()]
        # Of the same class, with what else that holds.
        built = {} if kind is dict else copy.copy(value)
        built.clear()
        built.update((key, item) for key, item in pairs if item is not LEFT_OUT)
        return built
    return value


_COLLECTIONS = frozenset({list, tuple, set, frozenset})


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def or_none(value: Any) -> Any:
    return None if value is LEFT_OUT else value
