"""What a method returned for some rows of a partition: checked, made what was promised, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np

__all__ = ["as_array", "count", "count_of", "join", "like", "no_rows", "promised", "same_rows"]

_WHOLE = "with batch_size=None the method gets whole partitions, and may return anything"


def count_of(rows: Any) -> int:
    """Return how many rows there are. Sparse matrices have no length.

    Raises
    ------
    TypeError
    """
    shape = getattr(rows, "shape", None)
    return int(shape[0]) if shape else len(rows)


def count(result: Any, rows: int) -> None:
    """Check that a method returned as many rows as it was given.

    Raises
    ------
    ValueError
    """
    if isinstance(result, dict):
        result = next(iter(result.values()), ())
    try:
        found = count_of(result)
    except TypeError:
        raise ValueError(f"the method returned a {type(result).__name__} for {rows} rows; {_WHOLE}") from None
    if found != rows:
        raise ValueError(f"the method returned {found} rows for {rows}; {_WHOLE}")


def same_rows(one: Any, other: Any) -> bool:
    """Tell whether two frames, series or indices are about the same rows."""
    return bool(getattr(one, "index", one).equals(getattr(other, "index", other)))


def like(meta: Any, result: Any, piece: Any) -> Any:
    """Give plain arrays and lists the index of their rows, where ``meta`` has one."""
    if not hasattr(meta, "iloc") or hasattr(result, "iloc") or not hasattr(result, "__len__"):
        return result
    index = getattr(piece, "index", None)
    if index is not None and len(index) != len(result) and not isinstance(result, dict):
        index = None
    if meta.ndim == 1:
        return type(meta)(result, index=index, name=meta.name)
    if isinstance(result, dict):
        return type(meta)(result, index=index)
    return type(meta)(result, index=index, columns=meta.columns)


def promised(meta: Any, result: Any) -> None:
    """Check that a frame is what ``meta`` says, as Dask does, who does not say where it was not.

    Raises
    ------
    ValueError
    """
    if getattr(result, "ndim", 0) != 2 or not hasattr(result, "iloc"):
        return
    if not hasattr(meta, "columns"):
        raise ValueError(f"the method returned a {type(result).__name__}, and meta is a {type(meta).__name__}")
    from dask.dataframe.utils import check_matching_columns

    check_matching_columns(meta, result)


def as_array(result: Any) -> Any:
    """Make an array of what a method returned; masked and sparse ones stay what they are."""
    return result if hasattr(result, "__array_function__") or hasattr(result, "nnz") else np.asarray(result)


def no_rows(meta: Any, shape: Sequence[float]) -> Any:
    """Return an array as ``meta`` that has no rows, of this shape otherwise."""
    # What is not known is nan.
    whole = (0, *(0 if isnan(size) else int(size) for size in shape))
    if hasattr(meta, "nnz") and not hasattr(meta, "__array_function__"):
        return type(meta)(whole, dtype=meta.dtype)
    return np.empty_like(meta, shape=whole)


def join(results: Sequence[Any]) -> Any:
    """Put together what the pieces of a partition were answered with, as Dask does with partitions."""
    first = results[0]
    if isinstance(first, tuple):
        return tuple(map(join, zip(*results, strict=True)))
    if isinstance(first, dict):
        return {key: join([result[key] for result in results]) for key in first}
    if len(results) == 1:
        return first
    if isinstance(first, list):
        return [row for rows in results for row in rows]
    if hasattr(first, "iloc"):
        # Categories of the pieces may be others.
        from dask.dataframe.dispatch import concat

        return concat(list(results))
    if isinstance(first, np.ndarray) and type(first) is np.ndarray:
        return np.concatenate(results)
    from dask.array.dispatch import concatenate_lookup

    return concatenate_lookup.dispatch(type(first))(results, axis=0)
