"""The methods of the user's object that can be called by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..batching import BatchedFunction, is_batched
from ..exceptions import MethodNotFoundError

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["Methods"]


class Methods(dict[str, tuple[Callable[..., Any], bool]]):
    """Those that were called already: the method, and whether it is a coroutine function.

    Parameters
    ----------
    user : UserCode
        Who has the user's object.
    """

    def __init__(self, user: UserCode) -> None:
        self._user = user

    def find(self, name: str) -> tuple[Callable[..., Any], bool]:
        """Return a public method and whether it is a coroutine function.

        Raises
        ------
        MethodNotFoundError
            There is none; the message lists those there are.
        """
        found = self.get(name)
        if found is None:
            function = self._look_up(name)
            if not callable(function):
                what = f"no method {name!r}" if function is None else f"{name!r}, a {_kind(function)} and no method"
                raise MethodNotFoundError(
                    f"deployment {self._user.deployment!r} has {what}; it has: {', '.join(self._public())}"
                )
            call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
            # A call waits for its batch on the loop, whatever runs the batch.
            found = self[name] = (function, inspect.iscoroutinefunction(call) or is_batched(function))
        return found

    def _look_up(self, name: str) -> Any:
        """Return what the user's object has under a name; properties are not evaluated."""
        if name != "__call__" and name.startswith("_"):
            return None
        instance = self._user.instance
        if isinstance(instance, BatchedFunction):
            return instance.bound() if name == "__call__" else None
        if inspect.isfunction(instance):
            return instance if name == "__call__" else None
        static = inspect.getattr_static(instance, name, None)
        return static if isinstance(static, property) else getattr(instance, name, None)

    def _public(self) -> list[str]:
        instance = self._user.instance
        if inspect.isfunction(instance) or isinstance(instance, BatchedFunction):
            return ["__call__"]
        names = [name for name in dir(type(instance)) if not name.startswith("_")]
        names = [name for name in names if callable(getattr(type(instance), name, None))]
        return ["__call__", *names] if callable(instance) else names


def _kind(value: object) -> str:
    return "property" if isinstance(value, property) else type(value).__name__
