"""The arguments of single calls as those of a batch, and the result of a batch as those of single calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..exceptions import ArgumentsError, BatchError, ConfigError

__all__ = ["Parameters", "Stack", "kind_of", "rows_of", "split"]

#: False: lists. True: arrays along a new first axis. "rows": arrays are joined along the first axis that they have.
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


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def kind_of(values: Sequence[Any], stack: Stack) -> tuple[Any, ...]:
    """Return what calls must have in common to be stacked: the shapes and types of their arrays."""
    return tuple(_kind(value, stack) for value in values)


def _kind(value: Any, stack: Stack) -> Any:
    if value is _MISSING:
        return None
    if not hasattr(value, "shape"):
        import numpy as np

        value = np.asarray(value)
    shape = tuple(value.shape)
    if stack == "rows" and not shape:
        raise ArgumentsError(f'with stack="rows" each call brings an array of rows, not {value!r}')
    return str(value.dtype), shape[1:] if stack == "rows" else shape, _is_torch(value) and str(value.device)


def rows_of(values: Sequence[Any]) -> int:
    """Return how many rows a call brings."""
    return len(values[0])


def join(values: Sequence[Any], stack: Stack) -> Any:
    """Stack values, or join their rows."""
    if _is_torch(values[0]):
        torch = sys.modules["torch"]
        return torch.cat(list(values)) if stack == "rows" else torch.stack(list(values))
    import numpy as np

    return np.concatenate(values) if stack == "rows" else np.stack([np.asarray(value) for value in values])


def split(result: Any, sizes: Sequence[int], stack: Stack, name: str) -> list[Any]:
    """Return the results of single calls.

    Parameters
    ----------
    result : object
        What the batch returned: a list, a tuple or an array (where calls are stacked also a tuple or dict of arrays).
    sizes : sequence of int
        Rows of each call; without ``stack="rows"`` 1 each.

    Raises
    ------
    BatchError
        It has not one result for each call, or no order.
    """
    calls = len(sizes)
    if stack:
        if isinstance(result, tuple):
            return list(zip(*[_split_array(part, sizes, stack, name) for part in result], strict=True))
        if isinstance(result, dict):
            parts = {key: _split_array(part, sizes, stack, name) for key, part in result.items()}
            return [{key: part[i] for key, part in parts.items()} for i in range(calls)]
        return _split_array(result, sizes, stack, name)
    if isinstance(result, (list, tuple)) or len(getattr(result, "shape", ())) >= 1:
        _count(result, calls, name)
        return list(result)
    what = f"a {type(result).__name__}"
    if isinstance(result, (set, frozenset, dict)):
        what += ", which says nothing of whose result is whose"
    raise BatchError(f"the batched {name} must return a list with one result for each of its {calls} calls, not {what}")


def _count(results: Any, calls: int, name: str) -> None:
    if len(results) != calls:
        raise BatchError(
            f"the batched {name} was given {calls} calls and returned {len(results)} results; it must return one for "
            "each, in their order"
        )


def _split_array(result: Any, sizes: Sequence[int], stack: Stack, name: str) -> list[Any]:
    if stack != "rows":
        return split(result, sizes, False, name)
    try:
        found = len(result)
    except TypeError:
        raise BatchError(f"the batched {name} must return rows, not a {type(result).__name__}") from None
    if found != sum(sizes):
        raise BatchError(
            f"the batched {name} was given {sum(sizes)} rows of {len(sizes)} calls and returned {found}; it must "
            "return one for each, in their order"
        )
    results, start = [], 0
    for size in sizes:
        results.append(result[start : start + size])
        start += size
    return results
