"""The last log records of a process, with the replica that they are about: what `dask serve logs` shows.

A process that has replicas, proxies or the controller keeps them in memory, in addition to whatever its loggers do with
them. They are taken where they are made, so that loggers, handlers and their levels stay as a program set them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .context import replica_context, request_context

__all__ = ["Records", "keep_records", "records", "told_since"]

#: How many records a process keeps at most, and bytes of text.
MOST, MOST_BYTES = 2000, 4 << 20
#: Characters that a message may have.
LONGEST = 16_384
#: Loggers whose records say more of the cluster than of the service: from warnings on.
QUIET = ("distributed", "asyncio", "tornado", "bokeh", "dask")

Factory = Callable[..., logging.LogRecord]


class Records:
    """The last records, the oldest first, in bounded memory; may be used from any thread.

    Attributes
    ----------
    id : str
        Of this process's records, for those who read on.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._kept: deque[dict[str, Any]] = deque()
        self._bytes = 0
        self._number = 0

    def add(self, told: Mapping[str, Any]) -> None:
        """Keep a record; it gets the next number."""
        with self._lock:
            self._number += 1
            self._kept.append({**told, "number": self._number})
            self._bytes += len(told["message"])
            while len(self._kept) > MOST or self._bytes > MOST_BYTES:
                self._bytes -= len(self._kept.popleft()["message"])

    def since(self, number: int) -> list[dict[str, Any]]:
        """Return the records after the one with ``number``."""
        with self._lock:
            # From the end: those who follow want the last few.
            found: list[dict[str, Any]] = []
            for record in reversed(self._kept):
                if record["number"] <= number:
                    break
                found.append(record)
        return found[::-1]


#: Those of this process; None: it keeps none.
_records: Records | None = None
_start = threading.Lock()


def keep_records() -> Records:
    """Keep the records of this process from now on."""
    global _records
    with _start:
        if _records is None:
            _records = Records()
            logging.setLogRecordFactory(_noting(logging.getLogRecordFactory(), _records))
        return _records


def records() -> Records | None:
    """Return the records of this process, if it keeps any."""
    return _records


def told_since(known: Mapping[str, int]) -> dict[str, Any]:
    """Return the records of this process that a reader does not have; for `distributed.Client.run` too.

    Parameters
    ----------
    known : dict
        The number of the last record that the reader has, by `Records.id`.

    Returns
    -------
    dict
        ``id`` and ``records``; empty where this process keeps none.
    """
    if _records is None:
        return {}
    return {"id": _records.id, "records": _records.since(known.get(_records.id, 0))}


def _noting(make: Factory, kept: Records) -> Factory:
    def make_and_note(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        # Whatever is wrong with a record, its handlers tell; user code goes on.
        with contextlib.suppress(Exception):
            if record.levelno >= logging.WARNING or record.name.partition(".")[0] not in QUIET:
                kept.add(_told(record))
        return record

    return make_and_note


def _told(record: logging.LogRecord) -> dict[str, Any]:
    text = record.getMessage().rstrip()
    if record.exc_info and record.exc_info[1] is not None:
        text = "\n".join((text, *_lines(traceback.format_exception(*record.exc_info))))
    told: dict[str, Any] = {
        "time": record.created,
        "level": record.levelname,
        "logger": record.name,
        "message": text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)",
    }
    replica = replica_context.get(None)
    if replica is not None:
        told.update(application=replica.app_name, deployment=replica.deployment, replica=replica.replica_id)
        request = request_context.get()
        if request is not None:
            told["request"] = request.request_id
    return told


def _lines(parts: Iterable[str]) -> list[str]:
    return "".join(parts).rstrip().splitlines()


def _after_fork() -> None:
    """Records of a forked process are its own, and nobody holds their lock."""
    if _records is not None:
        _records.id = uuid.uuid4().hex
        _records._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
