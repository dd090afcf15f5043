"""Puts the page into the dashboard of a scheduler, whether or not that runs already; without bokeh nothing happens."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .sampler import Sampler
from .source import Source

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Dashboard"]

logger = logging.getLogger("dask_serve.dashboard")


class Dashboard:
    """The controller's part of Dask's dashboard.

    Parameters
    ----------
    scheduler : Scheduler
        Its HTTP server gets the pages.
    source : Source
        The controller.
    """

    def __init__(self, scheduler: Scheduler, source: Source) -> None:
        self._scheduler = scheduler
        self._sampler: Sampler | None = None
        # Where nobody can ever look, nothing is remembered.
        if importlib.util.find_spec("bokeh") is not None:
            self._sampler = Sampler(source)

    def start(self) -> None:
        """Remember what happens from now on, and add the pages if there is a dashboard already."""
        if self._sampler is not None:
            self._sampler.start()
            self.attach()

    def attach(self) -> None:
        """Add the pages to the dashboard of the scheduler; to be called again when it gets one later."""
        # Only who has imported bokeh has a dashboard.
        dashboard = next(filter(_is_bokeh, self._scheduler.http_application.applications), None)
        if self._sampler is None or dashboard is None:
            return
        try:
            from .pages import connect

            connect(self._scheduler, self._sampler, dashboard.prefix)
        except Exception:
            # Whatever this bokeh cannot do, the service can do without.
            logger.exception("Dask's dashboard gets no page of dask_serve")

    def proxy_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """A proxy told what it has counted."""
        if self._sampler is not None:
            self._sampler.proxy_told(source, counts)

    def replicas_told(self, source: str, counts: Mapping[str, Any]) -> None:
        """A worker that leaves told what its replicas have counted."""
        if self._sampler is not None:
            self._sampler.replicas_told(source, counts)

    def close(self) -> None:
        """Remember nothing more; open pages say that the controller has ended."""
        if self._sampler is not None:
            self._sampler.close()


def _is_bokeh(application: Any) -> bool:
    return hasattr(application, "app_paths") and hasattr(application, "prefix")
