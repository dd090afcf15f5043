"""What the scheduler's ``/metrics`` page tells: what is deployed, what was decided, and the counts of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..measures.families import Family, Sample, http_families, names_of, replica_families
from .events import Events
from .measures import Measures
from .status import SEVERITY, ServeStatus

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["controller_families"]

#: What there may be none of, which is told too: nothing can be compared with a series that is missing.
REPLICAS, PROXIES = ("starting", "ready", "draining"), ("starting", "ready", "draining", "restarting")
#: Before the names of sums over all processes: those of single ones are on their own pages.
CLUSTER = "dask_serve_cluster_"


def controller_families(status: Callable[[], ServeStatus], measures: Measures, events: Events) -> list[Family]:
    """Return the metrics of the whole service.

    Parameters
    ----------
    status : callable
        Returns what runs now.
    measures : Measures
        What was counted; it only grows, whatever restarts.
    events : Events
    """
    now = status()
    states, wanted, applications, in_flight, queued = [], [], [], [], []
    for name, application in now.applications.items():
        applications += [
            Sample({"application": name, "status": one}, int(one == application.status)) for one in SEVERITY
        ]
        for deployment, of in application.deployments.items():
            labels = {"application": name, "deployment": deployment}
            wanted.append(Sample(labels, of.target))
            in_flight.append(Sample(labels, of.in_flight))
            queued.append(Sample(labels, of.queued))
            counts = {**dict.fromkeys(REPLICAS, 0), **of.counts}
            states += [Sample({**labels, "state": state}, number) for state, number in counts.items()]
    proxies = dict.fromkeys(PROXIES, 0)
    for row in now.proxies:
        proxies[row.state] = proxies.get(row.state, 0) + 1
    decided = [Sample({"kind": kind}, number) for kind, number in sorted(events.counts.items())]
    return [
        Family(
            "dask_serve_application_status",
            "gauge",
            "1 for the status that an application has, 0 for others.",
            applications,
        ),
        Family("dask_serve_replicas", "gauge", "Replicas by state.", states),
        Family("dask_serve_replicas_wanted", "gauge", "Replicas that there should be.", wanted),
        Family("dask_serve_in_flight", "gauge", "Requests that replicas run, by their last heartbeats.", in_flight),
        Family("dask_serve_queued", "gauge", "Requests that wait for replicas, at handles of sessions too.", queued),
        Family(
            "dask_serve_proxies",
            "gauge",
            "Proxy processes by state.",
            [Sample({"state": state}, number) for state, number in proxies.items()],
        ),
        Family("dask_serve_events", "counter", "What the controller decided or found, by kind of event.", decided),
        *http_families(CLUSTER, measures.http()),
        *replica_families(CLUSTER, [(names_of(id), counts) for id, counts in sorted(measures.replicas().items())]),
    ]
