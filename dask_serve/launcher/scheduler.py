"""Start the scheduler of an embedded cluster. Importing this module imports distributed."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Callable
from typing import Any

import dask
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.preloading import Preload
from distributed.utils import format_dashboard_link

from .dashboard import has_bokeh, load_on_demand

__all__ = ["start_scheduler"]


class _Arrivals(SchedulerPlugin):
    """Report workers as they register."""

    name = "dask-serve-arrivals"

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Tell the session that one more worker is there."""
        name = str(scheduler.workers[worker].name)
        self._report(event="worker", worker=name, workers=len(scheduler.workers))


async def start_scheduler(dashboard_address: str | None, preload: str, report: Callable[..., None]) -> Scheduler:
    """Start a scheduler on 127.0.0.1 with the controller in it, and report its address.

    Parameters
    ----------
    dashboard_address : str or None
        ``host:port`` of the dashboard; any free port when this one is busy; None for no dashboard.
    preload : str
        Module whose ``dask_setup`` adds the controller. It is run here and not given to Dask as a preload,
        because Dask logs the errors of preloads and starts all the same.
    report : callable
        Called with the fields of an event.
    """
    importlib.import_module(preload)
    scheduler = Scheduler(
        host="127.0.0.1",
        port=0,
        dashboard=dashboard_address is not None and not has_bokeh(),
        dashboard_address=_free_address(dashboard_address or "127.0.0.1:0"),
    )
    if dashboard_address is not None and has_bokeh():
        load_on_demand(scheduler)
    scheduler.add_plugin(_Arrivals(report))
    # A worker that ends is started again by the host, as a nanny would do.
    scheduler.serve_keeps_workers = True
    if preload not in dask.config.get("distributed.scheduler.preload"):
        # Proxies start when the first application comes, where and how many is known then.
        # The session that it belongs to does not outlive it, so there is nothing to save.
        await Preload(scheduler, preload, ["--no-serve-http", "--serve-state", "none"], None).start()
    await scheduler
    report(event="scheduler", address=scheduler.address, dashboard=_dashboard_link(scheduler, dashboard_address))
    return scheduler


def _free_address(address: str) -> str:
    """Return ``address``, with port 0 when its port is taken."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ValueError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "0.0.0.0", int(port)))  # noqa: S104
        except OSError:
            return f"{host}:0"
    return address


def _dashboard_link(scheduler: Scheduler, dashboard_address: str | None) -> str | None:
    if dashboard_address is None:
        return None
    server: Any = scheduler.services["dashboard"]
    with contextlib.suppress(KeyError):  # a template of the user's with a variable that is not set
        return str(format_dashboard_link("127.0.0.1", server.port))
    return None
