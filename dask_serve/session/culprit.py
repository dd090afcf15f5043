"""Which argument of a call cannot be pickled, and what to send instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..exceptions import PayloadError
from ..wire import payloads

__all__ = ["culprit"]


def culprit(args: tuple[Any, ...], kwargs: dict[str, Any], reducers: payloads.Reducers) -> str:
    """Name the argument that cannot be pickled, the place in it, and what to send instead."""
    for name, value in [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]:
        if not _can_be_pickled(value, reducers):
            place, inner = _place(value, reducers)
            hint = next((hint for test, hint in _HINTS if test(inner)), "")
            return f"{name}{place} ({type(inner).__name__}{hint})"
    return "an argument"


def _place(value: Any, reducers: payloads.Reducers) -> tuple[str, Any]:
    """Find what cannot be pickled inside of containers."""
    items: Any = ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    for key, item in items:
        if not _can_be_pickled(item, reducers):
            place, inner = _place(item, reducers)
            return f"[{key!r}]{place}", inner
    return "", value


def _can_be_pickled(value: Any, reducers: payloads.Reducers) -> bool:
    try:
        payloads.dumps(value, reducers)
    except PayloadError:
        return False
    return True


_HINTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.iscoroutine, ": await it, and pass what it returns"),
    (inspect.isgenerator, ": pass a list of what it yields"),
    (inspect.isasyncgen, ": pass a list of what it yields"),
    (inspect.isawaitable, ": await it, and pass what it returns"),
)
