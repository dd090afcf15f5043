"""Where Prometheus finds the pages of a cluster: scheduler, workers and proxies, as its ``http_sd_configs`` reads them.

The format is that of https://prometheus.io/docs/prometheus/latest/http_sd/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import dask
from distributed.comm.addressing import get_address_host

if TYPE_CHECKING:
    from distributed import Scheduler

    from .status import ProxyStatus

__all__ = ["at_host", "targets"]

#: Hosts that stand for all of a machine's addresses, as links show them.
ANY = ("0.0.0.0", "::")  # noqa: S104


def targets(scheduler: Scheduler, prefix: str, proxies: Iterable[ProxyStatus], admin_host: str) -> list[Any]:
    """Return the pages.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Told with all workers that have a dashboard.
    prefix : str
        Of the paths of its dashboard.
    proxies : iterable of ProxyStatus
        Those without an admin port are left out: behind the public port there may
        be several, of which one answers.
    admin_host : str
        Where the admin ports of the scheduler's node listen.
    """
    tls = dask.config.get("distributed.scheduler.dashboard.tls", None) or {}
    scheme = "https" if tls.get("cert") else "http"
    host = get_address_host(scheduler.address)
    found = []
    if "dashboard" in scheduler.services:
        found.append(_target(host, scheduler.services["dashboard"].port, scheme, f"{prefix}/metrics", role="scheduler"))
    for worker in scheduler.workers.values():
        port = worker.services.get("dashboard")
        if port:
            found.append(_target(worker.host, port, scheme, "/metrics", role="worker", worker=str(worker.name)))
    for row in proxies:
        # One that drains has given the port to another.
        if row.admin and row.state != "draining":
            parts = urlsplit(row.admin if row.node else at_host(row.admin, admin_host, host))
            node = row.node or host
            found.append(_target(parts.hostname, parts.port, parts.scheme, "/-/metrics", role="proxy", node=node))
    return found


def at_host(url: str, listens: str, host: str) -> str:
    """Return ``url`` as others reach it, where it names this machine because all addresses are listened at."""
    if not url or listens not in ANY:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{_authority(host, parts.port)}"


def _target(host: str | None, port: int | None, scheme: str, path: str, **labels: str) -> dict[str, Any]:
    how = {"__scheme__": scheme, "__metrics_path__": path}
    return {"targets": [_authority(str(host), port)], "labels": {**how, **labels}}


def _authority(host: str, port: int | None) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
