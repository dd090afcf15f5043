"""The access log: noted as tuples while requests are served, written together once a second."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..logs import utc
from ..records import ACCESS, keep_records

__all__ = ["Access", "AccessLog", "chosen"]

#: From this status on a request has failed.
_FAILED = 500


class Access(NamedTuple):
    """One request that has been answered."""

    time: float
    client: Any
    method: str
    path: bytes
    version: str
    status: int
    seconds: float
    #: ``app/deployment``, or "".
    deployment: str
    request_id: str


class AccessLog:
    """The requests of one proxy.

    Parameters
    ----------
    limit : int
        Requests that are written a second.
    form : "text" or "json"
    write : callable, optional
        Takes lines; by default they go to stderr.

    Attributes
    ----------
    accesses : list of tuple
        Those that are not written yet, in the fields of `Access`; whoever serves requests appends to it.
    """

    def __init__(self, limit: int, form: str, write: Callable[[str], object] | None = None) -> None:
        self.accesses: list[tuple[Any, ...]] = []
        self._limit = limit
        self._json = form == "json"
        self._write = write
        self._flushed = time.monotonic()

    def flush(self) -> None:
        """Write what came since the last time."""
        now = time.monotonic()
        since, self._flushed = now - self._flushed, now
        accesses, self.accesses = self.accesses, []
        if not accesses:
            return
        most = max(1, int(self._limit * max(1.0, since)))
        told = [_told(Access(*access)) for access in chosen(accesses, most)]
        if len(accesses) > most:
            left = len(accesses) - most
            text = f"{left} of {len(accesses)} requests of {since:.1f} s are left out (access_log_limit={self._limit})"
            told.append({"time": time.time(), "level": "INFO", "logger": ACCESS, "message": text, "left_out": left})
        kept = keep_records()
        for record in told:
            kept.add({key: record[key] for key in _KEPT if key in record})
        line = _json if self._json else _text
        (self._write or sys.stderr.write)("".join(map(line, told)))


#: What the last records hold of it.
_KEPT = ("time", "level", "logger", "message", "application", "deployment", "request")


def chosen(accesses: Sequence[tuple[Any, ...]], most: int) -> list[tuple[Any, ...]]:
    """Return at most so many, in their order: the failed ones first, then a sample at even distances."""
    if len(accesses) <= most:
        return list(accesses)
    status = Access._fields.index("status")
    failed = [index for index, access in enumerate(accesses) if access[status] >= _FAILED]
    others = [index for index, access in enumerate(accesses) if access[status] < _FAILED]
    picked = _spread(failed, most)
    picked += _spread(others, most - len(picked))
    return [accesses[index] for index in sorted(picked)]


def _spread(indices: Sequence[int], most: int) -> list[int]:
    if len(indices) <= most:
        return list(indices)
    return [indices[number * len(indices) // most] for number in range(most)]


def _told(access: Access) -> dict[str, Any]:
    """Return a record. What is no plain text is escaped: a path must not look like another line."""
    path = access.path.decode("latin-1").encode("unicode_escape").decode()
    client = "-" if access.client is None else f"{access.client[0]}:{access.client[1]}"
    line = f'"{access.method} {path} HTTP/{access.version}" {access.status} {1e3 * access.seconds:.3f}ms'
    application, _, deployment = access.deployment.partition("/")
    told: dict[str, Any] = {
        "time": access.time,
        "level": "INFO",
        "logger": ACCESS,
        "message": f"{client} {line} {access.deployment or '-'} {access.request_id}",
        "method": access.method,
        "path": path,
        "status": access.status,
        "seconds": round(access.seconds, 6),
        "client": client,
        "request": access.request_id,
    }
    if application:
        told.update(application=application, deployment=deployment)
    return told


def _json(told: dict[str, Any]) -> str:
    line = {"time": utc(told["time"]), **{key: value for key, value in told.items() if key != "time"}}
    if "status" in line:
        # It has all that the message says.
        del line["message"]
        line["request_id"] = line.pop("request")
    return f"{json.dumps(line)}\n"


def _text(told: dict[str, Any]) -> str:
    # As the lines of all other loggers look.
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["time"]))
    return f"{when},{int(told['time'] % 1 * 1e3):03d} - {ACCESS} - INFO - {told['message']}\n"
