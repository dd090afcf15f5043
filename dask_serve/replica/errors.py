"""Tells the controller what user code raises: the last tracebacks of a deployment stand in the status.

A replica that fails at every request tells one in a second, and how many there were meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["ErrorReports"]

#: Seconds between two reports.
EVERY = 1.0
#: Characters of a traceback: so many of its beginning, and of its end.
HEAD, TAIL = 1000, 7000


class ErrorReports:
    """The errors of one replica.

    Parameters
    ----------
    replica : str
        Its id.
    worker : distributed.Worker
        Its connection to the scheduler carries the reports.
    """

    def __init__(self, replica: str, worker: Worker) -> None:
        self._replica = replica
        self._worker = worker
        self._lock = threading.Lock()
        self._told = 0.0
        self._count = 0

    def note(self, request_id: str, text: str) -> None:
        """A request has failed with this traceback. From any thread."""
        now = time.monotonic()
        with self._lock:
            self._count += 1
            if self._told and now - self._told < EVERY:
                return
            self._told = now
            count, self._count = self._count, 0
        if len(text) > HEAD + TAIL:
            text = f"{text[:HEAD]}\n...\n{text[-TAIL:]}"
        report = {
            "replica": self._replica,
            "time": time.time(),
            "request_id": request_id,
            "text": text,
            "count": count,
        }
        telling = self._tell(report)
        try:
            asyncio.run_coroutine_threadsafe(telling, self._worker.loop.asyncio_loop)
        except RuntimeError:  # the worker's loop has ended
            telling.close()

    async def _tell(self, report: dict[str, Any]) -> None:
        # A controller that is gone, or knows no such report, does without.
        with contextlib.suppress(Exception):
            await self._worker.scheduler.serve_error(**report)
