"""Files that may change while a proxy runs: certificates and tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from ..exceptions import ConfigError

__all__ = ["Watched", "read_private"]

logger = logging.getLogger("dask_serve.proxy")

Signature = tuple[tuple[int, int, int] | None, ...]


class Watched:
    """Some files, and what to do when one of them changed.

    Parameters
    ----------
    paths : iterable of str
    load : callable
        Called at once, and for each change; a `ConfigError` at a change leaves things as they were.
    """

    def __init__(self, paths: Iterable[str], load: Callable[[], None]) -> None:
        self._paths = [Path(path) for path in paths]
        self._load = load
        self._seen = self._look()
        load()

    def check(self) -> None:
        """Load again if a file has changed."""
        now = self._look()
        if now == self._seen:
            return
        self._seen = now
        try:
            self._load()
        except ConfigError as error:
            logger.warning("%s; what was read before stays in use", error)
        else:
            logger.info("Read %s again", ", ".join(map(str, self._paths)))

    def _look(self) -> Signature:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_mode


def read_private(path: str, option: str) -> str:
    """Return the text of a file that only its owner may read.

    Raises
    ------
    ConfigError
        It cannot be read, or others may.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            mode = Path(path).stat().st_mode
            if mode & 0o077:
                raise ConfigError(f"{option}: others may read {path} (mode {mode & 0o777:o}); run `chmod 600 {path}`")
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: cannot read {path}: {error}") from None
