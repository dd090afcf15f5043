"""The pages: all of it at ``/serve``, and each plot alone for JupyterLab. Imported where Dask has its dashboard."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bokeh.core.properties import without_property_validation
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Select
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from distributed.http.scheduler.info import IndividualPlots
from tornado.ioloop import IOLoop

from .figures import Times
from .history import ALL, KEPT
from .panels import PANELS, Batches, Decisions, Headline, Models, Panel, Proxies, Replicas, View, Workers
from .sampler import OPEN, Sampler
from .series import COLUMNS, columns

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["INDIVIDUAL", "connect"]

#: Plots over time that have a page of their own.
TIMES = {
    "http": Times.statuses,
    "latency": Times.latency,
    "requests": Times.outcomes,
    "user-code": Times.service,
    "wait": Times.waiting,
    "load": Times.levels,
    "replica-count": Times.replicas,
    "refusals": Times.refused,
    "wasted": Times.wasted,
    "batches": Times.batch_sizes,
}
#: Paths of the pages of single plots.
INDIVIDUAL = [f"/individual-serve-{name}" for name in (*TIMES, *PANELS)]

_ALL = "all deployments"
#: Seconds that the plots show at least.
SHORTEST = 60


class Page:
    """What one browser tab shows.

    Parameters
    ----------
    sampler : Sampler
    deployment : str
        Which one; `ALL` by default.
    """

    def __init__(self, sampler: Sampler, deployment: str = ALL) -> None:
        self._sampler = sampler
        self.deployment = deployment
        self.source = ColumnDataSource({name: [] for name in COLUMNS})
        self.times = Times(self.source)
        self.panels: list[Panel] = []
        self.select: Select | None = None
        self._shown = 0

    def choose(self) -> Select:
        """Return a selector of the deployment."""
        self.select = Select(title="", value=self.deployment, options=[(ALL, _ALL)], width=320)
        self.select.on_change("value", self._on_chosen)
        return self.select

    def add(self, panel: Panel) -> Any:
        """Take up a panel, and return what is drawn of it."""
        self.panels.append(panel)
        return panel.root

    def _on_chosen(self, attribute: str, old: str, new: str) -> None:
        self.deployment = new
        self._shown = 0
        self.update()

    @without_property_validation
    def update(self) -> None:
        """Show what is so now."""
        sampler = self._sampler
        snapshot = sampler.look()
        self._offer(snapshot.deployments)
        # Told by the scheduler's clock and time zone, which bokeh knows nothing of.
        offset = time.localtime().tm_gmtoff
        now = sampler.now()
        self._extend(offset)
        end = (sampler.complete + 1 + offset) * 1000
        if self.times.range.end != end:
            begin = max(end - KEPT * 1000, (sampler.history.oldest + offset) * 1000)
            self.times.range.update(start=min(begin, end - SHORTEST * 1000), end=end)
        last = {name: values[-1] for name, values in self.source.data.items() if len(values)}
        events = sampler.source.events()
        lines = {event.kind: sampler.source.line_of(event.kind) for event in events}
        deployment = self.deployment if self.deployment in snapshot.levels else ALL
        view = View(snapshot, deployment, now, events, lines, last, offset)
        for panel in self.panels:
            panel.update(view)

    def _offer(self, deployments: list[str]) -> None:
        if self.select is not None:
            # What is no longer deployed stays as long as it is looked at.
            names = sorted({*deployments, self.deployment} - {ALL})
            options = [(ALL, _ALL), *((name, name) for name in names)]
            if options != self.select.options:
                self.select.options = options

    def _extend(self, offset: float) -> None:
        """Take over the seconds that are complete since the last time."""
        history, until = self._sampler.history, self._sampler.complete
        first = max(self._shown + 1, until - KEPT + 1, history.oldest)
        if first > until and self._shown:
            return
        new = columns(history, self.deployment, range(first, until + 1), offset)
        if self._shown:
            self.source.stream(new, rollover=KEPT)
        else:
            self.source.data = new
        self._shown = until
        self.times.tell_empty()


def _serve_doc(sampler: Sampler, scheduler: Scheduler, extra: dict[str, Any], doc: Any) -> None:
    page = Page(sampler)
    times = page.times
    wide = {"sizing_mode": "stretch_width"}
    root = column(
        page.choose(),
        page.add(Headline()),
        row(times.statuses(), times.latency(), times.levels(), **wide),
        row(times.outcomes(), times.service(), times.waiting(), **wide),
        row(page.add(Workers()), times.replicas(), page.add(Proxies()), **wide),
        page.add(Decisions(times.range)),
        row(times.refused(), times.wasted(), times.batch_sizes(), **wide),
        page.add(Replicas()),
        row(page.add(Batches()), page.add(Models()), **wide),
        **wide,
    )
    doc.title = "Dask: Serve"
    _show(page, root, doc)
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)


def _plot_doc(
    make: Callable[[Page], Any], sampler: Sampler, scheduler: Scheduler, extra: dict[str, Any], doc: Any
) -> None:
    request = doc.session_context.request if doc.session_context is not None else None
    asked = (request.arguments if request is not None else {}).get("deployment", [b""])[0].decode()
    page = Page(sampler, asked or ALL)
    root = make(page)
    root.sizing_mode = "stretch_both"
    doc.title = "Dask: Serve"
    _show(page, root, doc)


def _show(page: Page, root: Any, doc: Any) -> None:
    page.update()
    doc.add_root(root)
    doc.theme = BOKEH_THEME
    add_periodic_callback(doc, page, int(OPEN * 1000))


def _time_plot(method: Callable[[Times], Any], page: Page) -> Any:
    return method(page.times)


def _panel(kind: type[Any], page: Page) -> Any:
    return page.add(kind())


def connect(scheduler: Scheduler, sampler: Sampler, prefix: str) -> None:
    """Add the pages to a scheduler that has Dask's dashboard under ``prefix``; those of an earlier controller go."""
    http = scheduler.http_application
    for application in [app for app in http.applications if "/serve" in getattr(app, "app_paths", ())]:
        http.applications.remove(application)
        application.stop()
    docs: dict[str, Any] = {"/serve": functools.partial(_serve_doc, sampler)}
    for name, method in TIMES.items():
        docs[f"/individual-serve-{name}"] = functools.partial(_plot_doc, functools.partial(_time_plot, method), sampler)
    for name, kind in PANELS.items():
        docs[f"/individual-serve-{name}"] = functools.partial(_plot_doc, functools.partial(_panel, kind), sampler)
    # The same for all pages of a scheduler, also for those that are open: its navigation is made from it.
    variables = template_variables(scheduler)
    pages, plots = variables["pages"], variables["plots"]
    if "serve" not in pages:
        pages.insert(pages.index("info") if "info" in pages else len(pages), "serve")
        plots += [{"url": path.strip("/"), "name": _named(path)} for path in INDIVIDUAL]
        plots.sort(key=lambda plot: plot["name"])
        http.add_handlers(".*", [(f"{prefix}/individual-plots.json", _Individual, {"dask_server": scheduler})])
    application = BokehApplication(docs, scheduler, prefix=prefix.strip("/"), template_variables=variables)
    http.add_application(application)
    application.initialize(IOLoop.current())
    application.start()


def _named(path: str) -> str:
    return path.strip("/").removeprefix("individual-").replace("-", " ").title().replace("Http", "HTTP")


class _Individual(IndividualPlots):
    """Dask's list of single plots, and ours: JupyterLab's extension asks for it."""

    def write(self, chunk: Any) -> None:
        if isinstance(chunk, dict) and chunk:
            chunk = {**chunk, **{f"Individual {_named(path)}": path for path in INDIVIDUAL}}
        super().write(chunk)
