"""What a handle does with many items at once: maps over iterables, and over Dask collections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from .mapping import WINDOW, RefMap

__all__ = ["Many"]


class Many:
    """The base of `DeploymentHandle` for calls of many items. All of them are background work and may run twice."""

    __slots__ = ()

    def map(
        self: Any, *iterables: Iterable[Any], ordered: bool = True, window: int = WINDOW, progress: bool = False
    ) -> RefMap:
        """Call the deployment with each item; several iterables give several arguments, as with the builtin.

        Calls take what online requests leave, wait for as long as it takes, and are made again when their replica is
        lost, unless the handle's ``request_class``, ``request_timeout_s`` and ``retries_on_loss`` say otherwise.

        Parameters
        ----------
        *iterables
            Of any length: only ``window`` calls are made ahead. Between items of one that takes its time refs are
            handed out.
        ordered : bool, default True
            False: refs come as calls end.
        window : int, default 1000
            Calls that are made and whose refs were not handed out.
        progress : bool, default False
            Draw a bar in terminals and notebooks.

        Returns
        -------
        RefMap
            An iterator of refs that have ended; in an event loop ``async for`` iterates over it.

        Examples
        --------
        >>> results = [ref.result() for ref in handle.predict.map(items)]  # doctest: +SKIP
        >>> async for ref in handle.map(items, ordered=False):  # doctest: +SKIP
        ...     print(await ref)

        Raises
        ------
        ConfigError
            An argument is not valid, or the handle was made with ``stream=True``.
        """
        return RefMap(self, iterables, ordered=ordered, window=window, progress=progress)

    def map_partitions(
        self: Any, frame: Any, *args: Any, meta: Any = None, batch_size: Any = "auto", **kwargs: Any
    ) -> Any:
        """Score a Dask dataframe with the replicas that serve: `dask.dataframe.map_partitions` with this method.

        Lazy. Each partition is cut into pieces of some rows, and the method is called with each; it returns as many
        rows. `docs/batch-scoring.md` has the details.

        Parameters
        ----------
        frame : dask.dataframe.DataFrame, Series or Index
        *args
            More arguments of the method. Dask frames, here or by name, that have as many partitions as ``frame`` are
            cut with it; those of one partition arrive whole.
        meta : object
            What comes out, in any form that Dask takes; ``meta=frame``: the same columns as ``frame``. The model is
            never asked.
        batch_size : int, "auto" or None, default "auto"
            Rows of a call. "auto": ``max_batch_size`` of a method with ``@serve.batch(stack="rows")``, else what takes
            some milliseconds, which is found out. None: whole partitions, and the method may return anything.
        **kwargs
            Options of Dask's function (``enforce_metadata``, ``required_columns``, ``clear_divisions``, ``token``);
            all others are keyword arguments of the method.

        Returns
        -------
        dask.dataframe.DataFrame, Series or Index
            As ``meta`` says. Arrays and lists that the method returns get the index of their rows.

        Raises
        ------
        ConfigError
            ``meta`` is missing, or an argument is not valid.
        ScoringError
            When computed: a partition failed; it names which.
        """
        from .scoring import score_frame

        return score_frame(self, frame, args, meta, batch_size, kwargs)

    def map_blocks(
        self: Any, array: Any, *args: Any, dtype: Any = None, meta: Any = None, batch_size: Any = "auto", **kwargs: Any
    ) -> Any:
        """Score a Dask array with the replicas that serve: `dask.array.map_blocks` with this method.

        Lazy. Each block is cut along its first axis into pieces, as `map_partitions` does with rows.

        Parameters
        ----------
        array : dask.array.Array
        *args
            More arguments of the method. Arrays, here or by name, that have as many axes and the chunks of ``array``
            along the first one are cut with it.
        dtype : dtype
            Of what comes out; or ``meta``, an empty array of its kind. The model is never asked. Without ``meta`` what
            comes out of sparse blocks is dense.
        batch_size : int, "auto" or None, default "auto"
            As in `map_partitions`. Where the first axis is dropped, or a new one comes before it, blocks stay whole.
        **kwargs
            Options of Dask's function (``chunks``, ``drop_axis``, ``new_axis``, ``token``, ``name``,
            ``enforce_ndim``); all others are keyword arguments of the method.

        Returns
        -------
        dask.array.Array

        Raises
        ------
        ConfigError
            ``dtype`` and ``meta`` are missing, or an argument is not valid.
        ScoringError
            When computed: a block failed; it names which.
        """
        from .scoring import score_array

        return score_array(self, array, args, dtype, meta, batch_size, kwargs)

    def map_bag(self: Any, bag: Any, **kwargs: Any) -> Any:
        """Call the deployment with each item of a Dask bag.

        Parameters
        ----------
        bag : dask.bag.Bag
        **kwargs
            Keyword arguments of the method.

        Returns
        -------
        dask.bag.Bag
            Lazy; the results, in the order of the items.

        Raises
        ------
        ScoringError
            When computed: an item failed; it names which.
        """
        from .scoring import score_bag

        return score_bag(self, bag, kwargs)

    def __dask_tokenize__(self: Any) -> Any:
        app, deployment, address, options = self._target()
        return type(self).__name__, app, deployment, address, msgspec.structs.astuple(options)
