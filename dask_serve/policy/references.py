"""References to published data sets in what a request brings: which there are, and the same with values in their place.

A reference is an object of JSON with one member, ``{"ref": {"dataset": "features", "partition": 17}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["BadReferenceError", "Reference", "find", "replace"]

#: Members that say which part is meant.
PLACES = ("partition", "block")


class BadReferenceError(ValueError):
    """What looks like a reference is none; the message says what is wrong with it."""


class Reference(NamedTuple):
    """One part of a published data set, or all of one that has no parts.

    Attributes
    ----------
    dataset : str
        The name that it was published under.
    place : tuple of int
        Number of the partition; of an array's block one for each dimension. Empty: none was given.
    """

    dataset: str
    place: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.dataset!r}{list(self.place) if self.place else ''}"


def find(value: Any, most: int) -> list[Reference]:
    """List the references at any depth in dicts, lists and tuples, each once.

    Parameters
    ----------
    value : object
        What JSON became.
    most : int
        How many there may be.

    Raises
    ------
    BadReferenceError
        One is not valid, or there are too many, or all of it is too deep.
    """
    found: dict[Reference, None] = {}
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if _is_reference(item):
                found[_parse(item["ref"])] = None
                if len(found) > most:
                    raise BadReferenceError(f"a request may refer to {most} parts of data sets, and not to more")
            else:
                left.extend(item.values())
        elif isinstance(item, (list, tuple)):
            left.extend(item)
    return list(found)


def replace(value: Any, values: Mapping[Reference, Any]) -> Any:
    """Return the same structure with values in place of references; what holds none is not copied.

    Raises
    ------
    BadReferenceError
        It is nested too deep.
    """
    try:
        return _replace(value, values)
    except RecursionError:
        raise BadReferenceError("a body with references to data sets is nested too deep") from None


def _replace(value: Any, values: Mapping[Reference, Any]) -> Any:
    if isinstance(value, dict):
        if _is_reference(value):
            return values[_parse(value["ref"])]
        changed = {name: _replace(item, values) for name, item in value.items()}
        return changed if any(changed[name] is not item for name, item in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [_replace(item, values) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _is_reference(value: dict[Any, Any]) -> bool:
    if len(value) != 1 or "ref" not in value:
        return False
    inner = value["ref"]
    return isinstance(inner, dict) and "dataset" in inner


def _parse(inner: dict[str, Any]) -> Reference:
    name = inner["dataset"]
    if not isinstance(name, str):
        raise BadReferenceError('the member "dataset" of a reference is the name of a data set, a string')
    unknown = inner.keys() - {"dataset", *PLACES}
    if unknown or len(inner) > 2:
        raise BadReferenceError(
            'a reference has the members "dataset" and, where the data set has parts, "partition" or "block"'
        )
    if "partition" in inner:
        place = [inner["partition"]]
    else:
        place = inner.get("block", [])
        if "block" in inner and (not isinstance(place, (list, tuple)) or not place):
            raise BadReferenceError('the member "block" of a reference lists a number for each dimension: [0, 2]')
    if not all(type(number) is int and number >= 0 for number in place):
        raise BadReferenceError("partitions and blocks of a reference are numbers from 0 on")
    return Reference(name, tuple(place))
