"""What a method returned for some rows of a partition: checked, and made what was promised."""

from __future__ import annotations

from typing import Any

__all__ = ["count", "like"]

_WHOLE = "with batch_size=None the method gets whole partitions, and may return anything"


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
