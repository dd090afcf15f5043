"""What strangers get wrong, in the log: a line every few seconds, however many they are."""

from __future__ import annotations

import asyncio
import logging

__all__ = ["INTERVAL", "Complaints"]

logger = logging.getLogger("dask_serve.proxy")

#: Seconds between two lines.
INTERVAL = 10.0

#: What uvicorn logs, with a traceback, for each WebSocket whose text is none.
_NO_TEXT = "Invalid UTF-8 sequence received from client."


class Complaints(logging.Filter):
    """Counts what no application has seen, because it is not HTTP as it should be.

    The first one is told at once, those that follow together. Nothing of what they sent is: it may be anything. As a
    filter of uvicorn's log it takes those that would be told there one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._last = ""
        self._waiting = False

    def note(self, client: str = "") -> None:
        """Take note of one."""
        self._count += 1
        self._last = client or self._last
        if not self._waiting:
            self._tell()

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record out of the log that is counted instead."""
        if record.msg != _NO_TEXT:
            return True
        self.note()
        return False

    def _tell(self) -> None:
        self._waiting = self._count > 0
        if self._waiting:
            came = f"; the last address: {self._last}" if self._last else ""
            logger.warning("Requests or WebSockets that broke the rules of HTTP were refused: %d%s", self._count, came)
            self._count = 0
            asyncio.get_running_loop().call_later(INTERVAL, self._tell)
