"""What a worker's ``/metrics`` page tells of its replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask

from ..measures.counts import ReplicaCounts
from ..measures.families import Family, Sample, names_of, replica_families
from ..measures.sources import add_source
from ..routing.callers import caller_families
from .process import ServeProcess

__all__ = ["tell_metrics"]

#: What batched methods count: its name, and what it is.
_BATCHES = {
    "batches": ("batches", "Batches that batched methods have run."),
    "calls": ("batch_calls", "Calls in those batches."),
    "reruns": ("batch_reruns", "Parts of failed batches that were run again."),
}


def tell_metrics() -> None:
    """Have this process's ``/metrics`` tell of replicas, where it has that page."""
    add_source("dask-serve-replicas", worker_families)


def worker_families() -> list[Family]:
    """Return the metrics of the replicas of this process.

    With ``serve.metrics.replica-label: false`` in Dask's configuration replicas of one deployment are one series.
    """
    apart = bool(dask.config.get("serve.metrics.replica-label", True))
    rows = []
    for _, ledger in ServeProcess.ledgers():
        if apart:
            rows += [
                ({**names_of(deployment), "replica": replica}, counts)
                for deployment, replica, counts in ledger.by_replica()
            ]
        else:
            rows += [(names_of(deployment), counts) for deployment, counts in ledger.by_deployment().items()]
    levels: dict[str, list[Sample]] = {"running": [], "waiting": [], "models": []}
    for unit in (unit for units in ServeProcess.all_units() for unit in units if unit.core is not None):
        labels = {**names_of(unit.id.rpartition("/")[0]), **({"replica": unit.id} if apart else {})}
        assert unit.core is not None
        levels["running"].append(Sample(labels, unit.core.admission.running))
        levels["models"].append(Sample(labels, len(unit.user.host.loaded()[0])))
        living = ReplicaCounts()
        living.batches = unit.user.host.batch_totals()
        rows.append((labels, living))
        for method, counts in unit.user.host.batch_counts().items():
            levels["waiting"].append(Sample({**labels, "method": method}, counts["waiting"]))
    rows = _added_up(rows)
    running = "Requests that replicas run, those included that wait there for a slot."
    waiting = "Calls that wait for a batch."
    return [
        *replica_families("dask_serve_", rows),
        *_batch_families(rows),
        Family("dask_serve_replica_running", "gauge", running, _summed(levels["running"])),
        Family("dask_serve_replica_models", "gauge", "Multiplexed models that are loaded.", _summed(levels["models"])),
        Family("dask_serve_batch_waiting", "gauge", waiting, _summed(levels["waiting"])),
        *caller_families(),
    ]


def _batch_families(rows: list[tuple[dict[str, str], ReplicaCounts]]) -> Iterator[Family]:
    for name, (told, text) in _BATCHES.items():
        samples = [
            Sample({**labels, "method": method}, batches[name])
            for labels, counts in rows
            for method, batches in counts.batches.items()
        ]
        yield Family(f"dask_serve_{told}", "counter", text, samples)


def _added_up(rows: list[tuple[dict[str, str], ReplicaCounts]]) -> list[tuple[dict[str, str], ReplicaCounts]]:
    """Add up the counts of rows with the same labels: an in-process cluster has several workers in one process."""
    sums: dict[tuple[str, ...], tuple[dict[str, str], ReplicaCounts]] = {}
    for labels, counts in rows:
        _, total = sums.setdefault(tuple(labels.values()), (labels, ReplicaCounts()))
        total.merge(counts)
    return list(sums.values())


def _summed(samples: list[Sample]) -> list[Sample]:
    sums: dict[tuple[str, ...], tuple[Any, float]] = {}
    for labels, value in samples:
        assert isinstance(value, (int, float))
        key = tuple(labels.values())
        sums[key] = labels, sums.get(key, (labels, 0.0))[1] + value
    return [Sample(labels, value) for labels, value in sums.values()]
