"""What a worker's ``/metrics`` page tells of its replicas."""

from __future__ import annotations

from typing import Any

import dask

from ..measures.counts import ReplicaCounts
from ..measures.families import Family, Sample, names_of, replica_families
from ..measures.sources import add_source
from .process import ServeProcess

__all__ = ["tell_metrics"]

#: Of a batcher's counts: the kind of each, and what it is.
_BATCHES = {
    "batches": ("counter", "Batches that batched methods have run."),
    "calls": ("counter", "Calls in those batches."),
    "reruns": ("counter", "Parts of failed batches that were run again."),
    "waiting": ("gauge", "Calls that wait for a batch."),
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
    families = replica_families("dask_serve_", _added_up(rows))
    units = [unit for units in ServeProcess.all_units() for unit in units if unit.core is not None]
    running = "Requests that replicas run, those included that wait there for a slot."
    levels: dict[str, list[Sample]] = {"running": [], **{name: [] for name in _BATCHES}}
    models = []
    for unit in units:
        labels = {**names_of(unit.id.rpartition("/")[0]), **({"replica": unit.id} if apart else {})}
        assert unit.core is not None
        levels["running"].append(Sample(labels, unit.core.admission.running))
        for method, counts in unit.user.host.batch_counts().items():
            for name in _BATCHES:
                levels[name].append(Sample({**labels, "method": method}, counts[name]))
        models.append(Sample(labels, len(unit.user.host.loaded()[0])))
    families.append(Family("dask_serve_running", "gauge", running, _summed(levels["running"])))
    families.append(Family("dask_serve_models", "gauge", "Multiplexed models that are loaded.", _summed(models)))
    for name, (kind, text) in _BATCHES.items():
        families.append(Family(f"dask_serve_batch_{name}", kind, text, _summed(levels[name])))  # type: ignore[arg-type]
    return families


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
