"""Many models in one deployment: each replica loads those that are asked of it, and keeps some."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, overload

from .context import get_multiplexed_model_id
from .exceptions import ArgumentsError, ConfigError
from .replica.host import current_host
from .replica.kept import kept_by
from .replica.models import Models, ModelsSettings
from .wire.loops import running_loop

__all__ = ["MultiplexedLoader", "multiplexed"]

_making = threading.Lock()


class MultiplexedLoader:
    """A function, or a method in its class, that loads models. Made by `multiplexed`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.options = options
        self.is_async = inspect.iscoroutinefunction(function)
        self._kept: dict[tuple[Any, Any], Models] = {}

    def __reduce__(self) -> Any:
        # Models stay where they were loaded.
        return MultiplexedLoader, (self.function, self.options)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self._get, instance)

    def __call__(self, model_id: str | None = None) -> Any:
        return self._get(None, model_id)

    def __repr__(self) -> str:
        return f"<multiplexed {getattr(self, '__qualname__', self.function)}>"

    def _get(self, instance: Any, model_id: str | None = None) -> Any:
        function = self.function
        load = function if instance is None else function.__get__(instance)
        id = self._check(get_multiplexed_model_id() if model_id is None else model_id)
        models = self._models(instance)
        if self.is_async or running_loop() is not None:
            return models.get(load, id)
        return models.get_blocking(load, id)

    def _check(self, id: Any) -> str:
        if isinstance(id, str) and id:
            return id
        name = self.function.__name__
        if id == "":
            raise ArgumentsError(
                f"{name}() got no model id: call with handle.options(multiplexed_model_id=...), send the HTTP header "
                f"serve_multiplexed_model_id, or give {name}(model_id)"
            )
        raise ArgumentsError(f"{name}() takes the id of a model, a str, not {id!r}")

    def _models(self, instance: Any) -> Models:
        host = current_host()
        things = self._kept if instance is None else kept_by(instance, "serve.multiplexed")
        found = things.get((self, host))
        if found is None:
            with _making:
                found = things.get((self, host))
                if found is None:
                    options = self.options
                    settings = ModelsSettings(
                        options["max_num_models_per_replica"],
                        options["max_bytes"],
                        options["size_of"] or _size_of,
                        options["unload"],
                    )
                    found = things[self, host] = Models(self.function.__name__, self.is_async, settings, host)
                    if host is not None:
                        host.add_models(found)
        return found


def _size_of(model: Any) -> int:
    """Return the bytes of a model, as far as it tells."""
    nbytes = getattr(model, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    parameters = getattr(model, "parameters", None)
    if callable(parameters):
        # A module of torch.
        parts = [*parameters(), *getattr(model, "buffers", tuple)()]
        return sum(part.nbytes for part in parts)
    from dask.sizeof import sizeof

    return int(sizeof(model))


@overload
def multiplexed(function: Callable[..., Any], /) -> Any: ...


@overload
def multiplexed(
    *,
    max_num_models_per_replica: int | None = 3,
    max_bytes: int | None = None,
    size_of: Callable[[Any], int] | None = None,
    unload: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]: ...


def multiplexed(
    function: Callable[..., Any] | None = None,
    /,
    *,
    max_num_models_per_replica: int | None = 3,
    max_bytes: int | None = None,
    size_of: Callable[[Any], int] | None = None,
    unload: Callable[[Any], Any] | None = None,
) -> Any:
    """Load models when they are asked for, and keep the ones that were used last.

    The function, or method, gets the id of a model and returns it; it may be ``def`` (which runs on the replica's
    threads) or ``async def``. It is called once for each model, however many requests ask at the same time, and for
    several models at once. In a coroutine its calls are awaited, whichever kind it is.

    Requests name their model with ``handle.options(multiplexed_model_id=...)`` or the HTTP header
    ``serve_multiplexed_model_id``, and go to replicas that have it.

    A request holds the models that it got until it is answered; what is held is not unloaded. A request that needs
    room meanwhile waits for it.

    Parameters
    ----------
    max_num_models_per_replica : int or None, default 3
        How many models a replica keeps. None, or -1: any number.
    max_bytes : int or None, default None
        How large they may be together. Of a model that was never loaded it is known only afterwards: then others go.
    size_of : callable, optional
        Returns a model's bytes. Default: its ``nbytes``, those of a torch module's parameters and buffers, or what
        ``dask.sizeof`` says.
    unload : callable, optional
        Called with a model that goes, ``def`` or ``async def``. Default: the model's own method ``unload``, if it has
        one. Then the replica drops it.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Models:
    ...     @serve.multiplexed(max_num_models_per_replica=2)
    ...     def load(self, model_id):
    ...         return {"a": 1, "b": 2}[model_id]
    ...
    ...     async def predict(self, x):
    ...         model = await self.load()  # the request's model
    ...         return model * x
    >>> # handle.predict.options(multiplexed_model_id="b").remote(21).result() is 42

    Raises
    ------
    ConfigError
        An option is out of its range, or the function cannot be a loader.
    """
    most = None if max_num_models_per_replica == -1 else max_num_models_per_replica
    for name, value in {"max_num_models_per_replica": most, "max_bytes": max_bytes}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(
                f"@serve.multiplexed: option {name} = {value!r} is not valid: it is a number from 1, or None"
            )
    for name, function_of in {"size_of": size_of, "unload": unload}.items():
        if function_of is not None and not callable(function_of):
            raise ConfigError(
                f"@serve.multiplexed: option {name} = {function_of!r} is not valid: it is a function of a model"
            )
    options = {"max_num_models_per_replica": most, "max_bytes": max_bytes, "size_of": size_of, "unload": unload}

    def decorate(function: Callable[..., Any]) -> MultiplexedLoader:
        if not inspect.isfunction(function):
            raise ConfigError(f"@serve.multiplexed takes a function or a method, not {function!r}")
        return MultiplexedLoader(function, options)

    return decorate if function is None else decorate(function)
