"""From a history to the columns of the plots over time."""

from __future__ import annotations

from collections.abc import Iterable
from math import nan

from ..measures.histogram import BOUNDS, quantile
from .history import Amounts, History

__all__ = ["COLUMNS", "QUANTILES", "STATUSES", "WINDOW", "columns", "status_class"]

#: Classes of HTTP answers, in the order in which they are drawn.
STATUSES = ("2xx", "3xx", "4xx", "499", "503", "5xx")
#: What replicas count, each per second.
OUTCOMES = ("answered", "failed", "refused", "cancelled", "wasted")
#: Which parts of the durations.
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
#: Histograms: HTTP answers, and at replicas before and in user code.
DURATIONS = ("took", "waited", "ran")
#: Seconds back of which durations and sizes of batches are told: a single second has too few requests.
WINDOW = 5
LEVELS = ("running", "queued", "ready", "wanted")

COLUMNS = (
    "time",
    *STATUSES,
    *OUTCOMES,
    *(f"{name}_{part}" for name in DURATIONS for part in QUANTILES),
    *LEVELS,
    "batches",
    "batch_size",
    "zero",
)


def status_class(status: int) -> str:
    """Return which of `STATUSES` an answer counts to."""
    return str(status) if status in (499, 503) else f"{min(max(status // 100, 2), 5)}xx"


def columns(history: History, deployment: str, numbers: Iterable[int], offset: float = 0.0) -> dict[str, list[float]]:
    """Return what happened in some seconds.

    Parameters
    ----------
    history : History
    deployment : str
        Its id, or `ALL`.
    numbers : iterable of int
        The seconds.
    offset : float
        Seconds to add to the times, which are milliseconds as bokeh wants them.
    """
    made: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for number in numbers:
        row = history.amounts(number, deployment)
        made["time"].append((number + 0.5 + offset) * 1000)
        _rates(made, row)
        recent = _recent(history, deployment, number)
        for name in DURATIONS:
            counts = [recent.get((name, bucket), 0.0) for bucket in range(len(BOUNDS) + 1)]
            for part, share in QUANTILES.items():
                seconds = quantile(counts, share)
                made[f"{name}_{part}"].append(nan if seconds is None else seconds * 1000)
        batches = recent.get(("batches", 0), 0.0)
        made["batches"].append(row.get(("batches", 0), 0.0))
        made["batch_size"].append(recent.get(("batched", 0), 0.0) / batches if batches else nan)
        made["zero"].append(0.0)
        levels = history.levels(number, deployment)
        for name in LEVELS:
            made[name].append(nan if levels is None else getattr(levels, name))
    return made


def _rates(made: dict[str, list[float]], row: Amounts) -> None:
    statuses = dict.fromkeys(STATUSES, 0.0)
    for (name, number), amount in row.items():
        if name == "statuses":
            statuses[status_class(number)] += amount
    for name, amount in statuses.items():
        made[name].append(amount)
    for name in OUTCOMES:
        made[name].append(row.get((name, 0), 0.0))


def _recent(history: History, deployment: str, number: int) -> Amounts:
    sums: Amounts = {}
    for second in range(number - WINDOW + 1, number + 1):
        for key, amount in history.amounts(second, deployment).items():
            sums[key] = sums.get(key, 0.0) + amount
    return sums
