"""Calls that bring rows: joined for the batch, and split again.

Lists, arrays of numpy and torch, and frames and series of pandas are rows. What is none of these is a setting, the same
for all of a batch.
"""

from __future__ import annotations

import inspect
import itertools
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..exceptions import ArgumentsError, BatchError

__all__ = ["is_torch", "join_results", "join_rows", "kind_of_rows", "pieces", "rows_of", "split_rows"]


def is_torch(value: object) -> bool:
    """Tell a tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_rows(value: object) -> bool:
    """Tell whether a value is rows."""
    return isinstance(value, list) or len(getattr(value, "shape", ())) >= 1


def kind_of_rows(value: Any) -> Any:
    """Return what two calls have in common that share a batch: what their rows are, or the setting."""
    if isinstance(value, list):
        return list
    kind = type(value)
    if not is_rows(value):
        try:
            hash(value)
        except TypeError:
            value = pickle.dumps(value)
        return kind, value
    if hasattr(value, "iloc"):
        columns = getattr(value, "columns", None)
        return kind, *((value.dtype,) if columns is None else (tuple(columns), tuple(value.dtypes)))
    return kind, str(value.dtype), tuple(value.shape[1:]), is_torch(value) and str(value.device)


def rows_of(values: Sequence[Any], name: str) -> int:
    """Return how many rows a call brings.

    Raises
    ------
    ArgumentsError
        It brings none, or not as many in each argument.
    """
    counts = {len(value) for value in values if is_rows(value)}
    if len(counts) == 1:
        return counts.pop()
    if counts:
        found = " and ".join(map(str, sorted(counts)))
        raise ArgumentsError(f"a call of {name} brings {found} rows; its lists and arrays must be of one length")
    kinds = ", ".join(type(value).__name__ for value in values if value is not inspect.Parameter.empty)
    raise ArgumentsError(
        f"a call of {name} brings no rows ({kinds}): give a list, an array or a frame, for one input with one entry"
    )


def join_rows(values: Sequence[Any]) -> Any:
    """Join the rows of several calls, which are of one kind; a setting stays what it is."""
    first = values[0]
    if len(values) == 1 or not is_rows(first):
        return first
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(values))
    if hasattr(first, "iloc"):
        return sys.modules["pandas"].concat(values)
    if is_torch(first):
        return sys.modules["torch"].cat(list(values))
    import numpy as np

    return np.concatenate(values)


def pieces(values: Sequence[Any], rows: int, most: int) -> Iterator[tuple[Any, ...]]:
    """Cut a call into several that bring no more than ``most`` rows each."""
    count = -(-rows // most)
    for number in range(count):
        start, stop = rows * number // count, rows * (number + 1) // count
        yield tuple(cut(value, start, stop) if is_rows(value) else value for value in values)


def cut(rows: Any, start: int, stop: int) -> Any:
    """Return some of the rows."""
    return rows.iloc[start:stop] if hasattr(rows, "iloc") else rows[start:stop]


def join_results(results: Sequence[Any]) -> Any:
    """Join what the pieces of one call were answered with."""
    first = results[0]
    if isinstance(first, tuple):
        return tuple(map(join_results, zip(*results, strict=True)))
    if isinstance(first, dict):
        return {key: join_results([result[key] for result in results]) for key in first}
    return join_rows(results)


def split_rows(result: Any, sizes: Sequence[int], name: str) -> list[Any]:
    """Split the result of a batch; in a tuple or a dict each value is rows.

    Raises
    ------
    BatchError
        It has not one row for each.
    """
    if isinstance(result, (tuple, dict)) and not result:
        raise BatchError(f"the batched {name} returned an empty {type(result).__name__}, and so no rows for its calls")
    if isinstance(result, tuple):
        return list(zip(*[split_rows(part, sizes, name) for part in result], strict=True))
    if isinstance(result, dict):
        parts = {key: split_rows(part, sizes, name) for key, part in result.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    if not is_rows(result):
        raise BatchError(f"the batched {name} must return rows (a list, an array), not a {type(result).__name__}")
    if len(result) != sum(sizes):
        raise BatchError(
            f"the batched {name} was given {sum(sizes)} rows of {len(sizes)} calls and returned {len(result)}; it must "
            "return one for each, in their order"
        )
    edges = [0, *itertools.accumulate(sizes)]
    return [cut(result, start, stop) for start, stop in itertools.pairwise(edges)]
