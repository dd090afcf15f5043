"""Metrics as data: families of samples, and the families that counts of requests make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .counts import HttpCounts, ReplicaCounts
from .histogram import BOUNDS, Histogram

__all__ = ["Family", "Sample", "http_families", "names_of", "replica_families", "router_families"]

Labels = Mapping[str, str]


class Sample(NamedTuple):
    """One series of a family, now.

    Attributes
    ----------
    labels : mapping of str to str
    value : float or Histogram
        A histogram in families of that kind.
    """

    labels: Labels
    value: float | Histogram


class Family(NamedTuple):
    """Samples of one name.

    Attributes
    ----------
    name : str
        Without Prometheus's suffixes (``_total``, ``_bucket``).
    kind : {"counter", "gauge", "histogram"}
    help : str
        What it is, with its unit.
    samples : sequence of Sample
    bounds : sequence of float
        Upper bounds of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]
    bounds: Sequence[float] = BOUNDS


def names_of(deployment: str) -> dict[str, str]:
    """Return the labels of ``application/deployment``; both are empty for what belongs to none."""
    application, _, name = deployment.rpartition("/")
    return {"application": application, "deployment": name}


def http_families(prefix: str, counts: Mapping[str, HttpCounts]) -> list[Family]:
    """Return what was answered over HTTP, by deployment."""
    answers, times, waits = [], [], []
    for deployment, of in sorted(counts.items()):
        labels = names_of(deployment)
        answers += [Sample({**labels, "status": str(status)}, n) for status, n in sorted(of.statuses.items())]
        times.append(Sample(labels, of.took))
        if deployment:
            waits.append(Sample(labels, of.waited))
    status = "HTTP requests answered, by status; 499: its client went away first. Without application: routed to none."
    took = "Seconds from the end of a request's head to the end of its answer."
    waited = "Seconds that requests waited at proxies before they were sent to a replica, each time that they were."
    return [
        Family(f"{prefix}http_requests", "counter", status, answers),
        Family(f"{prefix}http_request_seconds", "histogram", took, times),
        Family(f"{prefix}http_wait_seconds", "histogram", waited, waits),
    ]


def replica_families(prefix: str, rows: Iterable[tuple[Labels, ReplicaCounts]]) -> list[Family]:
    """Return what replicas did, each row with its labels."""
    rows = list(rows)
    ended = [
        Sample({**labels, "outcome": outcome}, getattr(counts, outcome))
        for labels, counts in rows
        for outcome in ("answered", "failed", "refused")
    ]
    requests = "Requests at replicas, by outcome; refused ones found no free slot, and their routers send them again."
    cancelled = "Requests that were cancelled while replicas ran them; they are among the answered and failed too."
    wasted = "Seconds that replicas ran requests which nobody wanted any more."
    waited = "Seconds from a request's arrival at its replica until user code began."
    ran = "Seconds from there to its answer, of a streamed one to its end."
    return [
        Family(f"{prefix}replica_requests", "counter", requests, ended),
        Family(f"{prefix}replica_cancelled", "counter", cancelled, [Sample(labels, c.cancelled) for labels, c in rows]),
        Family(f"{prefix}replica_wasted_seconds", "counter", wasted, [Sample(labels, c.wasted) for labels, c in rows]),
        Family(f"{prefix}replica_wait_seconds", "histogram", waited, [Sample(labels, c.waited) for labels, c in rows]),
        Family(f"{prefix}replica_run_seconds", "histogram", ran, [Sample(labels, c.ran) for labels, c in rows]),
    ]


#: Of what routers count beside outcomes: the kind of each, and what it is.
_ROUTERS: dict[str, tuple[Literal["counter", "gauge"], str]] = {
    "sent": ("counter", "Requests sent to replicas, each time that they were."),
    "lost": ("counter", "Requests that failed because their replica was lost while it ran them."),
    "queued": ("gauge", "Requests that wait at routers."),
    "in_flight": ("gauge", "Requests of routers that are at replicas."),
    "replicas": ("gauge", "Replicas that routers send requests to."),
}


def router_families(stats: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Family]:
    """Return what routers did, each with its deployment and what `Router.stats` returns."""
    rows = [(names_of(deployment), of) for deployment, of in stats]
    requests = (
        "Requests that routers took, by outcome; refused ones would have been late, or too many waited; of cancelled "
        "ones the caller went away."
    )
    ended = [
        Sample({**labels, "outcome": outcome}, of[outcome])
        for labels, of in rows
        for outcome in ("answered", "failed", "refused", "cancelled")
    ]
    families = [Family("dask_serve_router_requests", "counter", requests, ended)]
    for name, (kind, text) in _ROUTERS.items():
        samples = [Sample(labels, of[name]) for labels, of in rows]
        families.append(Family(f"dask_serve_router_{name}", kind, text, samples))
    return families
