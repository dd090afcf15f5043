"""The arguments of single calls as those of a batch, and the result of a batch as those of single calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..exceptions import ArgumentsError, BatchError, ConfigError
from .batch_rows import is_torch, join_rows, kind_of_rows, split_rows

__all__ = ["Parameters", "Stack", "kind_of", "split"]

#: False: lists. True: arrays along a new first axis. "rows": each call brings rows, which are joined.
Stack = Literal["rows"] | bool

#: Stands for an argument that a call does not give.
_MISSING: Any = inspect.Parameter.empty


class Parameters:
    """What a batched function takes: each parameter a list, with one value for each call.

    Parameters
    ----------
    function : callable
        Bound, if it is a method.

    Raises
    ------
    ConfigError
        It takes ``*args`` or ``**kwargs``, or nothing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._signature = inspect.signature(function)
        parameters = list(self._signature.parameters.values())
        name = getattr(function, "__qualname__", repr(function))
        if any(parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD} for parameter in parameters):
            raise ConfigError(
                f"serve.batch on {name}{self._signature}: *args and **kwargs have no list for each parameter; name them"
            )
        if not parameters:
            raise ConfigError(f"serve.batch on {name}(): it takes nothing that could be a list of calls' arguments")
        self._name = name
        self._parameters = parameters
        self._names = [parameter.name for parameter in parameters]
        self._all_positional = all(parameter.kind != parameter.KEYWORD_ONLY for parameter in parameters)

    def values(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of one call, one value for each parameter.

        Raises
        ------
        ArgumentsError
            They do not fit the parameters.
        """
        if not kwargs and self._all_positional and len(args) == len(self._names):
            return tuple(args)
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ArgumentsError(
                f"the batched {self._name} cannot be called so: {error}; a single call gives one value for each of "
                f"{self._signature}"
            ) from None
        return tuple(given.get(name, _MISSING) for name in self._names)

    def columns(self, calls: Sequence[tuple[Any, ...]], stack: Stack) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the batch. What no call gives is left to the function's own default."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter, values in zip(self._parameters, zip(*calls, strict=True), strict=True):
            if all(value is _MISSING for value in values):
                continue
            filled = [parameter.default if value is _MISSING else value for value in values]
            column = join(filled, stack) if stack else filled
            if parameter.kind != parameter.KEYWORD_ONLY and len(args) == self._names.index(parameter.name):
                args.append(column)
            else:
                kwargs[parameter.name] = column
        return args, kwargs


def kind_of(values: Sequence[Any], stack: Stack) -> tuple[Any, ...]:
    """Return what calls must have in common to share a batch."""
    kind = kind_of_rows if stack == "rows" else _kind_of_array
    return tuple(None if value is _MISSING else kind(value) for value in values)


def _kind_of_array(value: Any) -> Any:
    if not hasattr(value, "shape"):
        import numpy as np

        value = np.asarray(value)
    return str(value.dtype), tuple(value.shape), is_torch(value) and str(value.device)


def join(values: Sequence[Any], stack: Stack) -> Any:
    """Stack values, or join their rows."""
    if stack == "rows":
        return join_rows(values)
    if is_torch(values[0]):
        return sys.modules["torch"].stack(list(values))
    import numpy as np

    return np.stack([np.asarray(value) for value in values])


def split(result: Any, sizes: Sequence[int], stack: Stack, name: str) -> list[Any]:
    """Return the results of single calls.

    Parameters
    ----------
    result : object
        What the batch returned: a list, a tuple or an array (where calls are stacked also a tuple or dict of arrays).
    sizes : sequence of int
        Rows of each call; without ``stack="rows"`` only their number matters.

    Raises
    ------
    BatchError
        It has not one result for each call, or no order.
    """
    calls = len(sizes)
    if stack == "rows":
        return split_rows(result, sizes, name)
    if stack and isinstance(result, (tuple, dict)) and not result:
        raise BatchError(f"the batched {name} returned an empty {type(result).__name__}, and so nothing for its calls")
    if stack and isinstance(result, tuple):
        return list(zip(*[split(part, sizes, False, name) for part in result], strict=True))
    if stack and isinstance(result, dict):
        parts = {key: split(part, sizes, False, name) for key, part in result.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(calls)]
    what = f"a {type(result).__name__}"
    if hasattr(result, "columns"):
        what += ", whose entries are its columns"
    elif isinstance(result, (list, tuple)) or len(getattr(result, "shape", ())) >= 1:
        _count(result, calls, name)
        return list(result)
    elif isinstance(result, (set, frozenset, dict)):
        what += ", which says nothing of whose result is whose"
    raise BatchError(f"the batched {name} must return a list with one result for each of its {calls} calls, not {what}")


def _count(results: Any, calls: int, name: str) -> None:
    if len(results) != calls:
        raise BatchError(
            f"the batched {name} was given {calls} calls and returned {len(results)} results; it must return one for "
            "each, in their order"
        )
