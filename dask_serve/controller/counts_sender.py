"""What the proxies of another node have counted, on its way to the controller: nothing is lost or told twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ..measures.counts import HttpCounts

__all__ = ["CountsSender"]

logger = logging.getLogger("dask_serve.controller")

Exported = Mapping[str, Mapping[str, Any]]


class CountsSender:
    """Sends one report after the other, of each source the latest; what does not arrive is sent again.

    A controller counts from 0, so one that takes over, as the scheduler was started again, is told only what was not
    told to the one before.

    Parameters
    ----------
    scheduler : distributed.core.rpc
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._epoch = ""
        #: By source: what is to be told, what was told, and how much of it to earlier controllers.
        self._waiting: dict[str, Exported] = {}
        self._told: dict[str, Exported] = {}
        self._before: dict[str, Exported] = {}
        self._ended: set[str] = set()
        self._sending: asyncio.Task[None] | None = None

    def put(self, source: str, counts: Exported) -> None:
        """Tell the counts of a source by deployment."""
        self._waiting[source] = counts
        self.wake()

    def end(self, source: str) -> None:
        """Tell that a source counts nothing any more."""
        self._ended.add(source)
        self._waiting.setdefault(source, self._told.get(source, {}))
        self.wake()

    def wake(self) -> None:
        """Send what waits, if that is not under way."""
        if self._waiting and (self._sending is None or self._sending.done()):
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def flush(self) -> None:
        """Send what waits, and return when that was done, or cannot be."""
        self.wake()
        if self._sending is not None:
            await self._sending

    async def _send(self) -> None:
        while self._waiting:
            source, counts = next(iter(self._waiting.items()))
            ended = source in self._ended
            news = _since(counts, self._before.get(source, {}))
            try:
                answer = await self._scheduler.serve_counts(source=source, counts=news, epoch=self._epoch, ended=ended)
            except OSError as error:
                logger.info("The controller does not answer (%s): counts of proxies are told later", error)
                return
            epoch = (answer or {}).get("epoch", "")
            if not epoch:
                return  # there is none, or not yet
            if epoch != self._epoch:
                # It has not taken them.
                self._epoch, self._before = epoch, dict(self._told)
                continue
            self._told[source] = counts
            if self._waiting.get(source) is counts and ended == (source in self._ended):
                del self._waiting[source]
                if ended:
                    self._ended.discard(source)
                    self._told.pop(source)
                    self._before.pop(source, None)


def _since(counts: Exported, earlier: Exported) -> dict[str, Any]:
    if not earlier:
        return dict(counts)
    return {
        deployment: HttpCounts.read(of).since(HttpCounts.read(earlier.get(deployment, _NOTHING))).export()
        for deployment, of in counts.items()
    }


_NOTHING = HttpCounts().export()
