"""What the replicas of one worker have counted, those included that are gone."""

from __future__ import annotations

from .counts import ReplicaCounts

__all__ = ["ENDED", "OLDER", "Ledger"]

#: Replicas that have ended of which a worker still tells what each one counted; of older ones it tells the sum.
ENDED = 200
#: Stands for all of those.
OLDER = "older"


class Ledger:
    """Counts by deployment and replica, which only grow. Any thread may read."""

    def __init__(self) -> None:
        self._replicas: dict[str, tuple[str, ReplicaCounts]] = {}
        self._ended: dict[str, None] = {}
        self._older: dict[str, ReplicaCounts] = {}

    def open(self, deployment: str, replica: str) -> ReplicaCounts:
        """Return the counts of a new replica."""
        counts = ReplicaCounts()
        self._replicas[replica] = deployment, counts
        return counts

    def close(self, replica: str) -> None:
        """A replica has ended; what it counted stays."""
        if replica in self._replicas:
            self._ended[replica] = None
        while len(self._ended) > ENDED:
            oldest = next(iter(self._ended))
            del self._ended[oldest]
            deployment, counts = self._replicas[oldest]
            older = self._older.get(deployment) or ReplicaCounts()
            older.merge(counts)
            # Who reads in between finds it in one of both places at least.
            self._older[deployment] = older
            del self._replicas[oldest]

    def by_replica(self) -> list[tuple[str, str, ReplicaCounts]]:
        """Return deployment, replica and counts of each."""
        rows = [(deployment, replica, counts) for replica, (deployment, counts) in list(self._replicas.items())]
        return rows + [(deployment, OLDER, counts) for deployment, counts in list(self._older.items())]

    def by_deployment(self) -> dict[str, ReplicaCounts]:
        """Return the sums."""
        sums: dict[str, ReplicaCounts] = {}
        for deployment, _, counts in self.by_replica():
            if deployment not in sums:
                sums[deployment] = ReplicaCounts()
            sums[deployment].merge(counts)
        return sums
