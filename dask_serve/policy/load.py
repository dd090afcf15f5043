"""When a change of load is worth telling the controller.

Whoever has requests (a worker process those that run, a router those that wait) samples its levels while there are
any, and tells their means since it told last: soon when the sum of a group has left a band around what was told, else
after a while. What is told replaces what was told before; a level that is not named is zero.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXPIRES", "LEAST", "SAMPLE", "Levels"]

#: Seconds between two samples, while there are requests.
SAMPLE = 0.05
#: Seconds between two reports, at least.
LEAST = 0.1
#: Seconds after which any difference is told.
SETTLE = 1.0
#: Seconds after which a level that is not zero is told again, though it is the same.
REPEAT = 2.0
#: Seconds after which what was told is believed no more: its teller is gone.
EXPIRES = 6.0
#: What was told holds while the level is within this share of it, or within one request.
BAND = 0.5


class Levels:
    """Samples of some levels, and what was told of them.

    Attributes
    ----------
    told : dict
        The last report; levels that are not in it were told to be zero.
    """

    __slots__ = ("_count", "_last", "_since", "_sums", "told")

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self._since = float("-inf")
        self._sums: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._count = 0

    @property
    def quiet(self) -> bool:
        """All levels are zero, and told to be: nothing has to be sampled until requests come."""
        return not self.told and not self._last

    def sample(self, levels: Mapping[str, int], now: float) -> dict[str, float] | None:
        """Note the present levels (zeros may be left out); return what to tell, if it is time to tell something."""
        self._last = {name: level for name, level in levels.items() if level}
        self._count += 1
        sums = self._sums
        for name, level in self._last.items():
            sums[name] = sums.get(name, 0.0) + level
        passed = now - self._since
        if passed < LEAST or (not sums and not self.told):
            return None
        means = {name: total / self._count for name, total in sums.items()} if self._last or passed < SETTLE else {}
        if not self._is_news(means, passed):
            return None
        self.told = means
        self._since = now
        self._sums = {}
        self._count = 0
        return means

    def _is_news(self, means: Mapping[str, float], passed: float) -> bool:
        if passed >= REPEAT:
            return True
        before, after = sum(self.told.values()), sum(means.values())
        # From nothing to something is news at once: somebody may wait for a first replica.
        if not self.told or abs(after - before) > max(1.0, BAND * before):
            return True
        return passed >= SETTLE and any(_differ(self.told, means, name) for name in {*self.told, *means})


def _differ(told: Mapping[str, float], means: Mapping[str, float], name: str) -> bool:
    before, after = told.get(name, 0.0), means.get(name, 0.0)
    return (before == 0) != (after == 0) or abs(after - before) > 0.1 * before
