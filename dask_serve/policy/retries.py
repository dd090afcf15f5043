"""How many requests may be sent again after a loss: enough for what a dead worker had, too few for a storm.

Where replicas die of the requests themselves, or one after the other, every retry makes it worse; so retries have a
budget.
"""

from __future__ import annotations

__all__ = ["RetryBudget"]

#: Seconds over which retries are counted.
WINDOW = 10.0
#: Share of the requests of a window that may be sent again, beside so many in any case.
SHARE = 0.1
RESERVE = 1000


class RetryBudget:
    """The retries of one router."""

    __slots__ = ("_begun", "_sent", "_spent")

    def __init__(self) -> None:
        self._begun = float("-inf")
        self._sent = 0
        self._spent = 0

    def take(self, sent: int, now: float) -> bool:
        """Ask for one retry.

        Parameters
        ----------
        sent : int
            Requests that the router has sent, since it was made.
        now : float
            Time in seconds.

        Returns
        -------
        bool
            False: the budget is spent.
        """
        if now - self._begun > WINDOW:
            self._begun, self._sent, self._spent = now, sent, 0
        if self._spent >= RESERVE + SHARE * (sent - self._sent):
            return False
        self._spent += 1
        return True
