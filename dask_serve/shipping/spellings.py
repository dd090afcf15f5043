"""What people write into ``@serve.deployment(...)``, in our spelling: Ray Serve's names, sizes as text, hooks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from dask.utils import parse_bytes

from ..exceptions import ConfigError

__all__ = ["HOOKS", "LOGGING", "advice", "check_hooks", "translate"]

#: Methods of the user's class that the replica calls by itself, without arguments.
HOOKS = {
    "warm_up": "before the replica is ready",
    "check_health": "every health_check_period_s seconds",
    "shutdown": "at the end of the replica",
}

#: Options of Ray Serve and others that have no counterpart, with what to write here.
_ELSEWHERE = {
    "max_replicas_per_node": "use max_replicas_per_worker=",
    "placement_group_bundles": "use workers=, resources=, gpus= or max_replicas_per_worker= to say where replicas may "
    "run",
    "placement_group_strategy": "replicas are spread over hosts, then over workers",
    "accelerator_type": "name the workers that have it with workers=, or start them with a resource of that name",
    "label_selector": "name the workers with workers=, or start them with a resource that stands for the label",
    "fallback_strategy": "name all workers that will do with workers=",
    "max_constructor_retry_count": "leave it out: a constructor is tried three times in a row, then the status has its "
    "error",
    "graceful_shutdown_wait_loop_s": "leave it out: a replica ends as soon as nothing runs on it",
    "backpressure_config": "use max_queued_requests=; the Retry-After of refused requests is computed",
    "request_router_config": "leave it out: routers choose the less loaded of two replicas",
    "rolling_update_percentage": "leave it out: new replicas start before old ones stop",
    "max_surge_percent": "leave it out: new replicas start before old ones stop",
    "deployment_actors": "bind another deployment, and call it by its handle",
    "gang_scheduling_config": "one replica has one process",
    "func_or_class": "give the class or function to the decorator: serve.deployment(...)(Model)",
    "init_args": "give arguments to .bind()",
    "init_kwargs": "give arguments to .bind()",
    "route_prefix": "give it to serve.run(app, route_prefix=...)",
}

#: What there is of Ray's ``logging_config``.
LOGGING = (
    "log_level is an option of deployments; access_log, log_format and log_level of the proxies are of serve.start; "
    "where replicas write is Dask's logging configuration"
)


def _threads(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"{where} = {value!r} is not valid: give a number of CPUs; here it is threads=, at least 1")
    return max(1, math.ceil(value))


def _same(value: Any, where: str) -> Any:
    return value


#: Ray's names that mean the same here: our name, and what becomes of the value.
_RENAMED: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "max_concurrent_queries": ("max_ongoing_requests", _same),
    "num_cpus": ("threads", _threads),
    "num_gpus": ("gpus", _same),
}
#: Keys of ``ray_actor_options`` that have the names of options here.
_SHARED = ("memory", "resources", "runtime_env")


def advice(name: str) -> str | None:
    """Return what to write instead of an option of Ray Serve; None where nothing is known of it."""
    if name in _RENAMED:
        return f"it is called {_RENAMED[name][0]} here"
    if name == "logging_config":
        return LOGGING
    if name == "ray_actor_options":
        return "write threads, gpus, memory and resources as options of their own"
    return _ELSEWHERE.get(name)


def translate(given: dict[str, Any], unknown: dict[str, Any]) -> dict[str, Any]:
    """Return the options in our spelling.

    Parameters
    ----------
    given : dict
        Those that have our names.
    unknown : dict
        All others.

    Raises
    ------
    ConfigError
        One means nothing here (the message tells what to write), is given twice, or is no size.
    """
    options = dict(given)
    for name, value in unknown.items():
        if name in _ELSEWHERE:
            raise ConfigError(f"@serve.deployment has no option {name!r}: {_ELSEWHERE[name]}")
        if name == "ray_actor_options":
            _put_actor_options(options, value)
        elif name == "logging_config":
            _put_logging(options, value)
        elif name in _RENAMED:
            _put(options, *_renamed(name, value, name), name)
        else:
            options[name] = value
    if options.get("max_queued_requests") == -1:
        # Ray's word for "no limit of mine".
        options["max_queued_requests"] = None
    if isinstance(options.get("memory"), (str, float)):
        options["memory"] = _bytes(options["memory"])
    return options


def _put_actor_options(options: dict[str, Any], value: Any) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"option ray_actor_options = {value!r} is not valid: it is a dict")
    for key, amount in value.items():
        where = f"ray_actor_options[{key!r}]"
        if key in _RENAMED:
            _put(options, *_renamed(key, amount, where), where)
        elif key in _SHARED:
            _put(options, key, amount, where)
        elif key in _ELSEWHERE:
            raise ConfigError(f"{where} has no counterpart here: {_ELSEWHERE[key]}")
        else:
            known = ", ".join(map(repr, ("num_cpus", "num_gpus", *_SHARED)))
            raise ConfigError(f"{where} is not known; known keys: {known}")


def _put_logging(options: dict[str, Any], value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError("option logging_config is not valid: give log_level=, e.g. log_level='DEBUG'")
    for key, chosen in value.items():
        if key != "log_level":
            raise ConfigError(f"logging_config[{key!r}] has no counterpart in deployments: {LOGGING}")
        _put(options, "log_level", chosen, "logging_config['log_level']")


def _renamed(name: str, value: Any, where: str) -> tuple[str, Any]:
    ours, convert = _RENAMED[name]
    return ours, convert(value, where)


def _put(options: dict[str, Any], name: str, value: Any, where: str) -> None:
    if name in options:
        raise ConfigError(f"{where} is {name}= here, which is given too: leave one of them out")
    options[name] = value


def _bytes(value: Any) -> int:
    try:
        found = int(parse_bytes(value))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"option memory = {value!r} is not valid: give bytes, or text such as '4 GiB'")
    return found


def check_hooks(target: type) -> None:
    """Refuse a class whose hooks need arguments: nobody has any for them.

    Raises
    ------
    ConfigError
    """
    for name, when in HOOKS.items():
        hook = inspect.getattr_static(target, name, None)
        if hook is None:
            continue
        if not callable(getattr(target, name, None)):
            raise ConfigError(
                f"class {target.__name__}: {name!r} is called {when}, and is no method here; rename it, or make it one"
            )
        try:
            signature = inspect.signature(hook.__func__ if isinstance(hook, (staticmethod, classmethod)) else hook)
            signature.bind(*(() if isinstance(hook, staticmethod) else (None,)))
        except ValueError:
            continue
        except TypeError as error:
            raise ConfigError(
                f"class {target.__name__}: {name}() is called without arguments {when}: {error}; give its parameters "
                "defaults, or rename it"
            ) from None
