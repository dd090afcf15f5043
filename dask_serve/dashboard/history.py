"""What happened in each second of the last minutes, by deployment. Reads no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from math import floor
from typing import Any, NamedTuple

__all__ = ["ALL", "KEPT", "Amounts", "History", "Levels", "Tellers", "difference"]

#: Stands for all deployments together; ids of deployments have a slash.
ALL = "all"
#: Seconds that are kept.
KEPT = 300
#: The most that is kept of all deployments and seconds; with many busy deployments that is less than `KEPT` seconds.
ROWS = 40_000

#: Seconds for which levels are taken to stay as they were.
HELD = 7

#: What was counted, by name and number: a status, a bucket of a histogram, or 0.
Amounts = dict[tuple[str, int], float]


class Levels(NamedTuple):
    """What a deployment has at one moment.

    Attributes
    ----------
    running, queued : float
        Requests at replicas, and those that wait for one.
    ready, wanted : float
        Replicas.
    """

    running: float = 0.0
    queued: float = 0.0
    ready: float = 0.0
    wanted: float = 0.0

    def plus(self, other: Levels) -> Levels:
        """Return the sums."""
        return Levels(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class _Second:
    """What happened in one second."""

    __slots__ = ("amounts", "levels")

    def __init__(self) -> None:
        self.amounts: dict[str, Amounts] = {}
        self.levels: dict[str, Levels] = {}


class History:
    """Amounts and levels by second and deployment, bounded in both.

    Parameters
    ----------
    kept : int, default 300
        Seconds.
    rows : int, default 40000
        Of all seconds and deployments; the oldest seconds go first.
    """

    def __init__(self, kept: int = KEPT, rows: int = ROWS) -> None:
        self._kept = kept
        self._limit = rows
        self._seconds: dict[int, _Second] = {}
        self._rows = 0
        self._newest = 0
        #: Whether seconds may be too old now.
        self._advanced = False

    def add(self, begin: float, end: float, deployment: str, amounts: Mapping[tuple[str, int], float]) -> None:
        """Count what happened between two moments, as if evenly spread.

        Processes tell what they counted at their own pace: without spreading, a steady load would look ragged.
        """
        length = end - begin
        if not 0.0 < length <= self._kept:
            begin, length = end, 0.0
        for number in range(floor(begin), floor(end) + 1):
            share = (min(end, number + 1) - max(begin, number)) / length if length else 1.0
            if share and (second := self._second(number)) is not None:
                for name in (deployment, ALL):
                    if name not in second.amounts:
                        second.amounts[name] = {}
                        self._rows += 1
                    row = second.amounts[name]
                    for key, amount in amounts.items():
                        row[key] = row.get(key, 0.0) + amount * share
        self._trim()

    def note(self, at: float, levels: Mapping[str, Levels]) -> None:
        """Note the levels by deployment; the last ones of each second are kept."""
        second = self._second(floor(at))
        if second is not None:
            self._rows -= len(second.levels)
            total = Levels()
            for one in levels.values():
                total = total.plus(one)
            second.levels = {**levels, ALL: total}
            self._rows += len(second.levels)
            self._trim()

    def amounts(self, number: int, deployment: str) -> Amounts:
        """Return what happened in a second."""
        second = self._seconds.get(number)
        return {} if second is None else second.amounts.get(deployment, {})

    def levels(self, number: int, deployment: str) -> Levels | None:
        """Return the levels in a second, or the last ones before that; None: nobody looked for `HELD` seconds."""
        for known in range(number, number - HELD, -1):
            second = self._seconds.get(known)
            if second is not None and second.levels:
                return second.levels.get(deployment, Levels())
        return None

    @property
    def rows(self) -> int:
        """How much is kept: each deployment counts in each second in which something happened, and was looked at."""
        return self._rows

    @property
    def oldest(self) -> int:
        """The first second of which something is known, or the newest one."""
        return min(self._seconds, default=self._newest)

    def _second(self, number: int) -> _Second | None:
        if number > self._newest:
            if number - self._newest > self._kept:
                # The first one, or after a long sleep of the machine.
                self._seconds.clear()
                self._rows = 0
            self._newest = number
            self._advanced = True
        if number <= self._newest - self._kept:
            return None
        return self._seconds.setdefault(number, _Second())

    def _trim(self) -> None:
        if self._advanced or self._rows > self._limit:
            self._advanced = False
            for number in sorted(self._seconds):
                if number > self._newest - self._kept and (self._rows <= self._limit or number >= self._newest):
                    break
                gone = self._seconds.pop(number)
                self._rows -= len(gone.amounts) + len(gone.levels)


#: Seconds between two tellings of a source that tells by itself.
PACE = 1.0
#: Sources that are remembered beyond those that tell.
REMEMBERED = 1000


class Tellers:
    """Turns what sources tell, which only grows, into amounts of a history."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._told: dict[str, tuple[float, Mapping[str, Any]]] = {}

    def told(self, source: str, at: float, exported: Mapping[str, Any], since: float | None = None) -> None:
        """A source told its counts by deployment.

        Parameters
        ----------
        source : str
            One life of one process.
        at : float
            When it told, in seconds.
        exported : mapping
            What it has counted since it began, by deployment, as `HttpCounts.export` and the like make it.
        since : float, optional
            When it began at the earliest, if this is the first that is heard of it. Without it the source tells every
            `PACE` seconds in which its counts have changed.
        """
        before, known = self._told.pop(source, (at - PACE if since is None else since, {}))
        self._told[source] = at, exported
        # After a pause nothing had changed before; and what was late on its way comes at once.
        if since is None and not 0.5 * PACE <= at - before <= 2.5 * PACE:
            before = at - PACE
        for deployment, counts in exported.items():
            old = known.get(deployment)
            if counts != old:
                amounts = difference(old or {}, counts)
                if amounts:
                    self._history.add(before, at, deployment, amounts)

    def forget(self, present: int) -> None:
        """Forget those who have told nothing for longest, apart from ``present`` ones."""
        surplus = len(self._told) - present - REMEMBERED
        for source in list(islice(self._told, max(surplus, 0))):
            del self._told[source]


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Amounts:
    """Return what was counted between two exports of the same counts; of histograms the counts of buckets."""
    amounts: Amounts = {}
    for name, value in after.items():
        for (number, now), (_, then) in zip(_numbers(value), _numbers(before.get(name), value), strict=True):
            if now > then:
                amounts[name, number] = now - then
    return amounts


def _numbers(value: Any, like: Any = None) -> Iterable[tuple[int, float]]:
    shape = value if like is None else like
    if isinstance(shape, Mapping):
        return [(int(key), (value or {}).get(key, 0)) for key in shape]
    if isinstance(shape, list | tuple):
        # The first is the sum of the durations.
        return list(enumerate(value[1:] if value else [0] * (len(shape) - 1)))
    return [(0, value or 0)]
