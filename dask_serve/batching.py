"""Batching: many callers, one call of the model."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, overload

from .exceptions import ConfigError, ServeError
from .replica.batch_items import BatchSettings, Item
from .replica.batch_rows import join_results, pieces, rows_of
from .replica.batch_streams import BatchStream, StreamBatcher
from .replica.batch_values import Parameters, Stack, kind_of
from .replica.batcher import Batcher
from .replica.host import current_host
from .replica.kept import forget_closed, kept_by
from .wire.loops import running_loop

__all__ = ["BatchedFunction", "BatchedMethod", "batch", "method"]

_making = threading.Lock()


class BatchedFunction:
    """A function, or a method in its class, whose calls run in batches. Made by `batch`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.options = options
        self.is_async = inspect.iscoroutinefunction(function)
        self.streams = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        #: Of a plain function, by the replica or event loop that calls it (None: threads).
        self._kept: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        # What runs stays where it runs.
        return BatchedFunction, (self.function, self.options)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else BatchedMethod(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bound()(*args, **kwargs)

    def bound(self) -> BatchedMethod:
        """Return the plain function as something with settings."""
        return BatchedMethod(self, None)

    def __getattr__(self, name: str) -> Any:
        # The settings of a plain function.
        if name.startswith("set_") or name == "get_batch_counts":
            return getattr(self.bound(), name)
        raise AttributeError(f"a batched function has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<batched {getattr(self, '__qualname__', self.function)}>"

    @property
    def largest(self) -> int:
        """The calls that it takes to have all run that may, and full; 1 where one call may fill a batch."""
        if self.options["stack"] == "rows" or self.options["batch_size_fn"] is not None:
            return 1
        return int(self.options["max_batch_size"]) * int(self.options["max_concurrent_batches"])

    # ------------------------------------------------------------------ batchers

    def batcher_of(self, instance: Any, call: Callable[..., Any]) -> Batcher:
        """Return what batches the calls of an instance (None: of the plain function) where this code runs."""
        host = current_host()
        place = host if host is not None else running_loop()
        batchers = self._kept if instance is None else kept_by(instance, "serve.batch")
        found = batchers.get((self, place))
        if found is None:
            with _making:
                found = batchers.get((self, place))
                if found is None:
                    forget_closed(batchers)
                    settings = batchers.get((self, "settings"))
                    if settings is None:
                        settings = batchers[self, "settings"] = self._settings()
                    found = batchers[self, place] = self._make(call, settings)
        return found

    def _settings(self) -> BatchSettings:
        options = self.options
        return BatchSettings(
            most=options["max_batch_size"],
            wait=options["batch_wait_timeout_s"],
            concurrent=options["max_concurrent_batches"],
            size_fn=options["batch_size_fn"],
            bisect=options["bisect"],
            stack=options["stack"],
        )

    def _make(self, call: Callable[..., Any], settings: BatchSettings) -> Batcher:
        host = current_host()
        loop = running_loop() if host is None else host.loop
        kind = StreamBatcher if self.streams else Batcher
        batcher = kind(
            self.function.__name__,
            Parameters(call),
            settings,
            on_loop=self.is_async or self.streams,
            loop=loop,
            pool=None if host is None else host.pool,
        )
        if host is not None:
            host.add_batcher(batcher)
        return batcher


class BatchedMethod:
    """A batched method of one object, or a plain batched function. Called as if it took one call at a time."""

    __slots__ = ("_call", "_function", "_instance")

    def __init__(self, function: BatchedFunction, instance: Any) -> None:
        self._function = function
        self._instance = instance
        call = function.function
        self._call = call if instance is None else call.__get__(instance)

    def __repr__(self) -> str:
        return f"<batched method of {self._call!r}>"

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._call

    @property
    def streams(self) -> bool:
        """It returns a stream."""
        return self._function.streams

    def _batcher(self) -> Batcher:
        return self._function.batcher_of(self._instance, self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._function
        if function.is_async:
            return self._run(args, kwargs)
        loop = running_loop()
        if function.streams:
            if loop is None and current_host() is None:
                raise ServeError(
                    f"the batched generator {function.function.__name__} needs an event loop: call it in `async def` "
                    "code, and iterate with `async for`"
                )
            batcher = self._batcher()
            assert isinstance(batcher, StreamBatcher)
            return BatchStream(batcher, self._item(batcher, batcher.parameters.values(args, kwargs)))
        if loop is not None:
            return self._run(args, kwargs)
        batcher = self._batcher()
        parts = self._parts(batcher, args, kwargs)
        if len(parts) == 1:
            return batcher.run_blocking(self._item(batcher, parts[0]))
        return join_results([batcher.run_blocking(self._item(batcher, part)) for part in parts])

    async def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batcher = self._batcher()
        parts = self._parts(batcher, args, kwargs)
        if len(parts) == 1:
            return await batcher.run(self._item(batcher, parts[0]))
        tasks = [asyncio.ensure_future(batcher.run(self._item(batcher, part))) for part in parts]
        try:
            return join_results(await asyncio.gather(*tasks))
        finally:
            # One has failed: nobody waits for the others.
            for task in tasks:
                task.cancel()

    @staticmethod
    def _parts(batcher: Batcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Return the arguments of a call; where it brings more rows than a batch takes, of several."""
        values = batcher.parameters.values(args, kwargs)
        settings = batcher.settings
        if settings.stack == "rows" and settings.size_fn is None:
            rows = rows_of(values, batcher.name)
            if rows > settings.most:
                return list(pieces(values, rows, settings.most))
        return [values]

    def _item(self, batcher: Batcher, values: tuple[Any, ...]) -> Item:
        settings = batcher.settings
        size: float = 1
        key: Any = None
        if settings.stack:
            key = kind_of(values, settings.stack)
            if settings.stack == "rows":
                size = max(1, rows_of(values, batcher.name))
        if settings.size_fn is not None:
            size = _counted(settings.size_fn([values[0] if len(values) == 1 else values]), batcher.name)
        return Item(self._call, values, size, key)

    # ------------------------------------------------------------------ settings

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Change the size of the largest batch, of this object in this replica, from now on."""
        _check("max_batch_size", max_batch_size)
        batcher = self._batcher()
        batcher.settings.most = max_batch_size
        batcher.look()

    def set_batch_wait_timeout_s(self, batch_wait_timeout_s: float) -> None:
        """Change for how many seconds the first call of a batch waits for others."""
        _check("batch_wait_timeout_s", batch_wait_timeout_s)
        batcher = self._batcher()
        batcher.settings.wait = batch_wait_timeout_s
        batcher.look()

    def set_max_concurrent_batches(self, max_concurrent_batches: int) -> None:
        """Change how many batches may run at the same time."""
        _check("max_concurrent_batches", max_concurrent_batches)
        batcher = self._batcher()
        batcher.settings.concurrent = max_concurrent_batches
        batcher.look()

    def get_batch_counts(self) -> dict[str, float]:
        """Return what has been batched so far: as in ``serve.status().workers``."""
        batcher = self._batcher()
        return batcher.counts.as_dict(len(batcher))


def _counted(size: Any, name: str) -> float:
    """Return what a ``batch_size_fn`` has returned, as a number."""
    try:
        number = float(size)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"the batch_size_fn of {name} returned {size!r}; it must return a number, 0 or more")
    return number


def is_batched(function: object) -> bool:
    """Tell whether calls of this are awaited for their batch, whatever runs it."""
    return isinstance(function, BatchedMethod) and not function.streams


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_batch_size": (lambda value: _is_int(value) and value >= 1, "a whole number from 1"),
    "batch_wait_timeout_s": (
        lambda value: isinstance(value, (int, float)) and 0 <= value < float("inf"),
        "seconds, 0 or more",
    ),
    "max_concurrent_batches": (lambda value: _is_int(value) and value >= 1, "a whole number from 1"),
    "batch_size_fn": (lambda value: value is None or callable(value), "a function of a list of calls, or None"),
    "bisect": (lambda value: isinstance(value, bool), "True or False"),
    "stack": (lambda value: value in (True, False, "rows"), 'True, False or "rows"'),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: Any) -> None:
    fits, what = _RANGES[name]
    if not fits(value):
        raise ConfigError(f"@serve.batch: option {name} = {value!r} is not valid: it is {what}")


@overload
def batch(function: Callable[..., Any], /) -> Any: ...


@overload
def batch(
    *,
    max_batch_size: int = 64,
    batch_wait_timeout_s: float = 0.0,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], float] | None = None,
    bisect: bool = True,
    stack: Stack = False,
) -> Callable[[Callable[..., Any]], Any]: ...


def batch(
    function: Callable[..., Any] | None = None,
    /,
    *,
    max_batch_size: int = 64,
    batch_wait_timeout_s: float = 0.0,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], float] | None = None,
    bisect: bool = True,
    stack: Stack = False,
) -> Any:
    """Run the calls of a method, or of a function, in batches.

    The function gets each argument as a list with one value for each call, and returns a list with one result for
    each, in the same order. Who calls it gives one value and gets one result; nobody sees the others. It may be ``def``
    (batches run on the replica's threads), ``async def`` (on its event loop), or a generator of either kind, which
    yields lists: each caller gets a stream of its items.

    In a coroutine a call is awaited, whichever kind the function is. In a thread the call of a ``def`` waits for its
    result.

    A batch begins at once when none runs; while one runs the next one fills. Where requests have deadlines it is no
    larger than what fits into half of the time they came with, by the time that batches were seen to take.

    Parameters
    ----------
    max_batch_size : int, default 64
        The most calls in a batch.
    batch_wait_timeout_s : float, default 0.0
        Seconds for which the first call of a batch waits for others even where none runs.
    max_concurrent_batches : int, default 1
        How many batches run at the same time.
    batch_size_fn : callable, optional
        Returns what a list of calls counts, for ``max_batch_size``; it is called with one call at a time: ``[value]``,
        or ``[(value, ...)]`` where the function has several parameters. By default each counts 1.
    bisect : bool, default True
        When a batch fails, its halves are tried, and theirs, until those calls are found that fail alone. The others
        run up to ``log2(max_batch_size)`` times more. False: all calls of the batch fail.
    stack : bool or "rows", default False
        True: values, of numpy or torch, are stacked along a new first axis, and the results are split along it. "rows":
        each call brings rows and gets as many back, as with `method`.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Model:
    ...     @serve.batch(max_batch_size=32)
    ...     def predict(self, values):
    ...         return [2 * value for value in values]
    >>> # handle.predict.remote(21).result() is 42

    Raises
    ------
    ConfigError
        An option is out of its range, or the function cannot be batched.
    """
    options = {
        "max_batch_size": max_batch_size,
        "batch_wait_timeout_s": batch_wait_timeout_s,
        "max_concurrent_batches": max_concurrent_batches,
        "batch_size_fn": batch_size_fn,
        "bisect": bisect,
        "stack": stack,
    }
    for name, value in options.items():
        _check(name, value)

    def decorate(function: Callable[..., Any]) -> BatchedFunction:
        if not inspect.isfunction(function):
            raise ConfigError(f"@serve.batch takes a function or a method, not {function!r}")
        return BatchedFunction(function, options)

    return decorate if function is None else decorate(function)


def method(
    *,
    batch: bool = False,
    max_batch_size: int = 64,
    batch_wait_timeout_s: float = 0.0,
    max_concurrent_batches: int = 1,
    bisect: bool = True,
) -> Callable[[Callable[..., Any]], Any]:
    """Declare a method that takes many inputs and returns as many results; with ``batch=True`` calls share batches.

    Nothing else changes with ``batch``: the method's code is the same, and callers give what they gave, a list, an
    array or a frame with one entry for each input, and get as many entries back. ``def`` and ``async def``, of
    deployments and other objects, and plain functions.

    Lists, arrays of numpy and torch, frames and series of pandas are joined along their first axis and split again, in
    a tuple or a dict of results each of them. Other arguments are settings: only calls with the same ones share a
    batch. Who brings more than ``max_batch_size`` is answered by several batches.

    Parameters
    ----------
    batch : bool, default False
        False: each call runs by itself, and nothing is done to the method.
    max_batch_size : int, default 64
        The most inputs in a batch, of all its calls together.
    batch_wait_timeout_s, max_concurrent_batches, bisect
        As those of `batch`.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Embedder:
    ...     @serve.method(batch=True, max_batch_size=32)
    ...     def embed(self, texts, language="en"):
    ...         return [len(text) for text in texts]
    >>> # handle.embed.remote(["one", "three"]).result() is [3, 5]

    Raises
    ------
    ConfigError
        An option is out of its range, or the method cannot be batched.
    """
    if not isinstance(batch, bool):
        raise ConfigError(f"@serve.method: option batch = {batch!r} is not valid: it is True or False")
    decorate = _batched(
        max_batch_size=max_batch_size,
        batch_wait_timeout_s=batch_wait_timeout_s,
        max_concurrent_batches=max_concurrent_batches,
        bisect=bisect,
        stack="rows",
    )

    def declare(function: Callable[..., Any]) -> Any:
        if not inspect.isfunction(function):
            raise ConfigError(f"@serve.method takes a function or a method, not {function!r}")
        if not batch:
            return function
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(
                f"@serve.method(batch=True) on {function.__qualname__}: the streams of several callers cannot be told "
                "apart in what a generator yields; use @serve.batch, whose generators yield lists with an item for each"
            )
        return decorate(function)

    return declare


#: Inside `method` the name is that of its parameter.
_batched = batch
