"""Which replicas should move, because their workers have too few threads for all of theirs and others have some free.

Replicas come to a worker while there is no better one: the first of a cluster that grows, the last that is left when
others end. When better ones come, they spread out again.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from .placement import WorkerView

__all__ = ["Sitting", "to_move"]


class Sitting(Struct, frozen=True):
    """A replica that may move."""

    id: str
    worker: str
    threads: int


def to_move(replicas: Sequence[Sitting], workers: Sequence[WorkerView]) -> list[str]:
    """Return the ids of the replicas to move, in this order, as far as others than these find no place.

    From each worker as few as will do, none from a worker that has threads for all it holds, and no more than the
    free threads of running workers can take.

    Parameters
    ----------
    replicas : sequence of Sitting
        Those that may move, the oldest first.
    workers : sequence of WorkerView
        All workers.
    """
    free = sum(max(w.nthreads - w.threads, 0) for w in workers if w.running)
    excess = {w.address: w.threads - w.nthreads for w in workers if w.running and w.threads > w.nthreads}
    found = []
    for replica in reversed(replicas):
        over = excess.get(replica.worker, 0)
        if over > 0 and 0 < replica.threads <= free:
            excess[replica.worker] = over - replica.threads
            free -= replica.threads
            found.append(replica.id)
    return found
