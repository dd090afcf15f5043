"""What is counted of a deployment's requests: at its replicas, and at the proxies."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from .histogram import BOUNDS, Histogram

__all__ = ["HttpCounts", "ReplicaCounts"]


class ReplicaCounts:
    """What one replica, or all replicas of a deployment in one process, did.

    Attributes
    ----------
    answered, failed : int
        Requests that ended with a result, and with an error.
    refused : int
        Requests that were turned away, as no slot was free; their routers send them again.
    cancelled : int
        Those of the ended that were cancelled after they had left the replica's waiting line.
    wasted : float
        Seconds that user code ran for requests which were cancelled meanwhile.
    waited : Histogram
        From a request's arrival until user code begins.
    ran : Histogram
        From then to its answer; of a streamed one to its end.
    batches : dict of str to Counter
        What batched methods had done, by name, when the replica ended. Not exported.
    """

    __slots__ = ("answered", "batches", "cancelled", "failed", "ran", "refused", "waited", "wasted")

    def __init__(self) -> None:
        self.answered = self.failed = self.refused = self.cancelled = 0
        self.wasted = 0.0
        self.waited = Histogram()
        self.ran = Histogram()
        self.batches: dict[str, Counter[str]] = {}

    def add(self, waited: float, ran: float) -> None:
        """Count how long a request waited and ran; what `Histogram.add` does, for two, at half of the price."""
        histogram = self.waited
        histogram.counts[bisect_left(BOUNDS, waited)] += 1
        histogram.seconds += waited
        histogram = self.ran
        histogram.counts[bisect_left(BOUNDS, ran)] += 1
        histogram.seconds += ran

    def merge(self, other: ReplicaCounts) -> None:
        """Count what another has counted."""
        self.answered += other.answered
        self.failed += other.failed
        self.refused += other.refused
        self.cancelled += other.cancelled
        self.wasted += other.wasted
        self.waited.merge(other.waited)
        self.ran.merge(other.ran)
        for method, batches in other.batches.items():
            # Its update would drop what has counted nothing yet.
            mine = self.batches.setdefault(method, Counter())
            for name, number in batches.items():
                mine[name] += number

    def export(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "answered": self.answered,
            "failed": self.failed,
            "refused": self.refused,
            "cancelled": self.cancelled,
            "wasted": self.wasted,
            "waited": self.waited.export(),
            "ran": self.ran.export(),
        }

    @classmethod
    def read(cls, exported: Mapping[str, Any]) -> ReplicaCounts:
        """Return what was exported."""
        counts = cls()
        for name in ("answered", "failed", "refused", "cancelled", "wasted"):
            setattr(counts, name, exported[name])
        counts.waited = Histogram(exported["waited"])
        counts.ran = Histogram(exported["ran"])
        return counts


class HttpCounts:
    """What one proxy, or all of them, answered for a deployment.

    Attributes
    ----------
    statuses : dict of int to int
        Answers by HTTP status; 499 where the client went away first.
    took : Histogram
        From the end of a request's head to the end of its answer.
    waited : Histogram
        At the proxy, until a replica was found; again for what was sent again.
    """

    __slots__ = ("statuses", "took", "waited")

    def __init__(self) -> None:
        # A Counter takes three times as long to add to.
        self.statuses: defaultdict[int, int] = defaultdict(int)
        self.took = Histogram()
        self.waited = Histogram()

    def add(self, status: int, seconds: float) -> None:
        """Count one answer; what `Histogram.add` does, without a call."""
        self.statuses[status] += 1
        histogram = self.took
        histogram.counts[bisect_left(BOUNDS, seconds)] += 1
        histogram.seconds += seconds

    def add_statuses(self, statuses: Mapping[int, int]) -> None:
        """Count answers of which nobody knows how long they took."""
        for status, number in statuses.items():
            self.statuses[status] += number

    def merge(self, other: HttpCounts) -> None:
        """Count what another has counted."""
        self.add_statuses(other.statuses)
        self.took.merge(other.took)
        self.waited.merge(other.waited)

    def since(self, earlier: HttpCounts) -> HttpCounts:
        """Return what was counted after ``earlier``, a state of the same counts."""
        counts = HttpCounts()
        news = {status: number - earlier.statuses.get(status, 0) for status, number in self.statuses.items()}
        counts.add_statuses({status: number for status, number in news.items() if number > 0})
        counts.took = self.took.since(earlier.took)
        counts.waited = self.waited.since(earlier.waited)
        return counts

    def export(self) -> dict[str, Any]:
        """Return plain data."""
        statuses = {str(status): count for status, count in self.statuses.items()}
        return {"statuses": statuses, "took": self.took.export(), "waited": self.waited.export()}

    @classmethod
    def read(cls, exported: Mapping[str, Any]) -> HttpCounts:
        """Return what was exported."""
        counts = cls()
        counts.add_statuses({int(status): count for status, count in exported["statuses"].items()})
        counts.took = Histogram(exported["took"])
        # Proxies of the version before do not tell it.
        counts.waited = Histogram(exported.get("waited", ()))
        return counts
