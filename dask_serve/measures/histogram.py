"""Durations, counted by size: cheap to add to, and to add up over processes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["BOUNDS", "Histogram", "quantile"]

#: Upper bounds of the buckets in seconds, each within it; one more bucket is above all of them.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many durations fell into each bucket, and their sum.

    Attributes
    ----------
    counts : list of int
        By bucket, not cumulative.
    seconds : float
        Sum of the durations.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self, exported: Sequence[float] = ()) -> None:
        self.counts = [int(count) for count in exported[1:]] or [0] * (len(BOUNDS) + 1)
        self.seconds = float(exported[0]) if exported else 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def merge(self, other: Histogram) -> None:
        """Count what another has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was counted after ``earlier``, a state of the same histogram."""
        counts = [max(now - then, 0) for now, then in zip(self.counts, earlier.counts, strict=True)]
        return Histogram([max(self.seconds - earlier.seconds, 0.0), *counts])

    @property
    def total(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Return the duration that ``share`` of all do not exceed, as far as the buckets tell; None: there are none.

        Within a bucket durations count as evenly spread, as in Prometheus's ``histogram_quantile``; those above all
        bounds as the last bound.
        """
        return quantile(self.counts, share)

    def export(self) -> list[float]:
        """Return the sum and the counts, which make the same histogram again."""
        return [self.seconds, *self.counts]


def quantile(counts: Sequence[float], share: float) -> float | None:
    """Return what `Histogram.quantile` does for the counts by bucket, which need not be whole numbers."""
    total = sum(counts)
    if not total:
        return None
    rank, below, value = share * total, 0.0, 0.0
    for number, count in enumerate(counts):
        if count:
            low, high = BOUNDS[number - 1] if number else 0.0, BOUNDS[min(number, len(BOUNDS) - 1)]
            value = low + (high - low) * min(max(rank - below, 0.0) / count, 1.0)
            if below + count >= rank:
                break
            below += count
    return value
