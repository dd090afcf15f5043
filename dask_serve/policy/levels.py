"""What a router has told of its backlog, and what it has heard of those of others.

Levels are told when they leave or reach 0, double or halve, so that telling them costs next to nothing.
"""

from __future__ import annotations

from .target import STALE_AFTER

__all__ = ["Levels"]

#: For how many times as long as a request takes the levels of others are believed: slow ones are answered now and then
#: only, and some of them at other routers.
ANSWERS = 10
#: Most seconds for which they are.
LONGEST = 10.0


class Levels:
    """The levels of one router's backlog.

    Attributes
    ----------
    step : int
        By how much the backlog may differ from what was told of it, beside doubling and halving.
    """

    __slots__ = ("_elsewhere", "_heard", "_told", "_told_lately", "_told_online", "_told_urgent", "_until", "step")

    def __init__(self) -> None:
        self.step = 1 << 62
        self._told = 0
        self._told_online = 0
        self._told_urgent = False
        #: The most that was told lately, and for how long answers that are on their way may count it still.
        self._told_lately = 0
        self._until = 0.0
        #: How many wait at other routers, and when that was heard.
        self._elsewhere = 0
        self._heard = 0.0

    def differ(self, queued: int, online: int, urgent: bool) -> bool:
        """Whether the backlog is far enough from what was told of it."""
        told = self._told
        return (
            (queued != told and (not _is_near(queued, told) or abs(queued - told) >= self.step))
            or (online != self._told_online and not _is_near(online, self._told_online))
            or urgent != self._told_urgent
        )

    def tell(self, queued: int, online: int, urgent: bool, now: float) -> None:
        """Note what is told now."""
        if queued < self._told:
            self._told_lately = self._own_share(now)
            self._until = now + STALE_AFTER
        self._told, self._told_online, self._told_urgent = queued, online, urgent

    def hear(self, wanted: int, asked: bool, now: float) -> None:
        """Note how many requests wait for a replica, which knows of this router's or does not."""
        elsewhere = wanted - self._own_share(now) if asked or now < self._until else wanted
        if elsewhere >= self._elsewhere or now - self._heard > STALE_AFTER:
            # Not all replicas are asked by all routers.
            self._elsewhere = max(elsewhere, 0)
            self._heard = now

    def elsewhere(self, now: float, taken: float) -> int:
        """Return how many requests wait at other routers, as far as is known, where one takes ``taken`` seconds."""
        believed = min(max(ANSWERS * taken, STALE_AFTER), LONGEST)
        return self._elsewhere if now - self._heard <= believed else 0

    def _own_share(self, now: float) -> int:
        """Return how many of the requests that a replica says wait for it may be those of this router."""
        return max(self._told, self._told_lately) if now < self._until else self._told


def _is_near(level: int, told: int) -> bool:
    """It has neither doubled nor halved since it was told."""
    return told < 2 * level < 4 * told
