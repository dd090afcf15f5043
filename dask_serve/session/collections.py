"""Dask collections among the arguments of a call: those that stand for one persisted key, and all others."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import cloudpickle
from dask.base import is_dask_collection
from dask.core import flatten, iskey
from distributed import Future, futures_of

__all__ = ["Parts", "future_behind", "is_collection_type", "recipe"]


def is_collection_type(kind: type) -> bool:
    """Tell whether objects of a type may be Dask collections."""
    return hasattr(kind, "__dask_graph__")


def future_behind(collection: Any) -> Future | None:
    """Return the future that a collection stands for, or None.

    That is a persisted `dask.delayed` object, or a persisted array, frame or bag of one chunk, or one block or
    partition of a persisted one. Collections of other libraries may make something else of their key's value than
    the value, so only Dask's own count.
    """
    if not _is_dasks_own(type(collection)) or not is_dask_collection(collection):
        return None
    keys = list(flatten([collection.__dask_keys__()]))
    return _future_of(keys[0], collection.__dask_graph__()) if len(keys) == 1 else None


def _future_of(node: Any, graph: Any) -> Future | None:
    """Return the future that a key of a graph stands for, or None."""
    seen: set[Any] = set()
    # A key leads to another one (a block to the chunk that it is), or to a future.
    while not isinstance(node, Future):
        key = getattr(node, "target", node)
        if not iskey(key) or key in seen or key not in graph:
            return None
        seen.add(key)
        node = graph[key]
    return node


class Parts:
    """The futures of a persisted collection, of a future, or of a list of futures, by their place.

    Parameters
    ----------
    data : object
        It is kept, and its futures with it.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._graph: Any = None
        if _is_dasks_own(type(data)) and is_dask_collection(data):
            self._keys: Any = data.__dask_keys__()
            self._graph = data.__dask_graph__()
        else:
            self._keys = data

    def at(self, place: Sequence[int]) -> Future | None:
        """Return the future at a place; None where that is not persisted.

        ``()`` is the place of what has one part only.

        Raises
        ------
        IndexError
            There is no such part.
        """
        found = self._keys
        for number in place:
            # A key may be a tuple.
            if not isinstance(found, list):
                raise IndexError(number)
            found = found[number]
        while isinstance(found, list):
            if place or len(found) != 1:
                raise IndexError("it has several parts")
            found = found[0]
        if self._graph is not None:
            found = _future_of(found, self._graph)
        return found if isinstance(found, Future) else None


def recipe(collection: Any) -> tuple[Any, ...] | None:
    """Reduce a collection that has futures in its graph: they stay references there, for the replica's own client.

    None where it has none, and is pickled as any other object.
    """
    if not is_dask_collection(collection) or not futures_of(collection):
        return None
    return pickle.loads, (pickle.PickleBuffer(cloudpickle.dumps(collection)),)


def _is_dasks_own(kind: type) -> bool:
    return any(base.__module__.startswith("dask.") and is_collection_type(base) for base in kind.__mro__)
