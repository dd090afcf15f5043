"""The models that every system serves where time matters; standard library only, because peers run it too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["BATCHES", "CASE", "EACH", "FIXED", "SERVICE", "SLEEP", "SleepingModel", "seconds_of"]

#: A peer reads from this variable what it serves: nothing that takes time, one of `SleepingModel`, or batches.
CASE, SLEEP, BATCHES = "BENCHMARK_CASE", "sleep", "batches"
#: Seconds of one call of `SleepingModel`, and of a batch, by its size.
SERVICE, FIXED, EACH = 0.01, 0.02, 0.001


class SleepingModel:
    """A model that does one thing at a time, first come, first served, however many threads call it."""

    def __init__(self) -> None:
        # A lock would be taken by any of those that wait.
        self._device = ThreadPoolExecutor(1)

    def predict(self, value: int) -> int:
        """Take 10 ms, and return what came."""
        return self._device.submit(self._run, value).result()

    @staticmethod
    def _run(value: int) -> int:
        time.sleep(SERVICE)
        return value


def seconds_of(batch: Sequence[object]) -> float:
    """Return what a batch takes."""
    return FIXED + EACH * len(batch)
