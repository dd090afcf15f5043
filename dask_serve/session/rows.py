"""Rows of partitions: cutting them, and putting results together."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["count", "cut", "join", "like"]

_WHOLE = "with batch_size=None the method gets whole partitions, and may return anything"


def cut(partition: Any, start: int, stop: int) -> Any:
    """Return some rows of a frame, an array or a list."""
    return partition.iloc[start:stop] if hasattr(partition, "iloc") else partition[start:stop]


def count(result: Any, rows: int) -> None:
    """Check that a method returned as many rows as it was given.

    Raises
    ------
    ValueError
    """
    try:
        found = len(result)
    except TypeError:
        raise ValueError(f"the method returned a {type(result).__name__} for {rows} rows; {_WHOLE}") from None
    if isinstance(result, dict):
        found = len(next(iter(result.values()), ()))
    if found != rows:
        raise ValueError(f"the method returned {found} rows for {rows}; {_WHOLE}")


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


def join(results: Sequence[Any]) -> Any:
    """Put the results of pieces together."""
    first = results[0]
    if len(results) == 1:
        return first
    if hasattr(first, "iloc"):
        from dask.dataframe.dispatch import concat

        return concat(list(results))
    if isinstance(first, (list, tuple)):
        return list(itertools.chain.from_iterable(results))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(first, torch.Tensor):
        return torch.cat(list(results))
    return np.concatenate(results)
