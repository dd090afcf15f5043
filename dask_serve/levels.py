"""Levels of logging by deployment, although loggers belong to the process and several deployments may share them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from .context import replica_context

__all__ = ["LEVELS", "Levels", "loggers_of"]

#: Ours that tell of what runs in replicas, and the one that code written for Ray Serve logs to.
_COMMON = ("dask_serve.replica", "dask_serve.batching", "ray.serve")


def loggers_of(target: Any) -> tuple[str, ...]:
    """Return the names of the loggers of a deployment's code: its top package, with all below, and the common ones."""
    package = str(getattr(target, "__module__", None) or "").partition(".")[0]
    return (package, *_COMMON) if package not in {"", "dask_serve", "builtins"} else _COMMON


class Levels(logging.Filter):
    """Sets loggers as low as some deployment wants them, and keeps out what the deployment that logs does not want.

    Where no deployment wants anything it does nothing, and loggers are as they were before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        #: By replica: its deployment, the level, and the loggers it is for.
        self._wanted: dict[str, tuple[tuple[str, str], int, tuple[str, ...]]] = {}
        #: By deployment.
        self._levels: dict[tuple[str, str], int] = {}
        #: By logger that is changed: the level it had, and what holds for code that wants nothing else.
        self._usual: dict[str, tuple[int, int]] = {}

    def set(self, replica: str, deployment: tuple[str, str], level: str | None, loggers: Iterable[str]) -> None:
        """Let the code of a replica log from a level on; None: as its loggers are set. From any thread."""
        with self._lock:
            if level is None:
                if self._wanted.pop(replica, None) is None:
                    return
            else:
                self._wanted[replica] = deployment, int(getattr(logging, level)), tuple(loggers)
            self._levels = {deployment: number for deployment, number, _ in self._wanted.values()}
            self._apply()

    def _apply(self) -> None:
        lowest: dict[str, int] = {}
        for _, number, names in self._wanted.values():
            for name in names:
                lowest[name] = min(number, lowest.get(name, number))
        for name in [name for name in self._usual if name not in lowest]:
            logging.getLogger(name).setLevel(self._usual.pop(name)[0])
            for logger in _below(name):
                logger.removeFilter(self)
        for name, number in lowest.items():
            logger = logging.getLogger(name)
            if name not in self._usual:
                self._usual[name] = logger.level, logger.getEffectiveLevel()
            logger.setLevel(min(number, self._usual[name][1]))
            for other in _below(name):
                other.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the deployment that this code belongs to wants a record."""
        if not self._wanted:
            return True
        name = record.name
        while name and name not in self._usual:
            name = name.rpartition(".")[0]
        usual = self._usual.get(name)
        if usual is None:
            return True
        replica = replica_context.get(None)
        own = None if replica is None else self._levels.get((replica.app_name, replica.deployment))
        return record.levelno >= (usual[1] if own is None else own)


def _below(name: str) -> list[logging.Logger]:
    """Return a logger with those below it that there are."""
    known = logging.Logger.manager.loggerDict
    below = [other for key, other in list(known.items()) if key.startswith(f"{name}.")]
    return [logging.getLogger(name), *(other for other in below if isinstance(other, logging.Logger))]


#: Those of this process.
LEVELS = Levels()
