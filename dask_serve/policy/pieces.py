"""How many rows of a partition one call brings.

Few, and calls cost more than rows; many, and requests of others wait for the thread that works on them. So pieces grow
from a few rows on until one takes about `TARGET` seconds. They grow on beyond that, up to `MOST` seconds, while twice
as many rows take hardly longer: then nearly all of the time is what a call costs however small it is.

Pure: the times are arguments.
"""

from __future__ import annotations

__all__ = ["PieceSize", "PieceSizes"]

#: Rows of the first piece.
FIRST = 64
#: Seconds that a piece should take, and those that it may take where that makes rows much cheaper.
TARGET = 0.005
MOST = 0.1
#: Twice the rows are much cheaper where they take less than this many times longer; and beside online requests, which
#: wait for every piece.
CHEAP = 1.5
CHEAP_BESIDE = 1.25
#: Answers that tell how long a piece takes. The first calls of a model are often slower.
ANSWERS = 3
#: Rows of the largest piece.
LARGEST = 1 << 20


class PieceSizes:
    """How many rows the next pieces have; one for each method, in each process that calls it."""

    __slots__ = ("_alone", "_beside", "_quiet")

    def __init__(self) -> None:
        self._quiet = False
        self._beside = PieceSize(CHEAP_BESIDE)
        self._alone = PieceSize(CHEAP)

    @property
    def rows(self) -> int:
        """Rows of the next piece."""
        return (self._alone if self._quiet else self._beside).rows

    def answered(self, rows: int, seconds: float, quiet: bool) -> None:
        """Note what a piece took, and whether its replica had no online requests lately."""
        self._quiet = quiet
        (self._alone if quiet else self._beside).answered(rows, seconds)


class PieceSize:
    """How many rows pieces have, where twice as many are much cheaper if they take less than ``cheap`` times longer.

    Attributes
    ----------
    rows : int
    """

    __slots__ = ("_answers", "_cheap", "_fastest", "_took", "rows")

    def __init__(self, cheap: float = CHEAP) -> None:
        self.rows = FIRST
        self._cheap = cheap
        #: What pieces of a size take, as far as is known.
        self._took: dict[int, float] = {}
        self._answers = 0
        self._fastest = 0.0

    def answered(self, rows: int, seconds: float) -> None:
        """Note that a piece of ``rows`` rows was answered after ``seconds``."""
        if rows != self.rows or seconds <= 0:
            # The rest of a partition, or of a size that is not used any more.
            return
        self._fastest = min(self._fastest, seconds) if self._answers else seconds
        self._answers += 1
        if self._answers < ANSWERS:
            return
        # Whatever disturbed some of them made them longer.
        took = self._took[rows] = self._fastest
        self._answers = 0
        half, double = self._took.get(rows // 2), self._took.get(2 * rows)
        if took < TARGET / 2 or (double is not None and double <= MOST and double < self._cheap * took):
            self.rows = min(2 * rows, LARGEST)
        elif half is None:
            if rows > 1 and took > TARGET:
                # It is tried, and found cheaper by the row or not.
                self.rows = rows // 2
            elif double is None and took < MOST / 2:
                self.rows = min(2 * rows, LARGEST)
        elif took < self._cheap * half:
            if double is None and took < MOST / 2:
                self.rows = min(2 * rows, LARGEST)
        elif took > TARGET:
            self.rows = rows // 2
