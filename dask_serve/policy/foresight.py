"""Which requests will be late, and which replicas are slow: what a router makes of the times that it has seen.

A replica that has nothing to do takes every request, whatever is known of it: that may be out of date.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .forecast import APART, SAFE, Caution, Pace, Spread
from .target import Target

__all__ = ["PROBE_AFTER", "SLOW", "Foresight", "compare"]

#: A replica is slow that takes more than this many times as long as the fastest one would at the same load.
SLOW = 2.0
#: A slow replica without requests gets one after this many seconds: it may have recovered.
PROBE_AFTER = 5.0
#: Most seconds that a refused request is told to stay away.
LONGEST_STAY = 60.0


class Foresight:
    """What one router expects of one deployment.

    Attributes
    ----------
    pace : Pace
        How fast its backlog leaves.
    """

    __slots__ = ("_caution", "_taken", "pace")

    def __init__(self) -> None:
        self.pace = Pace()
        #: Seconds that requests take once they are sent.
        self._taken = Spread()
        self._caution = Caution()

    def learn(self, target: Target, call: Any, now: float) -> None:
        """Learn how long a request took, or a streamed one until its first item; not of one that failed."""
        forecast = target.forecast
        if now - forecast.sampled < APART:
            return
        seconds = now - call.sent
        forecast.add(call.found, seconds, now)
        target.worst = forecast.at_most(target.limit, Caution.MOST)
        self._taken.add(seconds)
        if call.deadline is not None:
            self._caution.in_time()

    @property
    def taken(self) -> float:
        """Mean of the seconds that requests take once they are sent; 0.0: not known yet."""
        return self._taken.mean

    def late(self) -> None:
        """A request that was taken in missed its deadline."""
        self._caution.late()

    def in_time(self, first: Target, order: Sequence[Target], slack: float, now: float) -> Target | None:
        """Return a replica that answers within ``slack`` seconds, or has nothing to do: ``first``, or the fastest."""
        if self._at_most(first, now) <= slack:
            return first
        free = [target for target in order if target.mine < target.limit and target.usable]
        best = min(free, key=lambda target: self._at_most(target, now))
        return best if self._at_most(best, now) <= slack else None

    def stay_away(self, order: Sequence[Target], slack: float, now: float) -> float:
        """Return the seconds until a replica will answer within ``slack``, as far as can be told."""
        soonest = min((self._at_most(target, now) for target in order if target.usable), default=slack)
        return min(max(soonest - slack, 0.0), LONGEST_STAY)

    def lateness(self, order: Sequence[Target], ahead: int, slack: float) -> float:
        """Return by how many seconds a request will be late behind so many others in the backlog; 0.0: it will not."""
        return min(max(self.wait(order, ahead) - slack, 0.0), LONGEST_STAY) if order else 0.0

    def wait(self, order: Sequence[Target], ahead: int) -> float:
        """Return the seconds until a request behind so many others in the backlog is hardly not answered yet."""
        taken = self._taken
        if not taken.samples:
            return 0.0
        caution = self._caution.factor
        seconds = self.pace.wait(ahead + 1, caution)
        if seconds is None:
            # As many leave as are answered.
            slots = sum(target.limit for target in order if target.usable)
            seconds = (ahead + 1) * taken.mean / slots if slots else 0.0
        return seconds + taken.mean + min(caution * SAFE * taken.deviation, taken.mean)

    def _at_most(self, target: Target, now: float) -> float:
        """Return the seconds that a request will hardly exceed there; 0.0 where it finds nobody."""
        # With answers outstanding what was heard last of others may be old, and is the best that there is.
        load = target.mine + target.others if target.mine else target.load(now)
        return target.forecast.at_most(load, self._caution.factor) if load else 0.0


def compare(order: Sequence[Target], now: float) -> None:
    """Give slow replicas their handicap, and have those tried again that got nothing for long."""
    known = [target for target in order if target.forecast.known]
    if not known:
        return
    usual = sum(target.load(now) for target in known) // len(known)
    fastest = min((target.forecast for target in known), key=lambda forecast: forecast.expected(usual))
    for target in known:
        load = target.load(now)
        least = fastest.expected(load)
        times = target.forecast.expected(load) / least if least > 0.0 else 1.0
        target.handicap = times if times > SLOW else 1.0
        if times > SLOW and not target.mine and now - target.forecast.sampled > PROBE_AFTER:
            target.handicap = 0.0
