"""Where the records of the server processes go, and in what form: to where Dask's go, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

__all__ = ["JSONFormatter", "TextFormatter", "join_dask", "write_as"]

#: What a record says of where it was made, by its attribute.
_PLACES = ("application", "deployment", "replica", "request_id")
_PREFIX = "serve_"


class JSONFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and where it was made.

    ``application``, ``deployment``, ``replica`` and ``request_id`` stand there where they are known, ``exception``
    where there is one. For Dask's ``logging`` configuration, and `logging.config`::

        formatters:
          json:
            (): dask_serve.logs.JSONFormatter
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        told: dict[str, Any] = {
            "time": utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told.update({name: value for name in _PLACES if (value := getattr(record, _PREFIX + name, ""))})
        if record.exc_info and record.exc_info[1] is not None:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Dask's form of a line, with the replica and the request where they are known."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s - %(name)s - %(levelname)s - %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        """Return the first line."""
        known = [value for name in ("replica", "request_id") if (value := getattr(record, _PREFIX + name, ""))]
        line = super().formatMessage(record)
        return f"{line} [{' '.join(known)}]" if known else line


def utc(seconds: float) -> str:
    """Return a time as ISO 8601 has it, in milliseconds."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def join_dask() -> None:
    """Give the ``dask_serve`` loggers of a scheduler's or worker's process the handlers and the level of Dask's own.

    They are configured together then, by Dask's ``logging`` settings, and silenced together where a `LocalCluster`
    silences its workers. Loggers that a program has configured by itself stay as they are. Sessions are left alone.
    """
    ours = logging.getLogger("dask_serve")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.parent = logging.getLogger("distributed")


def write_as(form: str, level: str) -> None:
    """Write the records of this process, which is ours alone, to stderr.

    Parameters
    ----------
    form : "text" or "json"
    level : str
        From which level on those of ``dask_serve`` are written; of all others warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("dask_serve").setLevel(level)
