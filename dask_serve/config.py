"""Every option: type, unit, default, range. One class declares, all else is derived from it."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, UnsetType

from .exceptions import ConfigError

__all__ = ["DeploymentOptions", "HTTPOptions", "build_options", "change_options"]

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class DeploymentOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``@serve.deployment(...)`` and ``Deployment.options(...)`` accept.

    Parameters
    ----------
    num_replicas : int, default 1
        How many replicas to keep ready.
    max_ongoing_requests : int, default 100
        How many requests one replica runs at the same time; more of them wait at the router.
    threads : int, default 1
        Size of the thread pool that runs a replica's ``def`` methods (``async def`` methods share one
        event loop). Counted softly against the worker's ``nthreads`` when replicas are placed.
    max_queued_requests : int or None, default None
        How many requests may wait at one router before more are refused with ``BackPressureError``. None:
        10,000 over HTTP, unbounded for handles.
    user_config : JSON-able, default None
        Handed to the replica's ``reconfigure(user_config)`` before it is ready.
    resources : dict of str to float, default {}
        Dask worker resources that one replica takes, e.g. ``{"GPU": 1}``. A hard limit for placement.
    workers : list of str, default []
        Names or addresses of the workers that may hold replicas; empty means all.
    max_replicas_per_worker : int or None, default None
        The most replicas of this deployment that one worker may hold.
    graceful_shutdown_timeout_s : float, default 20.0
        Seconds that a stopping replica may take to finish what it runs.
    request_timeout_s : float or None, default None
        Deadline of a request in seconds. None: 60 over HTTP, none for handles.
    version : str or None, default None
        Replaces the code's part of the revision: replicas restart only when it changes.
    """

    num_replicas: Count = 1
    max_ongoing_requests: Count = 100
    threads: Count = 1
    max_queued_requests: Count | None = None
    user_config: Any = None
    resources: dict[str, Annotated[float, Meta(ge=0)]] = {}
    workers: list[str] = []
    max_replicas_per_worker: Count | None = None
    graceful_shutdown_timeout_s: Annotated[float, Meta(ge=0)] = 20.0
    request_timeout_s: Seconds | None = None
    version: str | None = None


#: The options whose change restarts replicas; all others change in place.
RESTARTING_OPTIONS = ("threads", "resources", "workers", "max_replicas_per_worker", "version")


class HTTPOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``serve.start(...)`` accepts.

    Parameters
    ----------
    host : str, default "127.0.0.1"
        Interface the proxies listen on.
    port : int or None, default None
        Port the proxies listen on. None: 8000, or the next free one with a warning when it is busy. An
        explicit port that is busy is an error. 0: any free one.
    num_proxies : int, default 1
        Number of proxy processes on the scheduler's node.
    request_timeout_s : float, default 60.0
        Seconds until the first byte of an answer; over it 504.
    body_limit : int, default 104857600
        Bytes a request's body may have; over it 413.
    drain_timeout_s : float, default 20.0
        Seconds a stopping proxy gives to requests in flight.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    num_proxies: Count = 1
    request_timeout_s: Seconds = 60.0
    body_limit: Annotated[int, Meta(ge=0)] = 100 * 2**20
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 20.0


Options = TypeVar("Options", bound=Struct)


def build_options(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """Validate ``values`` into a ``kind``.

    Parameters
    ----------
    kind : type
        `DeploymentOptions` or `HTTPOptions`.
    values : dict
        Options by name; those that are `msgspec.UNSET` are left at their defaults.
    where : str
        What is being declared, for the error message.

    Raises
    ------
    ConfigError
        An unknown name (near misses are suggested), a wrong type or a value out of range.
    """
    given = {name: value for name, value in values.items() if not isinstance(value, UnsetType)}
    for name in given:
        if name not in kind.__struct_fields__:
            near = difflib.get_close_matches(name, kind.__struct_fields__, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(kind.__struct_fields__)}"
            raise ConfigError(f"{where} has no option {name!r}; {hint}")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`").split("[")[0].split(".")[0]
        got = f" = {given[name]!r}" if name in given else ""
        raise ConfigError(f"{where}: option {name}{got} is not valid: {text[:1].lower()}{text[1:]}") from None


def change_options(options: Options, values: dict[str, Any], where: str) -> Options:
    """Return ``options`` with ``values`` replaced, validated as `build_options` does."""
    current = {name: getattr(options, name) for name in options.__struct_fields__}
    return build_options(type(options), {**current, **values}, where)
