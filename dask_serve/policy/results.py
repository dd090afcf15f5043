"""How many calls from Python a replica may run at once, so that their results find room in its process's store.

Pure.
"""

from __future__ import annotations

__all__ = ["ResultSize", "most_at_once"]

#: Weight of the newest sample in the moving mean.
_SMOOTHING = 0.1


class ResultSize:
    """Moving mean of the bytes that a replica's call leaves in the store.

    Attributes
    ----------
    mean : float
        0.0 until one has left something there: most never do, and are never held back.
    """

    __slots__ = ("mean",)

    def __init__(self) -> None:
        self.mean = 0.0

    def sample(self, nbytes: int) -> None:
        """A call left ``nbytes`` in the store; 0 where its result was small."""
        self.mean = self.mean + _SMOOTHING * (nbytes - self.mean) if self.mean else float(nbytes)


def most_at_once(limit: int, held: int, mean: float, sharing: int) -> int | None:
    """Return how many calls that may leave a result in the store may run at once at one replica.

    While the store is within its limit that is one at least, however large results are: an empty store must take
    any. Beyond the limit it is none.

    Parameters
    ----------
    limit, held : int
        Bytes that the store may hold, and those it holds.
    mean : float
        Bytes that a call leaves there on average.
    sharing : int
        Replicas of the process that leave results there, this one included.

    Returns
    -------
    int or None
        None: as many as there are slots.
    """
    if not mean:
        return None
    if held > limit:
        return 0
    return max(1, int((limit - held) / (mean * sharing)))
