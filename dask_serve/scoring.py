"""Dask collections scored by the replicas that serve: lazy collections, whose tasks call the deployment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.base import is_dask_collection

from .exceptions import ConfigError
from .mapping import refuse_streams
from .replica.batch_rows import cut
from .session.pieces import Lane, Where, Work
from .session.rows import as_array, count_of, join, like, no_rows, promised, same_rows

if TYPE_CHECKING:
    from .handle import DeploymentHandle

__all__ = ["score_array", "score_bag", "score_frame"]

#: Options of Dask's functions, which methods do not get.
OF_FRAMES = ("enforce_metadata", "required_columns", "clear_divisions", "token")
OF_ARRAYS = ("chunks", "drop_axis", "new_axis", "token", "name", "enforce_ndim")
#: Items of one partition of a bag that are under way.
ITEMS = 256


def score_frame(  # noqa: PLR0917
    handle: DeploymentHandle, frame: Any, args: Sequence[Any], meta: Any, batch_size: Any, kwargs: dict[str, Any]
) -> Any:
    """Make the frame that `DeploymentHandle.map_partitions` returns."""
    import dask.dataframe as dd
    from dask.dataframe.dask_expr import Scalar
    from dask.dataframe.dispatch import make_meta

    if not isinstance(frame, (dd.DataFrame, dd.Series, dd.Index)):
        raise ConfigError(f"{handle!r}.map_partitions takes a Dask dataframe, series or index, not {_kind(frame)}")
    if meta is None:
        raise ConfigError(
            f"{handle!r}.map_partitions needs meta=, what comes out: it is not found out, because that would call the "
            'model. For example meta=("score", "float64") for a series, meta={"a": "int64"} for a frame, or meta=frame'
        )
    size = _check_size(handle, "map_partitions", batch_size)
    options = {name: kwargs.pop(name) for name in OF_FRAMES if name in kwargs}
    made = make_meta(meta, index=getattr(frame._meta, "index", None), parent_meta=frame._meta)
    frames = (dd.DataFrame, dd.Series, dd.Index)
    # Dask brings the partitions of what is given by position only.
    names = tuple(name for name, one in kwargs.items() if isinstance(one, (*frames, Scalar)))
    args = [*args, *(kwargs.pop(name) for name in names)]
    along = tuple(
        number for number, one in enumerate(args) if isinstance(one, frames) and one.npartitions == frame.npartitions
    )
    scorer = FrameScorer(handle, size, _name(frame), along, made, names)
    # Dask gives the only partition of a frame to all partitions of another.
    scorer.single = frame.npartitions == 1
    scorer.enforced = options.get("enforce_metadata", True)
    options.setdefault("token", f"score-{_method(handle)}")
    # It would call the model with the divisions of an index.
    options["transform_divisions"] = False
    return dd.map_partitions(scorer, frame, *args, meta=made, **options, **kwargs)


def score_array(  # noqa: PLR0917
    handle: DeploymentHandle, array: Any, args: Sequence[Any], dtype: Any, meta: Any, batch_size: Any, kwargs: Any
) -> Any:
    """Make the array that `DeploymentHandle.map_blocks` returns."""
    import dask.array as da

    if not isinstance(array, da.Array):
        raise ConfigError(f"{handle!r}.map_blocks takes a Dask array, not {_kind(array)}")
    if dtype is None and meta is None:
        raise ConfigError(
            f"{handle!r}.map_blocks needs dtype= (or meta=), that of what comes out: it is not found out, because that "
            'would call the model. For example dtype="float64"'
        )
    size = _check_size(handle, "map_blocks", batch_size)
    options = {name: kwargs.pop(name) for name in OF_ARRAYS if name in kwargs}
    if meta is None:
        # What is made of sparse rows is dense, unless it is said.
        kept = array._meta is not None and not hasattr(array._meta, "nnz")
        meta = array._meta.astype(dtype) if kept else np.empty(0, dtype)
    if dtype is None:
        dtype = getattr(meta, "dtype", None)
    names = tuple(name for name, one in kwargs.items() if isinstance(one, da.Array) and _has_rows_of(array, one))
    args = [*args, *(kwargs.pop(name) for name in names)]
    along = tuple(number for number, one in enumerate(args) if isinstance(one, da.Array) and _has_rows_of(array, one))
    moved = not array.ndim or _moves_rows(array, options)
    # Only where there may be empty blocks that are not sent: it costs something for each block.
    kind = BlockScorer if moved or all(rows > 0 for rows in array.chunks[0]) else EmptyBlockScorer
    scorer = kind(handle, None if moved else size, array.name, along, meta, names)
    options.setdefault("token", f"score-{_method(handle)}")
    return da.map_blocks(scorer, array, *args, dtype=dtype, meta=meta, **options, **kwargs)


def score_bag(handle: DeploymentHandle, bag: Any, kwargs: dict[str, Any]) -> Any:
    """Make the bag that `DeploymentHandle.map_bag` returns."""
    import dask.bag as db

    refuse_streams(handle)
    if not isinstance(bag, db.Bag):
        raise ConfigError(f"{handle!r}.map_bag takes a Dask bag, not {_kind(bag)}")
    # A bag does not tell its partitions their numbers.
    numbers = db.from_sequence(range(bag.npartitions), npartitions=bag.npartitions)
    return db.map_partitions(ItemScorer(handle, None, bag.name), bag, numbers, kwargs)


class Scorer:
    """What the tasks of a scored collection call.

    Parameters
    ----------
    handle : DeploymentHandle
    size : int, "auto" or None
        Rows of a call; None: all that there are.
    collection : str
        What is scored, for errors.
    along : tuple of int
        The further arguments whose partitions have the same rows.
    meta : object
        An empty one of what comes out.
    names : tuple of str
        What the last arguments are called.
    """

    #: The collection has one part, and so have further arguments whose rows may be others.
    single = False

    def __init__(  # noqa: PLR0917
        self,
        handle: DeploymentHandle,
        size: Any,
        collection: str,
        along: tuple[int, ...] = (),
        meta: Any = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.handle = handle
        self.size = size
        self.collection = collection
        self.along = along
        self.meta = meta
        self.names = names
        self.__name__ = f"score-{_method(handle)}"

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self.handle.__dask_tokenize__(), self.size, self.along, self.meta, self.names

    def run(
        self, rows: int, args: Sequence[Any], kwargs: dict[str, Any], where: Where, keep: Callable[[Any, Any], Any]
    ) -> list[Any]:
        """Call the method for the rows of ``args[0]``; ``keep(result, piece)`` makes of each result what is kept."""
        first = len(args) - len(self.names)
        along = {0}
        if self.size is not None:
            called = [*range(first), *map(repr, self.names)]
            along |= {one + 1 for one in self.along if self._is_along(args[one + 1], args[0], where, called[one + 1])}

        def arguments(start: int, stop: int) -> tuple[list[Any], dict[str, Any]]:
            cuts = list(args)
            if start or stop < rows:
                for number in along:
                    cuts[number] = cut(cuts[number], start, stop)
            return cuts[:first], {**kwargs, **dict(zip(self.names, cuts[first:], strict=True))}

        work = Work(rows, arguments, keep, counted=self.size is not None)
        with Lane(self.handle, rows if self.size is None else self.size, where) as lane:
            return lane.run(work, "rows {} to {}")

    def _is_along(self, more: Any, rows: Any, where: Where, name: Any) -> bool:
        if self.single:
            return same_rows(more, rows)
        if count_of(more) != count_of(rows):
            found, wanted = count_of(more), count_of(rows)
            raise where.error(ValueError(f"argument {name} has {found} rows and the partition {wanted}"))
        return True


class FrameScorer(Scorer):
    """Scores a partition of a frame."""

    enforced = True

    def __call__(self, partition: Any, *args: Any, partition_info: Any = None, **kwargs: Any) -> Any:
        where = Where(self.handle, self.collection, "partition", partition_info)
        rows = len(partition)
        if not rows:
            return self.meta
        results = self.run(
            rows, [partition, *args], kwargs, where, lambda result, piece: like(self.meta, result, piece)
        )
        with where:
            result = join(results)
            if self.enforced:
                promised(self.meta, result)
            return result


class BlockScorer(Scorer):
    """Scores a block of an array."""

    def __call__(self, block: Any, *args: Any, block_id: tuple[int, ...] | None = None, **kwargs: Any) -> Any:
        where = Where(self.handle, self.collection, "block", None if block_id is None else {"number": block_id})
        # An empty block, where rows are not rows of what comes out, is one that Dask sends as well.
        rows = max(1, count_of(block)) if block.ndim else 1
        whole = self.size is None
        results = self.run(rows, [block, *args], kwargs, where, lambda result, _: result if whole else as_array(result))
        with where:
            return join(results)


class EmptyBlockScorer(BlockScorer):
    """Scores a block that may be empty."""

    def __call__(self, block: Any, *args: Any, block_info: Any = None, **kwargs: Any) -> Any:
        if count_of(block) or block_info is None:
            return super().__call__(block, *args, **kwargs)
        return no_rows(self.meta, block_info[None]["chunk-shape"][1:])


class ItemScorer(Scorer):
    """Scores the items of a partition of a bag."""

    def __call__(self, items: Any, numbers: Any, kwargs: dict[str, Any]) -> list[Any]:
        [number] = numbers
        where = Where(self.handle, self.collection, "partition", {"number": number})
        items = list(items)
        work = Work(len(items), lambda start, _: ([items[start]], kwargs), lambda result, _: result)
        with Lane(self.handle, 1, where, ahead=ITEMS) as lane:
            return lane.run(work, "item {}")


def _check_size(handle: DeploymentHandle, function: str, size: Any) -> Any:
    refuse_streams(handle)
    if size is None or size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
        return size
    raise ConfigError(
        f"{handle!r}.{function}: batch_size = {size!r} is not valid: it is a whole number from 1, "
        '"auto", or None for whole partitions'
    )


def _has_rows_of(array: Any, other: Any) -> bool:
    """Tell whether another array has the same rows in its blocks, which Dask brings with those of the first one."""
    if not array.ndim or other.ndim != array.ndim:
        return False
    # What is not known is nan, which equals nothing; the task counts.
    pairs = zip(array.chunks[0], other.chunks[0], strict=False)
    return array.numblocks[0] == other.numblocks[0] and all(a == b or isnan(a) or isnan(b) for a, b in pairs)


def _moves_rows(array: Any, options: dict[str, Any]) -> bool:
    """The first axis of what comes out is not that of the blocks: pieces of them cannot be put together."""
    dropped, new, chunks = (options.get(name) for name in ("drop_axis", "new_axis", "chunks"))
    axes = [*np.atleast_1d([] if dropped is None else dropped)]
    if any(axis % array.ndim == 0 for axis in axes) or 0 in np.atleast_1d([] if new is None else new):
        return True
    return new is None and chunks is not None and len(chunks) > array.ndim - len(axes)


def _method(handle: DeploymentHandle) -> str:
    method = handle._options.method_name
    return handle.deployment_name if method == "__call__" else method


def _name(frame: Any) -> str:
    return str(frame._name) if is_dask_collection(frame) else ""


def _kind(value: Any) -> str:
    return f"a {type(value).__module__.split('.')[0]} {type(value).__name__}"
