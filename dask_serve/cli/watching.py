"""Changes of source files, for `dask serve run --reload`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Watch"]


class Watch:
    """Notes which source files have changed since it was asked last.

    Parameters
    ----------
    directories : sequence of str
        What to watch, with all below: files of Python, but not those of environments and caches.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        self._news = threading.Event()
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dask-serve-reload", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> set[str]:
        """Return the names of files that have changed, as soon as there are any, or none after ``timeout`` seconds."""
        if not self._news.wait(timeout):
            return set()
        if self._error is not None:
            raise self._error
        with self._lock:
            self._news.clear()
            changed, self._changed = self._changed, set()
        return changed

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _run(self) -> None:
        from watchfiles import PythonFilter, watch

        try:
            for changes in watch(
                *self._directories,
                watch_filter=PythonFilter(),
                stop_event=self._ended,
                debounce=200,
                step=50,
                raise_interrupt=False,
            ):
                with self._lock:
                    self._changed |= {_short(path) for _, path in changes}
                    self._news.set()
        except (OSError, RuntimeError) as error:
            self._error = error
            self._news.set()


def _short(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
