"""The Dask dashboard of an embedded cluster, imported when somebody first asks for a page of it.

Importing it takes longer than all else that happens before the first worker registers, and most sessions never look.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from typing import Any

import tornado.web
from distributed import Scheduler

__all__ = ["has_bokeh", "load_on_demand"]


def has_bokeh() -> bool:
    """Whether there is something to show; Dask has a page that says so when there is not."""
    return importlib.util.find_spec("bokeh") is not None


def load_on_demand(scheduler: Scheduler) -> None:
    """Add the dashboard to the scheduler's HTTP server as soon as a page is asked for that only it has."""
    application = scheduler.http_application
    find_handler = application.find_handler
    loading = asyncio.Lock()

    async def load() -> None:
        async with loading:
            if "find_handler" in vars(application):
                # In a thread, so that the scheduler goes on meanwhile.
                dashboard = await asyncio.to_thread(importlib.import_module, "distributed.dashboard.scheduler")
                dashboard.connect(application, scheduler.http_server, scheduler, prefix="/")
                # The controller's pages wait for one to be added to.
                controller = scheduler.plugins.get("dask-serve")
                if controller is not None and hasattr(controller, "dashboard"):
                    controller.dashboard.attach()
                del application.find_handler

    def find_or_load(request: Any, **kwargs: Any) -> Any:
        handler = find_handler(request, **kwargs)
        unknown = handler is None or issubclass(handler.handler_class, tornado.web.ErrorHandler)
        # Dask's JupyterLab extension asks first for the list of pages, which is empty without the dashboard.
        if unknown or request.path == "/individual-plots.json":
            return application.get_handler_delegate(request, _LoadFirst, {"load": load})
        return handler

    application.find_handler = find_or_load


class _LoadFirst(tornado.web.RequestHandler):
    """Load the dashboard, then send the browser to the same address again."""

    def initialize(self, load: Any) -> None:
        self.load = load

    async def get(self) -> None:
        await self.load()
        self.redirect(self.request.uri)
