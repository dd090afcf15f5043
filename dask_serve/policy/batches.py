"""Batches: what they cost, which calls go into one, and when it begins.

An idle replica begins at once, with what has come; a busy one lets the next batch fill itself. The callers that a batch
has just answered are often on their way back: then the next one may be held for a part of a batch's fixed cost, for as
long as that is seen to pay.

Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["CostModel", "Pace", "Waiting", "compose"]

#: What each further sample leaves of the weight of those before.
_FORGET = 0.9
#: Samples this many times as long as expected are set aside (a compilation, a pause), unless several come in a row.
_OUTLIER, _IN_A_ROW = 5.0, 3

#: The next batch is held for at most this part of the fixed cost (less, where holding has paid less), and this many
#: seconds.
HELD_FOR, HELD_AT_MOST = 1.0, 0.02
#: Holding goes on while at least this share of the holds brought back half of the callers; below it every
#: `_TRIED_EVERY` th batch tries again.
_WORTH, _TRIED_EVERY = 0.3, 16


class CostModel:
    """The seconds that a batch of size n takes, ``a * n + b``, measured while it serves.

    Until two sizes have been seen nothing is known of ``b``, and the time is taken to grow with the size. The first
    batch is not learned from: it may have compiled or loaded something.

    Attributes
    ----------
    each : float
        Seconds that one more call adds (``a``).
    fixed : float
        Seconds that a batch takes however small it is (``b``).
    settled : bool
        Both were told apart.
    """

    __slots__ = ("_begun", "_n", "_nn", "_nt", "_outliers", "_t", "_weight", "each", "fixed", "settled")

    def __init__(self) -> None:
        self.each = 0.0
        self.fixed = 0.0
        self.settled = False
        self._begun = False
        self._outliers = 0
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def __repr__(self) -> str:
        return f"<CostModel {self.each:.3g} s * n + {self.fixed:.3g} s>"

    @property
    def known(self) -> bool:
        """Something was measured."""
        return self._weight > 0

    def time(self, size: float) -> float:
        """Return the seconds that a batch of this size is expected to take; 0.0 while nothing is known."""
        return self.each * size + self.fixed

    def observe(self, size: float, seconds: float) -> None:
        """A batch of this size took that long."""
        if not self._begun:
            self._begun = True
            return
        # A small batch is not unusual because it takes as long as the large ones so far.
        if self.known and seconds > _OUTLIER * max(self.time(size), self._t / self._weight):
            self._outliers += 1
            if self._outliers < _IN_A_ROW:
                return
            # It has become slow: what was known is of no use.
            self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._outliers = 0
        self._weight = self._weight * _FORGET + 1.0
        self._n = self._n * _FORGET + size
        self._t = self._t * _FORGET + seconds
        self._nn = self._nn * _FORGET + size * size
        self._nt = self._nt * _FORGET + size * seconds
        self._fit()

    def _fit(self) -> None:
        size, seconds = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - size * size
        if spread > 1e-3 * size * size:
            self.each = (self._nt / self._weight - size * seconds) / spread
            self.settled = True
        elif self.each == self.fixed == 0.0:
            self.each = seconds / size
        # Sizes that are all the same tell the sum of both only: what one more call adds stays as it was.
        self.each = min(max(self.each, 0.0), seconds / size)
        self.fixed = seconds - self.each * size


class Waiting(Protocol):
    """A call that waits, as far as batches are concerned."""

    #: What it counts.
    size: float
    #: When it came.
    since: float
    #: When its answer is due; None: whenever.
    deadline: float | None


_Call = TypeVar("_Call", bound=Waiting)


def compose(waiting: Sequence[_Call], now: float, cost: CostModel, most: float) -> tuple[list[_Call], list[_Call]]:
    """Decide which calls make the next batch.

    In the order in which they came, at most ``most`` together, and no more than can be done in half of the time that
    the most pressing of them had when it came: it waits for the batch before, and then for its own.

    Calls that cannot be in time any more are left out, as long as others wait. So are those for whose sake the batch
    would have to be less than half as large as without them: behind them the rest would be late too.

    Returns
    -------
    taken : list
        At least one call, if any waits.
    late : list
        Calls to be refused.
    """
    if not cost.known or all(call.deadline is None for call in waiting):
        return _first(waiting, most), []
    viable, late = _split(waiting, now, cost, None)
    if not viable:
        # An idle replica tries, and goes on measuring.
        return _first(waiting, most), []
    prompt = _in_time(viable, now, cost, most)
    full = _in_time(viable, None, cost, most)
    roomy, pressing = _split(viable, now, cost, _size(full))
    larger = _in_time(roomy, now, cost, most)
    if _size(larger) > 2 * _size(prompt):
        return larger, late + pressing
    return prompt, late


def _size(calls: Sequence[_Call]) -> float:
    return sum(call.size for call in calls)


def _first(waiting: Sequence[_Call], most: float) -> list[_Call]:
    taken: list[_Call] = []
    size = 0.0
    for call in waiting:
        size += call.size
        if taken and size > most:
            break
        taken.append(call)
    return taken


def _split(
    waiting: Sequence[_Call], now: float, cost: CostModel, size: float | None
) -> tuple[list[_Call], list[_Call]]:
    """Tell calls that are in time in a batch of that size (None: each alone) from those that are not."""
    early: list[_Call] = []
    late: list[_Call] = []
    for call in waiting:
        ends = now + cost.time(call.size if size is None else size)
        (early if call.deadline is None or ends <= call.deadline else late).append(call)
    return early, late


def _in_time(waiting: Sequence[_Call], now: float | None, cost: CostModel, most: float) -> list[_Call]:
    """Take calls while all that are taken have the time for it; ``now``: at this moment, not only when they came."""
    taken: list[_Call] = []
    size, left = 0.0, float("inf")
    for call in waiting:
        size += call.size
        if call.deadline is not None:
            left = min(left, (call.deadline - call.since) / 2)
            if now is not None:
                left = min(left, call.deadline - now)
        if taken and (size > most or cost.time(size) > left):
            break
        taken.append(call)
    return taken


class Pace:
    """When the next batch begins.

    Parameters
    ----------
    cost : CostModel

    Attributes
    ----------
    worth : float
        Share of the holds that brought callers back, lately.
    """

    __slots__ = ("_answered", "_batches", "_cost", "_held_until", "_left", "_target", "worth")

    def __init__(self, cost: CostModel) -> None:
        self.worth = 1.0
        self._cost = cost
        self._batches = 0
        #: Of the last batch: how many calls it answered, and how many waited at its end.
        self._answered = self._left = 0.0
        self._target = 0.0
        self._held_until = 0.0

    def due(
        self,
        now: float,
        size: float,
        oldest: float,
        *,
        most: float,
        wait: float,
        free: bool,
        idle: bool,
        pressing: float = float("inf"),
    ) -> float:
        """Return when the next batch should begin; infinity: not before another one has ended.

        Parameters
        ----------
        size : float
            Of all calls that wait; more than 0.
        oldest : float
            When the first of them came.
        most : float
            The largest batch.
        wait : float
            Seconds for which the first call waits for others.
        free : bool
            Another batch may run.
        idle : bool
            None runs.
        pressing : float
            When the first of the calls has spent half of its time: it waits for others no longer than that.
        """
        if not free:
            return float("inf")
        if size >= most:
            return now
        due = min(oldest + wait, pressing) if wait else now
        if idle and size < min(self._target, most):
            due = max(due, self._held_until)
        return due

    def began(self, size: float) -> None:
        """A batch begins, where ``size`` waited."""
        if self._target:
            came_back = size - self._left >= self._answered / 2
            self.worth += 0.25 * (came_back - self.worth)
            self._target = 0.0

    def ended(self, now: float, size: float, waiting: float) -> None:
        """A batch of this size has ended; so much waits."""
        self._batches += 1
        # Not told apart, all that one call takes may be fixed: to find out takes two in a batch.
        fixed = self._cost.fixed if self._cost.settled else self._cost.time(1)
        hold = min(HELD_FOR * max(self.worth, _WORTH) * fixed, HELD_AT_MOST)
        if hold > 0 and (self.worth >= _WORTH or self._batches % _TRIED_EVERY == 0):
            self._answered, self._left = size, waiting
            self._target = size + waiting
            self._held_until = now + hold
        else:
            self._target = 0.0
