"""Who tells metrics in this process."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable

from .families import Family

__all__ = ["add_source", "drop_source", "sources"]

sources: dict[str, Callable[[], Iterable[Family]]] = {}


def add_source(name: str, source: Callable[[], Iterable[Family]]) -> None:
    """Have ``source`` asked whenever this process's ``/metrics`` is read; one of the same name is replaced.

    Dask serves that page where ``prometheus_client`` is installed; without it nobody asks.
    """
    sources[name] = source
    with contextlib.suppress(ImportError):
        importlib.import_module(".collector", __package__)


def drop_source(name: str) -> None:
    """Ask it no more."""
    sources.pop(name, None)
