"""Defaults from Dask's configuration: what ``serve:`` may hold there, and what it holds.

An argument goes before a document, a document before Dask's configuration, and that before what is declared.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import dask
import msgspec
import yaml
from msgspec import Struct

from .config import Count, HTTPOptions
from .exceptions import ConfigError
from .options import build_options

__all__ = [
    "DEFAULTS",
    "DoorSettings",
    "EmbeddedSettings",
    "MetricsSettings",
    "RestSettings",
    "Settings",
    "checked",
    "configured",
    "configured_http",
    "overlaid",
]

logger = logging.getLogger("dask_serve")

#: The shipped file.
DEFAULTS = Path(__file__).parent / "serve.yaml"

Options = TypeVar("Options", bound=Struct)


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands under ``serve:`` itself.

    Parameters
    ----------
    state_file : str or None, default None
        File that a scheduler saves applications in, and brings them back from. ``none``: no file. None: no file, but
        with the preload one for crashes, in the home of the user.
    history_length : int, default 10
        How many versions of each application are kept.
    results_limit : float or str, default 0.3
        Results of calls from Python that the process of a worker may hold: bytes, such as ``2 GiB``, or a fraction of
        the worker's memory limit. 0: no limit.
    leave_patience : str, default "2 minutes"
        How long a worker that is retired waits for replacements of its replicas.
    gpus : int, list or None, default None
        Devices of a worker: how many, or which. None: those that it sees.
    environments_directory : str or None, default None
        Directory of a worker's host for environments of replicas (``runtime_env``). None: ``dask-serve/environments``
        where the user's caches are.
    """

    state_file: str | None = None
    history_length: Count = 10
    results_limit: float | str = 0.3
    leave_patience: float | str = "2 minutes"
    gpus: int | list[int | str] | str | None = None
    environments_directory: str | None = None


class EmbeddedSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands under ``serve.embedded``.

    Parameters
    ----------
    workers : int or None, default None
        Worker processes to begin with. None: the number of cores, at most 4.
    threads : int or None, default None
        Threads of each worker. None: the cores are shared out.
    dashboard_address : str or None, default "127.0.0.1:8787"
        Where the dashboard of Dask listens. None: nowhere.
    """

    workers: Count | None = None
    threads: Count | None = None
    dashboard_address: str | None = "127.0.0.1:8787"


class RestSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands under ``serve.rest``.

    Parameters
    ----------
    writes : bool, default False
        Whether requests may change what runs. Needs ``tokens-file``.
    tokens_file : str or None, default None
        File of bearer tokens, one a line, that only its owner may read: requests that change something need one of
        them.
    timeout : str or float, default "5 minutes"
        How long the process may take that imports the applications of a document.
    """

    writes: bool = False
    tokens_file: str | None = None
    timeout: float | str = "5 minutes"


class DoorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands under ``serve.door``.

    Parameters
    ----------
    port : int, str or None, default None
        Port of the doors of worker processes, or a range of them, such as ``"9100:9110"``, of which each takes a free
        one. None: any free port.
    """

    port: int | str | None = None


class MetricsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands under ``serve.metrics``.

    Parameters
    ----------
    replica_label : bool, default True
        Whether each replica is a series of its own. False: those of one deployment are one.
    """

    replica_label: bool = True


#: The parts of ``serve:``. Of ``deployment`` the options themselves are checked where they are used.
SECTIONS = ("http", "deployment", "embedded", "door", "rest", "metrics")


def _load() -> dict[str, Any]:
    text = DEFAULTS.read_text(encoding="utf-8")
    defaults: dict[str, Any] = yaml.safe_load(text)
    dask.config.update_defaults(defaults)
    return {name.replace("-", "_"): value for name, value in defaults["serve"].items()}


_defaults = _load()


def configured(section: str) -> dict[str, Any]:
    """Return what somebody has configured in a section of ``serve:``: what differs from the defaults."""
    _look_for_slips()
    found = dask.config.get(f"serve.{section}", None) or {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"serve.{section} in Dask's configuration is a mapping, not {found!r}{_origin(section)}; mend it there"
        )
    usual = {name.replace("-", "_"): value for name, value in (_defaults.get(section) or {}).items()}
    values = {str(name).replace("-", "_"): value for name, value in found.items()}
    return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def checked(kind: type[Options], section: str, values: dict[str, Any] | None = None) -> Options:
    """Return the options of a section.

    Raises
    ------
    ConfigError
        One is unknown or not valid; the message names its key, and where it was found.
    """
    values = configured(section) if values is None else values
    try:
        return build_options(kind, values, f"serve.{section} in Dask's configuration")
    except ConfigError as error:
        names = [name for name in values if repr(name) in str(error) or f"option {name} " in str(error)]
        raise ConfigError(f"{error}{_origin(section, *names[:1])}; mend it there") from None


def configured_http() -> tuple[HTTPOptions, list[str]]:
    """Return the options of proxies that are configured, and the names of those that differ from the defaults."""
    values = configured("http")
    return checked(HTTPOptions, "http", values), sorted(values)


def overlaid(options: HTTPOptions, given: Iterable[str]) -> HTTPOptions:
    """Return ``options`` with what is configured in the place of those that are not ``given``."""
    found, names = configured_http()
    given = set(given)
    values = {name: getattr(found, name) for name in names if name not in given}
    together = {**msgspec.structs.asdict(options), **values}
    return build_options(HTTPOptions, together, "serve.http in Dask's configuration")


def _origin(section: str, *names: str) -> str:
    """Say where a key was found, where that can be told."""
    keys = [section, *names]
    variable = "__".join(["DASK_SERVE", *keys]).upper()
    # Of a section that there is not, everything in it is meant.
    unknown = section not in SECTIONS
    found = [name for name in sorted(os.environ) if name == variable or (unknown and name.startswith(f"{variable}__"))]
    if found:
        return f" (from the environment variable {found[0]})"
    for path, content in dask.config.collect_yaml(dask.config.paths, return_paths=True):
        if _holds(content, ["serve", *keys]):
            return f" (from {path})"
    return ""


def _holds(content: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(content, dict):
            return False
        found = [name for name in content if str(name).replace("-", "_") == key]
        if not found:
            return False
        content = content[found[0]]
    return True


_told: set[str] = set()


def _look_for_slips() -> None:
    """Warn, once, of keys under ``serve:`` that nobody reads."""
    known = {*SECTIONS, *Settings.__struct_fields__}
    for name in dask.config.get("serve", None) or {}:
        plain = str(name).replace("-", "_")
        if plain not in known and plain not in _told:
            _told.add(plain)
            near = difflib.get_close_matches(plain, known, n=1)
            hint = f": did you mean serve.{near[0].replace('_', '-')}?" if near else ""
            logger.warning("Dask's configuration has serve.%s, which means nothing%s%s", name, hint, _origin(plain))
