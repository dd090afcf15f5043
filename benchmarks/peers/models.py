"""The models that every system serves where time matters; standard library only, because peers run it too."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

__all__ = ["BATCHES", "CASE", "EACH", "FIXED", "SERVICE", "SLEEP", "SleepingModel", "seconds_of"]

#: A peer reads from this variable what it serves: nothing that takes time, one of `SleepingModel`, or batches.
CASE, SLEEP, BATCHES = "BENCHMARK_CASE", "sleep", "batches"
#: Seconds of one call of `SleepingModel`, and of a batch, by its size.
SERVICE, FIXED, EACH = 0.01, 0.02, 0.001


class SleepingModel:
    """A model that does one thing at a time, however many threads call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def predict(self, value: int) -> int:
        """Take 10 ms, and return what came."""
        with self._lock:
            time.sleep(SERVICE)
        return value


def seconds_of(batch: Sequence[object]) -> float:
    """Return what a batch takes."""
    return FIXED + EACH * len(batch)
