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
from .levels import LEVELS

__all__ = ["ACCESS", "PLACES", "Records", "keep_records", "place", "records", "told_since"]

#: The logger of the access log.
ACCESS = "dask_serve.access"
#: How many records a process keeps at most, and bytes of text; those of the access log not counted, which has as many.
MOST, MOST_BYTES = 2000, 4 << 20
#: Characters that a message may have.
LONGEST = 16_384
#: Attributes of all records: where they were made.
PLACES = ("serve_application", "serve_deployment", "serve_replica", "serve_request_id")
#: Ids of a batch's requests that a record names.
IDS = 8
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
        self._kept = _Shelf()
        #: Lines of the access log, which are many, apart: they would push out all others.
        self._accesses = _Shelf()
        self._number = 0

    def add(self, told: Mapping[str, Any]) -> None:
        """Keep a record; it gets the next number."""
        shelf = self._accesses if told.get("logger") == ACCESS else self._kept
        with self._lock:
            self._number += 1
            shelf.add({**told, "number": self._number})

    def since(self, number: int) -> list[dict[str, Any]]:
        """Return the records after the one with ``number``."""
        with self._lock:
            found, accesses = self._kept.since(number), self._accesses.since(number)
        return sorted(found + accesses, key=_number_of) if found and accesses else found or accesses


class _Shelf:
    """Records in bounded memory, the oldest first."""

    def __init__(self) -> None:
        self._records: deque[dict[str, Any]] = deque()
        self._bytes = 0

    def add(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._bytes += len(record["message"])
        while len(self._records) > MOST or self._bytes > MOST_BYTES:
            self._bytes -= len(self._records.popleft()["message"])

    def since(self, number: int) -> list[dict[str, Any]]:
        # From the end: those who follow want the last few.
        found: list[dict[str, Any]] = []
        for record in reversed(self._records):
            if record["number"] <= number:
                break
            found.append(record)
        return found[::-1]


def _number_of(record: dict[str, Any]) -> int:
    number: int = record["number"]
    return number


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
        where = place()
        # For the formats of handlers. By names of our own: what user code gives in `extra` must not be there yet.
        record.__dict__.update(zip(PLACES, where, strict=True))
        # Whatever is wrong with a record, its handlers tell; user code goes on.
        with contextlib.suppress(Exception):
            told = record.levelno >= logging.WARNING or record.name.partition(".")[0] not in QUIET
            if told and LEVELS.filter(record):
                kept.add(_told(record, where))
        return record

    return make_and_note


def _told(record: logging.LogRecord, where: tuple[str, str, str, str]) -> dict[str, Any]:
    text = record.getMessage().rstrip()
    if record.exc_info and record.exc_info[1] is not None:
        text = "\n".join((text, *_lines(traceback.format_exception(*record.exc_info))))
    told: dict[str, Any] = {
        "time": record.created,
        "level": record.levelname,
        "logger": record.name,
        "message": text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)",
    }
    application, deployment, replica, request = where
    if replica:
        told.update(application=application, deployment=deployment, replica=replica)
    if request:
        told["request"] = request
    return told


def place() -> tuple[str, str, str, str]:
    """Return application, deployment, replica and request that the present code belongs to; "" where it does not.

    A batch has the ids of its requests, as many as a line can hold.
    """
    replica = replica_context.get(None)
    if replica is None:
        return "", "", "", ""
    request = request_context.get()
    ids: tuple[str, ...] = () if request is None else request.request_ids
    more = f",+{len(ids) - IDS}" if len(ids) > IDS else ""
    return replica.app_name, replica.deployment, replica.replica_id, ",".join(ids[:IDS]) + more


def _lines(parts: Iterable[str]) -> list[str]:
    return "".join(parts).rstrip().splitlines()


def _after_fork() -> None:
    """Records of a forked process are its own, and nobody holds their lock."""
    if _records is not None:
        _records.id = uuid.uuid4().hex
        _records._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
