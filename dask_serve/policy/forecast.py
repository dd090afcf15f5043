"""How long a request will take at a replica, told from how long others took.

Two things make a request wait: others that are at the replica already, and a backlog in front of it. For the first a
line is fitted through (requests there, seconds taken), in which old samples count less and less. It is flat while the
replica has room for one more, and rises by the service time where requests stand in line for a thread or the
interpreter, so nobody has to say which of the two a deployment does. For the second the pace at which the backlog is
let go is enough.

What is not known yet is not held against anybody: the forecast is 0.0 until there are samples.
"""

from __future__ import annotations

import math

__all__ = ["Caution", "Forecast", "Pace", "Spread"]

#: Weight of a new sample, once there are some.
WEIGHT = 0.05
#: Samples closer to each other than this many seconds are not worth their price.
APART = 0.001
#: Mean deviations from the forecast that are added to be on the safe side: 99 % of normal distributions lie below.
SAFE = 3.0
#: What takes this many times longer than expected counts as no more than that.
OUTLIER = 8.0


class Spread:
    """Mean of a quantity, and its mean deviation, in which old samples count less and less.

    The pair is that of TCP's retransmission timer (Jacobson, "Congestion Avoidance and Control", SIGCOMM 1988).

    Attributes
    ----------
    mean, deviation : float
        In the unit of the samples.
    samples : int
        How many there were.
    """

    __slots__ = ("deviation", "mean", "samples")

    def __init__(self) -> None:
        self.mean = self.deviation = 0.0
        self.samples = 0

    def add(self, value: float) -> None:
        """Take a sample."""
        self.samples += 1
        weight = max(WEIGHT, 1.0 / self.samples)
        off = value - self.mean
        self.mean += weight * off
        self.deviation += weight * (abs(off) - self.deviation)

    @property
    def least(self) -> float:
        """What nearly all samples exceed; 0.0 where they differ by so much that nothing can be said."""
        return max(0.0, self.mean - SAFE * self.deviation) if self.samples >= 3 else 0.0


class Forecast:
    """Seconds that a request takes at one replica, from being sent to being answered, by the load it finds there.

    Attributes
    ----------
    sampled : float
        When the last sample was taken.
    """

    __slots__ = ("_covariance", "_deviation", "_load", "_samples", "_seconds", "_variance", "sampled")

    def __init__(self) -> None:
        self.sampled = 0.0
        self._samples = 0
        self._load = self._seconds = self._variance = self._covariance = self._deviation = 0.0

    def add(self, load: int, seconds: float, now: float) -> None:
        """Note that a request took so many seconds which found ``load`` others at the replica."""
        first, self.sampled = not self.sampled, now
        if first:
            # It may have loaded or compiled what the others find.
            return
        if self._samples >= 3:
            expected = self.expected(load)
            seconds = min(seconds, OUTLIER * (expected + self._deviation))
            off = abs(seconds - expected)
            self._deviation += max(WEIGHT, 1.0 / (self._samples - 2)) * (off - self._deviation)
        self._samples += 1
        weight = max(WEIGHT, 1.0 / self._samples)
        d_load, d_seconds = load - self._load, seconds - self._seconds
        self._load += weight * d_load
        self._seconds += weight * d_seconds
        self._variance = (1.0 - weight) * (self._variance + weight * d_load * d_load)
        self._covariance = (1.0 - weight) * (self._covariance + weight * d_load * d_seconds)

    def expected(self, load: int) -> float:
        """Return the seconds that a request will take, most likely; 0.0 where nothing is known."""
        return max(0.0, self._seconds + self._slope * (load - self._load))

    def at_most(self, load: int, caution: float) -> float:
        """Return the seconds that a request will hardly exceed; 0.0 where nothing is known.

        Where service times differ widely this does not wait for the slowest of them to become impossible: the margin is
        never more than the expected time itself.
        """
        expected = self.expected(load)
        return expected + min(SAFE * self._deviation, expected) * caution

    @property
    def known(self) -> bool:
        """There is a sample."""
        return self._samples > 0

    @property
    def alone(self) -> float:
        """Seconds that a request takes which finds nobody, most likely."""
        return self.expected(0)

    @property
    def least(self) -> float:
        """Seconds that nearly every request takes."""
        return max(0.0, self.expected(0) - SAFE * self._deviation) if self._samples >= 3 else 0.0

    @property
    def _slope(self) -> float:
        if self._variance <= 0.0 or self._covariance <= 0.0:
            return 0.0
        slope = self._covariance / self._variance
        # Nobody is served in less than no time.
        return min(slope, self._seconds / self._load) if self._load > 0.0 else slope


class Pace:
    """Seconds from one request that leaves a standing backlog to the next."""

    __slots__ = ("_gap", "_last")

    def __init__(self) -> None:
        self._gap = Spread()
        self._last: float | None = None

    def left(self, now: float, others_wait: bool) -> None:
        """Note that a request left the backlog, and whether it stands on."""
        if self._last is not None:
            self._gap.add(now - self._last)
        self._last = now if others_wait else None

    def stopped(self) -> None:
        """The backlog is gone."""
        self._last = None

    def wait(self, queued: int, caution: float) -> float | None:
        """Return the seconds until ``queued`` requests will hardly not have left; None where nothing is known."""
        gap = self._gap
        if not gap.samples:
            return None
        # Deviations of independent gaps add up by their squares.
        return queued * gap.mean + caution * SAFE * math.sqrt(queued) * min(gap.deviation, gap.mean)


class Caution:
    """By how much the margins of forecasts are wider than they should have to be.

    It grows with each request that was taken in and is late, and shrinks with each that is not, so that about one of a
    hundred is late where forecasts are not good enough.

    Attributes
    ----------
    factor : float
        From 1.0 to `MOST`.
    """

    #: How much a late request adds, and one that is not takes away.
    LATE, IN_TIME = 0.1, 0.001
    MOST = 4.0

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def late(self) -> None:
        """A request is late that was taken in."""
        self.factor = min(self.factor * (1.0 + self.LATE), self.MOST)

    def in_time(self) -> None:
        """A request with a deadline was answered."""
        if self.factor > 1.0:
            self.factor = max(self.factor * (1.0 - self.IN_TIME), 1.0)
