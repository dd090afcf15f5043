"""What JSON does not know, as something that it does."""

from __future__ import annotations

import datetime as dt
import pathlib
from collections import deque
from collections.abc import Mapping, Sequence, Set, ValuesView
from typing import Any

import msgspec

from .results import refuse_futures

__all__ = ["to_json"]

#: Methods of arrays, tensors, series; models of pydantic; frames of polars; tables of arrow.
_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tolist", {}),
    ("model_dump", {"mode": "json", "by_alias": True}),
    ("to_dicts", {}),
    ("to_pylist", {}),
)

#: Missing values of pandas.
_MISSING = frozenset({"NAType", "NaTType"})


def to_json(value: Any) -> bytes:
    """Render a value as JSON; NaN and the infinities, which JSON has not, as null.

    Raises
    ------
    TypeError
        It holds something that cannot be rendered; the message tells the type and what to do.
    """
    return _encode(value)


def _plain(value: Any) -> Any:
    """Return something that msgspec, or this function, knows to render."""
    refuse_futures(value)
    kind = type(value)
    if kind.__name__ in _MISSING and kind.__module__.startswith("pandas"):
        return None
    if kind.__module__ == "numpy" and getattr(value, "dtype", None) is not None and value.dtype.kind in "mM":
        # In microseconds, because those are what Python's own types have.
        return value.astype(f"{value.dtype.kind}8[us]").tolist()
    if isinstance(value, (str, dt.date, dt.time, dt.timedelta)):
        return _of_subclass(value)
    for name, kwargs in _METHODS:
        convert = getattr(value, name, None)
        if convert is not None and not isinstance(value, type):
            return convert(**kwargs)
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return value.to_dict(orient="records") if kind.__module__.startswith("pandas") else value.to_dict()
    return _of_python(value)


def _of_subclass(value: Any) -> Any:
    """Return the value of a subclass (a timestamp of pandas, say) as one of the class itself."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dt.timedelta):
        return dt.timedelta(value.days, value.seconds, value.microseconds)
    return value.isoformat()


def _of_python(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        # As a key, as in Python's own json module.
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (deque, Sequence, Set, ValuesView)) and not isinstance(value, tuple):
        return list(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    what = "a key that is a tuple" if isinstance(value, tuple) else f"a {type(value).__name__}"
    raise TypeError(
        f"{what} cannot be rendered as JSON; return a str, bytes, a JSON-able value (dataclasses, attrs, msgspec, "
        "pydantic, numpy and pandas included) or a starlette Response"
    )


_encode = msgspec.json.Encoder(enc_hook=_plain).encode
