"""Whether somebody watches, and a bar that is drawn over itself for whoever does."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time

__all__ = ["Bar", "is_watched", "write"]

logger = logging.getLogger("dask_serve")

#: Cells of a bar.
CELLS = 20
#: Seconds between two drawings.
EVERY = 0.1


def is_watched() -> bool:
    """Tell whether somebody looks at stderr: in a terminal, or in a notebook, whose stderr says that it is none."""
    stream = sys.stderr
    if stream is None:
        return False
    try:
        return stream.isatty() or type(stream).__module__.startswith("ipykernel.")
    except ValueError:  # closed
        return False


def write(text: str) -> None:
    """Write to stderr at once, if there is one."""
    if text and sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


class Bar:
    """How far many calls are. Where nobody watches, one line in the log at the end.

    Parameters
    ----------
    what : str
        What is called.
    total : int or None
        How many calls there will be; None: it is not known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._ended = self._failed = 0
        self._begun = time.monotonic()
        self._drawn = 0.0
        self._length = 0
        self._closed = False
        self._lock = threading.Lock()

    def note(self, failed: bool) -> None:
        """One more has ended; in any thread."""
        with self._lock:
            self._ended += 1
            self._failed += failed
            now = time.monotonic()
            if not self._closed and now - self._drawn > EVERY and is_watched():
                self._drawn = now
                self._draw()

    def line(self) -> str:
        """Return what is drawn."""
        took = max(time.monotonic() - self._begun, 1e-6)
        of = f"{self._ended:,}"
        bar = ""
        if self._total is not None:
            full = CELLS * self._ended // max(self._total, 1)
            bar = f"{'█' * full}{'·' * (CELLS - full)} "
            of += f"/{self._total:,}"
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self._what} {bar}{of}{failed}, {self._ended / took:,.0f}/s"

    def _draw(self) -> None:
        # Carriage returns work within one line only, and the last column wraps in some terminals.
        line = self.line()[: shutil.get_terminal_size().columns - 1]
        write(f"\r{line}{' ' * (self._length - len(line))}")
        self._length = len(line)

    def close(self) -> None:
        """Leave it as it stands."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if is_watched():
                self._draw()
                write("\n")
            else:
                logger.info("%s", self.line())
