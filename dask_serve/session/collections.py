"""Dask collections among the arguments of a call: those that stand for one persisted key, and all others."""

from __future__ import annotations

import pickle
from typing import Any

import cloudpickle
from dask.base import is_dask_collection
from dask.core import flatten, iskey
from distributed import Future, futures_of

__all__ = ["future_behind", "is_collection_type", "recipe"]


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
    if len(keys) != 1:
        return None
    graph = collection.__dask_graph__()
    seen: set[Any] = set()
    node: Any = keys[0]
    # A key leads to another one (a block to the chunk that it is), or to a future.
    while not isinstance(node, Future):
        key = getattr(node, "target", node)
        if not iskey(key) or key in seen or key not in graph:
            return None
        seen.add(key)
        node = graph[key]
    return node


def recipe(collection: Any) -> tuple[Any, ...] | None:
    """Reduce a collection that has futures in its graph: they stay references there, for the replica's own client.

    None where it has none, and is pickled as any other object.
    """
    if not is_dask_collection(collection) or not futures_of(collection):
        return None
    return pickle.loads, (pickle.PickleBuffer(cloudpickle.dumps(collection)),)


def _is_dasks_own(kind: type) -> bool:
    return any(base.__module__.startswith("dask.") and is_collection_type(base) for base in kind.__mro__)
