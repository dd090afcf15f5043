"""What ``/-/metrics`` of a proxy tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..measures.counts import HttpCounts
from ..measures.families import Family, Sample, http_families, names_of
from .protocol import ProxyState

if TYPE_CHECKING:
    from ..routing.router import Router
    from .forward import Forwarder

__all__ = ["all_counts", "proxy_families"]

#: Of what routers tell: the kind of each, and what it is.
_ROUTERS = {
    "sent": ("counter", "Requests sent to replicas, those sent again included."),
    "answered": ("counter", "Requests that a replica answered with a result."),
    "failed": ("counter", "Requests that ended with an error."),
    "refused": ("counter", "Requests that were refused: they would have been late, or too many wait."),
    "lost": ("counter", "Requests whose replica was lost while it ran them."),
    "cancelled": ("counter", "Requests whose client went away."),
    "queued": ("gauge", "Requests that wait at the proxy."),
    "in_flight": ("gauge", "Requests that are at replicas."),
    "replicas": ("gauge", "Replicas that the proxy sends requests to."),
}


def all_counts(forwarder: Forwarder, state: ProxyState) -> dict[str, HttpCounts]:
    """Return what was answered by deployment, what connections refused by themselves included."""
    counts = dict(forwarder.counts)
    if state.refused:
        none = HttpCounts()
        none.merge(counts.get("") or HttpCounts())
        none.statuses.update(state.refused)
        counts[""] = none
    return counts


def proxy_families(forwarder: Forwarder, routers: Iterable[Router], state: ProxyState) -> list[Family]:
    """Return the metrics of one proxy process."""
    families = http_families("dask_serve_", all_counts(forwarder, state))
    connections = "Connections of clients that are open."
    families.append(Family("dask_serve_http_connections", "gauge", connections, [Sample({}, len(state.connections))]))
    routers = list(routers)
    waits = [Sample(names_of(router.id), router.waited) for router in routers if router.waited is not None]
    waited = "Seconds that requests waited at the proxy before they were sent to a replica."
    families.append(Family("dask_serve_queue_seconds", "histogram", waited, waits))
    stats = [(names_of(router.id), router.stats()) for router in routers]
    for name, (kind, text) in _ROUTERS.items():
        samples = [Sample(labels, stat[name]) for labels, stat in stats]
        families.append(Family(f"dask_serve_router_{name}", kind, text, samples))  # type: ignore[arg-type]
    return families
