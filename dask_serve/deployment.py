"""Declaring what to serve: the decorator, deployments, and applications bound from them."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec
from msgspec import UNSET, UnsetType

from .batching import BatchedFunction
from .config import AutoscalingConfig, DeploymentOptions, Level, RuntimeEnv
from .defaults import checked, configured
from .exceptions import ConfigError, ServeError
from .ingress import ingress_of
from .options import build_options, change_options
from .shipping.spellings import check_hooks, translate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .handle import DeploymentHandle

__all__ = ["Application", "Deployment", "deployment"]


class Deployment:
    """A class or function with options, ready to be bound into an application.

    Made by the `deployment` decorator; never changed afterwards.

    Attributes
    ----------
    name : str
        Name of the deployment within its application.
    func_or_class : class or function
        What replicas run.
    """

    __slots__ = ("__weakref__", "_options", "func_or_class", "name")

    def __init__(self, func_or_class: Any, name: str, options: DeploymentOptions) -> None:
        self.func_or_class = func_or_class
        self.name = check_name(name, "a deployment")
        self._options = options
        _check_batches(func_or_class, options.max_ongoing_requests, name)

    @property
    def num_replicas(self) -> int | str:
        """How many replicas to keep ready, or ``"auto"``."""
        return self._options.num_replicas

    @property
    def max_ongoing_requests(self) -> int:
        """How many requests one replica runs at the same time."""
        return self._options.max_ongoing_requests

    @property
    def user_config(self) -> Any:
        """What the replicas' ``reconfigure`` gets."""
        return self._options.user_config

    @property
    def all_options(self) -> DeploymentOptions:
        """Every option."""
        return self._options

    def options(
        self,
        *,
        name: str | UnsetType = UNSET,
        num_replicas: int | Literal["auto"] | UnsetType = UNSET,
        autoscaling_config: AutoscalingConfig | dict[str, Any] | UnsetType | None = UNSET,
        max_ongoing_requests: int | UnsetType = UNSET,
        threads: int | UnsetType = UNSET,
        max_queued_requests: int | UnsetType | None = UNSET,
        user_config: Any = UNSET,
        resources: dict[str, float] | UnsetType = UNSET,
        gpus: float | UnsetType = UNSET,
        memory: int | str | UnsetType | None = UNSET,
        workers: list[str] | UnsetType = UNSET,
        max_replicas_per_worker: int | UnsetType | None = UNSET,
        runtime_env: RuntimeEnv | dict[str, Any] | UnsetType | None = UNSET,
        max_surge: float | UnsetType = UNSET,
        max_unavailable: float | UnsetType = UNSET,
        graceful_shutdown_timeout_s: float | UnsetType = UNSET,
        health_check_period_s: float | UnsetType = UNSET,
        health_check_timeout_s: float | UnsetType = UNSET,
        stuck_timeout_s: float | UnsetType | None = UNSET,
        request_timeout_s: float | UnsetType | None = UNSET,
        retries_on_loss: int | UnsetType | None = UNSET,
        inline_result_bytes: int | UnsetType = UNSET,
        body_limit: int | UnsetType | None = UNSET,
        datasets: list[str] | UnsetType = UNSET,
        version: str | UnsetType | None = UNSET,
        debug: bool | UnsetType = UNSET,
        log_level: Level | UnsetType | None = UNSET,
        tracing: bool | UnsetType = UNSET,
        **unknown: Any,
    ) -> Deployment:
        """Return a copy with some options changed; see `DeploymentOptions` for their meaning."""
        given = _given(locals())
        chosen = self.name if isinstance(name, UnsetType) else name
        where = f"deployment {chosen!r}"
        return Deployment(
            self.func_or_class, chosen, _checked(change_options(self._options, given, where), self.func_or_class, where)
        )

    def bind(self, *args: Any, **kwargs: Any) -> Application:
        """Bind the arguments of the constructor.

        Parameters
        ----------
        *args, **kwargs
            What ``__init__`` gets on each replica. Applications among them, also inside lists, tuples,
            sets, dicts, dataclasses and the like (named tuples, attrs, msgspec, pydantic, namespaces), arrive as
            handles; Dask futures arrive as their values.

        Returns
        -------
        Application
            For `serve.run`, or to be bound into another deployment.
        """
        if not isinstance(self.func_or_class, type) and (args or kwargs):
            raise ConfigError(
                f"deployment {self.name!r} is a function, which has no constructor that could take arguments of "
                ".bind(); make it a class with __init__ and __call__"
            )
        _check_arguments(self, args, kwargs)
        return Application(self, args, kwargs)

    def get_handle(self, sync: bool = True, app_name: str | None = None) -> DeploymentHandle:
        """Return a handle of this deployment where it runs; the same one each time.

        Parameters
        ----------
        sync : bool, default True
            False: ``handle.remote`` is awaited for the ref, in a running event loop, which then carries the calls.
        app_name : str, optional
            Needed where several applications have a deployment of this name.

        Raises
        ------
        ApplicationNotFoundError
            It does not run, or several of its name do; the message lists the candidates.
        ServeError
            With ``sync=False`` outside a running event loop.
        """
        from .session.peers import find_handle
        from .wire.loops import running_loop

        if not sync and running_loop() is None:
            raise ServeError(
                f"{self.name}.get_handle(sync=False) is for a running event loop, which then carries the calls, and "
                "none runs here: call it inside a coroutine, or get a handle with sync=True"
            )
        handle: DeploymentHandle = find_handle(self.name, app_name, sync=sync)
        return handle

    def __getattr__(self, name: str) -> Any:
        # An attribute of its own is missing while it is unpickled.
        if name.startswith("__") or name in self.__slots__:
            raise AttributeError(name)
        raise AttributeError(
            f"a Deployment has no attribute {name!r}: it answers requests once "
            f"`handle = serve.run({self.name}.bind(...))` "
            f"has deployed it, by that handle or by {self.name}.get_handle()"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        raise ConfigError(
            f"a class cannot derive from the deployment {self.name!r}: let both derive from a class that is no "
            "deployment"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"deployment {self.name!r} cannot be called or instantiated here: bind its arguments with "
            f"`{self.name}.bind(...)` and deploy that with `serve.run(...)`"
        )

    def __repr__(self) -> str:
        config = self._options.autoscaling_config
        number = f"{config.min_replicas} to {config.max_replicas}" if config is not None else self.num_replicas
        return f"<Deployment {self.name!r}, {number} replica{'s' * (number != 1)}>"


class Application:
    """A deployment with bound arguments, which may hold other applications. Made by `Deployment.bind`."""

    __slots__ = ("__weakref__", "args", "deployment", "kwargs")

    def __init__(self, deployment: Deployment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.deployment = deployment
        self.args = args
        self.kwargs = kwargs

    @property
    def name(self) -> str:
        """Name of the ingress deployment."""
        return self.deployment.name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"an Application has no attribute {name!r}: it answers requests once `handle = serve.run(app)` has "
            "deployed it, or, when bound into another deployment, as the handle that arrives in its __init__"
        )

    def __repr__(self) -> str:
        return f"<Application of deployment {self.deployment.name!r}>"


@overload
def deployment(func_or_class: Callable[..., Any], /) -> Deployment: ...


@overload
def deployment(
    *,
    name: str | UnsetType = UNSET,
    num_replicas: int | Literal["auto"] | UnsetType = UNSET,
    autoscaling_config: AutoscalingConfig | dict[str, Any] | UnsetType | None = UNSET,
    max_ongoing_requests: int | UnsetType = UNSET,
    threads: int | UnsetType = UNSET,
    max_queued_requests: int | UnsetType | None = UNSET,
    user_config: Any = UNSET,
    resources: dict[str, float] | UnsetType = UNSET,
    gpus: float | UnsetType = UNSET,
    memory: int | str | UnsetType | None = UNSET,
    workers: list[str] | UnsetType = UNSET,
    max_replicas_per_worker: int | UnsetType | None = UNSET,
    runtime_env: RuntimeEnv | dict[str, Any] | UnsetType | None = UNSET,
    max_surge: float | UnsetType = UNSET,
    max_unavailable: float | UnsetType = UNSET,
    graceful_shutdown_timeout_s: float | UnsetType = UNSET,
    health_check_period_s: float | UnsetType = UNSET,
    health_check_timeout_s: float | UnsetType = UNSET,
    stuck_timeout_s: float | UnsetType | None = UNSET,
    request_timeout_s: float | UnsetType | None = UNSET,
    retries_on_loss: int | UnsetType | None = UNSET,
    inline_result_bytes: int | UnsetType = UNSET,
    body_limit: int | UnsetType | None = UNSET,
    datasets: list[str] | UnsetType = UNSET,
    version: str | UnsetType | None = UNSET,
    debug: bool | UnsetType = UNSET,
    log_level: Level | UnsetType | None = UNSET,
    tracing: bool | UnsetType = UNSET,
    **unknown: Any,
) -> Callable[[Callable[..., Any]], Deployment]: ...


def deployment(
    func_or_class: Callable[..., Any] | None = None,
    /,
    *,
    name: str | UnsetType = UNSET,
    num_replicas: int | Literal["auto"] | UnsetType = UNSET,
    autoscaling_config: AutoscalingConfig | dict[str, Any] | UnsetType | None = UNSET,
    max_ongoing_requests: int | UnsetType = UNSET,
    threads: int | UnsetType = UNSET,
    max_queued_requests: int | UnsetType | None = UNSET,
    user_config: Any = UNSET,
    resources: dict[str, float] | UnsetType = UNSET,
    gpus: float | UnsetType = UNSET,
    memory: int | str | UnsetType | None = UNSET,
    workers: list[str] | UnsetType = UNSET,
    max_replicas_per_worker: int | UnsetType | None = UNSET,
    runtime_env: RuntimeEnv | dict[str, Any] | UnsetType | None = UNSET,
    max_surge: float | UnsetType = UNSET,
    max_unavailable: float | UnsetType = UNSET,
    graceful_shutdown_timeout_s: float | UnsetType = UNSET,
    health_check_period_s: float | UnsetType = UNSET,
    health_check_timeout_s: float | UnsetType = UNSET,
    stuck_timeout_s: float | UnsetType | None = UNSET,
    request_timeout_s: float | UnsetType | None = UNSET,
    retries_on_loss: int | UnsetType | None = UNSET,
    inline_result_bytes: int | UnsetType = UNSET,
    body_limit: int | UnsetType | None = UNSET,
    datasets: list[str] | UnsetType = UNSET,
    version: str | UnsetType | None = UNSET,
    debug: bool | UnsetType = UNSET,
    log_level: Level | UnsetType | None = UNSET,
    tracing: bool | UnsetType = UNSET,
    **unknown: Any,
) -> Deployment | Callable[[Callable[..., Any]], Deployment]:
    """Declare a class or a function as a deployment.

    Works bare and with options, on classes, ``def`` and ``async def``. A function is the deployment's
    ``__call__``. See `DeploymentOptions` for the meaning of the options.

    Parameters
    ----------
    name : str, optional
        Default: the name of the class or function.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment(num_replicas=2)
    ... class Model:
    ...     def __init__(self, path): ...
    ...     def predict(self, x): ...
    >>> app = Model.bind("weights.bin")

    Raises
    ------
    ConfigError
        An option is unknown or out of range, or a public method has a name that handles use themselves.
    """
    given = _given(locals())

    def decorate(target: Callable[..., Any]) -> Deployment:
        _check_target(target)
        chosen = target.__name__ if isinstance(name, UnsetType) else name
        where = f"deployment {chosen!r}"
        options = _checked(build_options(DeploymentOptions, {**_configured(), **given}, where), target, where)
        return Deployment(target, chosen, options)

    if func_or_class is None:
        # What is wrong with the options is said at the line that has them.
        build_options(DeploymentOptions, given, "@serve.deployment")
        return decorate
    return decorate(func_or_class)


# -- validation --------------------------------------------------------------------------------------------------------


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    """Pick the options that were given out of a function's parameters, in our spelling."""
    fields = {name: parameters[name] for name in DeploymentOptions.__struct_fields__}
    given = {name: value for name, value in fields.items() if value is not UNSET}
    return _scaled(translate(given, parameters["unknown"]))


def _configured() -> dict[str, Any]:
    """Return the options that Dask's configuration has for all deployments."""
    values = configured("deployment")
    if not values:
        return values
    values = _scaled(translate(values, {}))
    checked(DeploymentOptions, "deployment", values)
    return values


def _scaled(given: dict[str, Any]) -> dict[str, Any]:
    """Let each of the two options about numbers of replicas stand for both."""
    number, config = given.get("num_replicas"), given.get("autoscaling_config")
    if number == "auto":
        given["autoscaling_config"] = AutoscalingConfig() if config is None else config
    elif number is not None and config is not None:
        raise ConfigError(
            f"num_replicas={number!r} and autoscaling_config exclude each other: leave num_replicas out and give "
            "min_replicas, max_replicas and initial_replicas in the config"
        )
    elif number is not None:
        given["autoscaling_config"] = None
    elif config is not None:
        given["num_replicas"] = "auto"
    elif "autoscaling_config" in given:
        raise ConfigError("autoscaling_config=None says how many replicas there are not to be: give num_replicas=")
    return given


def _checked(options: DeploymentOptions, target: Any, where: str) -> DeploymentOptions:
    try:
        msgspec.msgpack.encode(options.user_config)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{where}: option 'user_config' must be JSON-able (None, bool, numbers, str, list, dict): {error}"
        ) from None
    if options.user_config is not None and not isinstance(target, type):
        raise ConfigError(
            f"{where}: a function takes no user_config; make it a class with __call__ and reconfigure(user_config)"
        )
    if options.user_config is not None and not hasattr(target, "reconfigure") and not hasattr(target, "__getattr__"):
        raise ConfigError(
            f"{where} has user_config={options.user_config!r}, but {target.__name__} no method "
            "reconfigure(user_config); define one"
        )
    try:
        msgspec.json.encode(options.autoscaling_config)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: the arguments of the autoscaling policy must be JSON-able: {error}") from None
    return options


def check_name(name: Any, what: str) -> str:
    """Return ``name``, or raise `ConfigError` where it cannot be the name of ``what``."""
    if not isinstance(name, str) or not name or "/" in name or "#" in name:
        raise ConfigError(f'the name of {what} must be a non-empty str without "/" and "#", not {name!r}')
    return name


def _check_target(target: Any) -> None:
    if isinstance(target, (Deployment, Application)):
        raise ConfigError(f"{target!r} is a deployment already; change its options with .options(...)")
    if not isinstance(target, type) and not inspect.isroutine(target) and not isinstance(target, BatchedFunction):
        raise ConfigError(
            f"@serve.deployment takes a class or a function, not {target!r}; an object that exists already is best "
            "built in the __init__ of a class"
        )
    if isinstance(target, type):
        ingress_of(target)
        check_hooks(target)
        for name in reserved_names():
            if callable(getattr(target, name, None)):
                raise ConfigError(
                    f"class {target.__name__}: no method may be called {name!r}, because handles have an attribute "
                    f"of that name; rename it, e.g. to {'get_' + name if name != 'remote' else 'call_remote'!r}"
                )


def _check_batches(target: Any, limit: int, name: str) -> None:
    """Warn of batches that can never be full: the calls that wait for them run, as far as limits are concerned."""
    for method, function in _batched(target).items():
        if function.largest > limit:
            warnings.warn(
                f"deployment {name!r} runs max_ongoing_requests={limit} requests at a time, and the batches of "
                f"{method!r} take {function.largest} (max_batch_size * max_concurrent_batches): they will never be "
                "full; raise the one, or lower the other",
                stacklevel=_outside(),
            )


def _batched(target: Any) -> dict[str, BatchedFunction]:
    """Return what is batched, by the name of the method."""
    found = {"__call__": target}
    if isinstance(target, type):
        found = {name: inspect.getattr_static(target, name) for name in dir(target)}
    return {name: function for name, function in found.items() if isinstance(function, BatchedFunction)}


def rows(target: Any) -> dict[str, int]:
    """Return the batched methods whose calls bring rows, and how many rows a batch takes."""
    batched = _batched(target).items()
    return {name: int(one.options["max_batch_size"]) for name, one in batched if one.options["stack"] == "rows"}


def _outside() -> int:
    """Return the stack level of the line that is not ours."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__") in {__name__, "functools"}:
        frame, level = frame.f_back, level + 1
    return level


def reserved_names() -> list[str]:
    """List the attributes of a handle: each hides a method of the same name."""
    from .handle import DeploymentHandle

    return [name for name in dir(DeploymentHandle) if not name.startswith("_")]


def _check_arguments(deployment: Deployment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say at the line of .bind() what each replica would say later."""
    try:
        signature = inspect.signature(deployment.func_or_class)
    except (TypeError, ValueError):
        return
    if not isinstance(deployment.func_or_class, type):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"the arguments of {deployment.name}.bind(...) do not fit the constructor "
            f"{deployment.func_or_class.__name__}{signature}: {error}"
        ) from None


def methods(target: Any) -> list[str]:
    """List what can be called on a replica, ``__call__`` included."""
    if not isinstance(target, type):
        return ["__call__"]
    found = ["__call__"] if any("__call__" in vars(base) for base in target.__mro__) else []
    for name in dir(target):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(target, name)
        if not isinstance(value, (property, type)) and callable(getattr(target, name, None)):
            found.append(name)
    return found
