"""How much of a replica background requests may use: what online ones leave.

An online request that comes while background ones stand in line for a thread, or for the interpreter, waits for all of
them. So only as many are admitted as begin at once. Their number is found by trying: it grows slowly while requests
begin at once with so many others there, and falls to what was there before one that did not. Replicas that wait rather
than compute so end at their limit, others at their threads.
"""

from __future__ import annotations

__all__ = ["Leftover"]

#: Seconds, and share of its own time, that a request may wait in the replica before it begins.
AT_ONCE = 0.001
SHARE = 0.1
#: By how much the number grows with one that began at once, beside the share of what it is already.
GROWTH = 0.05
GROWTH_SHARE = 0.0125
#: Weight of the newest sample in the mean of what requests take.
SMOOTHING = 0.1


class Leftover:
    """How many requests may run for another background one to be admitted.

    Parameters
    ----------
    least : int
        Always so many: the replica's threads.
    """

    __slots__ = ("_most", "_seconds", "ahead", "least")

    def __init__(self, least: int) -> None:
        self.least = least
        #: So many more are no matter: together they take less than a request may wait anyway.
        self.ahead = 0
        self._most = float(least)
        self._seconds = 0.0

    @property
    def most(self) -> int:
        """The number at present."""
        return int(self._most)

    def began(self, found: int, delay: float, seconds: float, limit: int) -> None:
        """Note when a request began, ``delay`` seconds after it was admitted, and how long it ran.

        Parameters
        ----------
        found : int
            Requests that ran when it was admitted.
        limit : int
            The replica's ``max_ongoing_requests``.
        """
        mean = self._seconds
        self._seconds = mean + SMOOTHING * (seconds - mean) if mean else seconds
        self.ahead = min(int(AT_ONCE / self._seconds), limit) if self._seconds > 0 else 0
        if delay > max(AT_ONCE, SHARE * seconds):
            self._most = max(float(self.least), min(self._most, float(found)))
        elif self.most - 1 <= found and self._most < limit:
            self._most = min(float(limit), self._most + GROWTH + GROWTH_SHARE * self._most)
