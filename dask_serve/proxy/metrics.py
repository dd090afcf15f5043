"""What ``/-/metrics`` of a proxy tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..measures.counts import HttpCounts
from ..measures.families import Family, Sample, http_families, router_families
from .protocol import ProxyState

if TYPE_CHECKING:
    from .forward import Forwarder

__all__ = ["all_counts", "proxy_families"]


def all_counts(forwarder: Forwarder, state: ProxyState) -> dict[str, HttpCounts]:
    """Return what was answered by deployment, what connections refused by themselves included."""
    for router in forwarder.routers():
        if router.waited is not None:
            forwarder.counts[router.id].waited = router.waited
    counts = dict(forwarder.counts)
    if state.refused:
        none = HttpCounts()
        none.merge(counts.get("") or HttpCounts())
        none.add_statuses(state.refused)
        counts[""] = none
    return counts


def proxy_families(forwarder: Forwarder, state: ProxyState) -> list[Family]:
    """Return the metrics of one proxy process."""
    families = http_families("dask_serve_", all_counts(forwarder, state))
    connections = "Connections of clients that are open."
    families.append(Family("dask_serve_http_connections", "gauge", connections, [Sample({}, len(state.connections))]))
    return families + router_families((router.id, router.stats()) for router in forwarder.routers())
