"""What code in replicas prints, among the log records of its process: ``dask serve logs`` shows it."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from .records import LONGEST, Records, place

__all__ = ["Printed", "keep_printed"]

#: The name of the logger that stands in such records.
LOGGER = "print"
#: Lines that may have begun and not ended; older ones are forgotten.
BEGUN = 100


class Printed:
    """Stands for ``sys.stdout``: passes everything on, and notes the lines that come from replicas.

    Parameters
    ----------
    stream : TextIO
    kept : Records
    """

    def __init__(self, stream: TextIO, kept: Records) -> None:
        self._stream = stream
        self._kept = kept
        #: Lines that have begun, by where they come from.
        self._begun: dict[tuple[str, ...], str] = {}

    def write(self, text: str) -> int:
        """Write a text."""
        written = self._stream.write(text)
        # Whatever is wrong with it, user code goes on.
        with contextlib.suppress(Exception):
            self._note(text)
        return written

    def _note(self, text: str) -> None:
        where = place()
        application, deployment, replica, request = where
        if not replica:
            return
        *lines, rest = (self._begun.pop(where, "") + text).split("\n")
        if rest:
            self._begun[where] = rest[-LONGEST:]
            while len(self._begun) > BEGUN:
                del self._begun[next(iter(self._begun))]
        for line in lines:
            told = {"time": time.time(), "level": "INFO", "logger": LOGGER, "message": line[:LONGEST]}
            told.update(application=application, deployment=deployment, replica=replica)
            self._kept.add({**told, "request": request} if request else told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_printed(kept: Records) -> None:
    """Note what code in replicas prints from now on. Programs that have replaced ``sys.stdout`` keep theirs."""
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        stream: Any = sys.stdout
        stand_in: Any = Printed(stream, kept)
        sys.stdout = stand_in
