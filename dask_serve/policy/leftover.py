"""How much of a replica background requests may use: what online ones leave.

An online request that comes while background ones stand in line for a thread, or for the interpreter, waits for all of
them. So only as many are admitted as begin at once. Their number is found by trying: it grows slowly while online
requests begin at once with so many others there, and falls to what was there before one that did not. Replicas that
wait rather than compute so end at their limit, others at their threads but one.

Where no online request has come for a while a line of a few milliseconds harms nobody but the first that comes, and
saves most of what a call costs: background ones then come many at a time.
"""

from __future__ import annotations

__all__ = ["QUIET_AFTER", "Leftover"]

#: Seconds that a request may wait in the replica before it begins, where online ones come and where none do.
AT_ONCE = 0.001
AT_ONCE_ALONE = 0.01
#: Or this share of its own time.
SHARE = 0.1
#: Seconds without an online request after which background ones are alone: only one that comes more rarely meets the
#: longer line.
QUIET_AFTER = 10.0
#: By how much the number grows with one that began at once, and by which share of what it is already; and how many
#: times faster where nobody is harmed.
GROWTH = 0.05
GROWTH_SHARE = 0.0125
FASTER_ALONE = 10
#: Weight of the newest sample in the mean of what requests take.
SMOOTHING = 0.1


class Leftover:
    """How many requests may run for another background one to be admitted.

    Parameters
    ----------
    threads : int
        Of the replica. Where there are several, one is left free for online requests, unless none come.

    Attributes
    ----------
    came : bool
        Set when an online request comes.
    """

    __slots__ = ("_alone", "_beside", "_last", "_quiet", "_seconds", "came")

    def __init__(self, threads: int) -> None:
        self.came = False
        self._beside = _Tried(max(min(threads, 1), threads - 1), AT_ONCE, 1)
        self._alone = _Tried(threads, AT_ONCE_ALONE, FASTER_ALONE)
        self._seconds = 0.0
        self._last = -QUIET_AFTER
        self._quiet = True

    @property
    def quiet(self) -> bool:
        """No online request has come for a while."""
        return self._quiet and not self.came

    @property
    def most(self) -> int:
        """The number at present."""
        return int((self._alone if self.quiet else self._beside).number)

    @property
    def ahead(self) -> int:
        """So many more are no matter: together they take less than a request may wait anyway."""
        return (self._alone if self.quiet else self._beside).ahead

    def began(  # noqa: PLR0917
        self, found: int, delay: float, seconds: float, limit: int, now: float, background: bool = True
    ) -> None:
        """Note when a request began, ``delay`` seconds after it was admitted, and how long it ran.

        Parameters
        ----------
        found : int
            Requests that ran when it was admitted.
        limit : int
            The replica's ``max_ongoing_requests``.
        """
        if self.came:
            self.came = False
            self._last = now
        self._quiet = now - self._last >= QUIET_AFTER
        mean = self._seconds
        self._seconds = mean + SMOOTHING * (seconds - mean) if mean else seconds
        # That background ones begin at once says nothing of the online ones that come while they run.
        self._beside.began(found, delay, seconds, limit, grows=not background)
        self._alone.began(found, delay, seconds, limit, grows=self._quiet)
        self._beside.set_ahead(self._seconds, limit)
        self._alone.set_ahead(self._seconds, limit)


class _Tried:
    """A number that is found by trying."""

    __slots__ = ("ahead", "at_once", "faster", "least", "number")

    def __init__(self, least: int, at_once: float, faster: int) -> None:
        self.at_once = at_once
        self.faster = faster
        self.least = float(least)
        self.number = self.least
        self.ahead = 0

    def began(self, found: int, delay: float, seconds: float, limit: int, *, grows: bool) -> None:
        if delay > max(self.at_once, SHARE * seconds):
            self.number = max(self.least, min(self.number, float(found)))
        elif grows and int(self.number) - 1 <= found and self.number < limit:
            self.number = min(float(limit), self.number + self.faster * (GROWTH + GROWTH_SHARE * self.number))

    def set_ahead(self, seconds: float, limit: int) -> None:
        self.ahead = min(int(self.at_once / seconds), limit) if seconds > 0 else 0
