"""What is so now: replicas by worker, models, proxies, decisions, and the table of replicas."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    DataTable,
    DatetimeTickFormatter,
    Div,
    FactorRange,
    HoverTool,
    HTMLTemplateFormatter,
    NumberFormatter,
    OpenURL,
    Range1d,
    TableColumn,
    TapTool,
)
from distributed.dashboard.utils import update

from .figures import BLUE, COLORS, GREEN, GREY, HEIGHT, ORANGE, PURPLE, RED, new_figure
from .history import ALL
from .snapshot import STATES, Snapshot, by_worker

if TYPE_CHECKING:
    from ..controller.events import Event

__all__ = ["PANELS", "Batches", "Decisions", "Headline", "Models", "Panel", "Proxies", "Replicas", "View", "Workers"]

#: Workers up to which each has its name below the plot.
NAMED = 40
#: Models of which the plot tells.
MODELS = 15
#: Pixels of the table of replicas, at most.
TALLEST = 420


class View(NamedTuple):
    """What a page shows at one moment.

    Attributes
    ----------
    snapshot : Snapshot
    deployment : str
        The one that is selected, or `ALL`.
    now : float
        Seconds since 1970, as in the history.
    events : list of Event
        The decisions that are remembered.
    lines : dict
        Line of the time line by kind of decision.
    last : dict
        The latest value of each column of the series; empty while there is none.
    offset : float
        Seconds that local time is ahead of UTC.
    """

    snapshot: Snapshot
    deployment: str
    now: float
    events: Sequence[Event]
    lines: Mapping[str, str]
    last: Mapping[str, float]
    offset: float

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of the snapshot that belong to the selected deployment."""
        return self.snapshot.of(getattr(self.snapshot, name), self.deployment)


class Panel(Protocol):
    """A part of a page."""

    root: Any

    def update(self, view: View) -> None:
        """Show what is so now."""


class Headline:
    """Numbers of this moment, and what is wrong or missing and what to do about it."""

    def __init__(self) -> None:
        self.root = Div(sizing_mode="stretch_width", name="serve-headline")

    def update(self, view: View) -> None:
        snapshot, last = view.snapshot, view.last
        levels = snapshot.levels.values() if view.deployment == ALL else [snapshot.levels[view.deployment]]
        ready, wanted = sum(one.ready for one in levels), sum(one.wanted for one in levels)
        answers = sum(last.get(name, 0.0) for name in ("2xx", "3xx", "4xx", "499", "503", "5xx"))
        cells = [
            ("HTTP answers/s", f"{answers:,.0f}"),
            ("p99", _milliseconds(last.get("took_p99"))),
            ("errors/s", f"{last.get('5xx', 0.0):,.0f}"),
            ("refused/s", f"{last.get('503', 0.0):,.0f}"),
            ("requests at replicas/s", f"{last.get('answered', 0.0) + last.get('failed', 0.0):,.0f}"),
            ("in flight", f"{sum(one.running for one in levels):,.0f}"),
            ("queued", f"{sum(one.queued for one in levels):,.0f}"),
            ("replicas ready", f"{ready:.0f} of {wanted:.0f}"),
            ("proxies", str(sum(row["state"] == "ready" for row in snapshot.proxies))),
        ]
        numbers = "".join(
            f'<span style="margin-right:28px"><b style="font-size:18px">{value}</b> <span style="{_PALE}">{name}</span>'
            "</span>"
            for name, value in cells
        )
        trouble = "".join(f'<div style="{_TROUBLE}">⚠ {_lines(text)}</div>' for text in snapshot.trouble)
        url = f'<span style="{_PALE}">HTTP at {escape(snapshot.url)}</span>' if snapshot.url else ""
        text = f'<div style="font-size:13px;line-height:1.7">{numbers}{url}{trouble}</div>'
        if text != self.root.text:
            self.root.text = text


_PALE = "color:#555"
_TROUBLE = f"border-left:4px solid {ORANGE};padding:2px 8px;margin:4px 0;background:#fdf6e7"


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _milliseconds(value: float | None) -> str:
    # Not a number: there were no requests.
    return f"{value:,.1f} ms" if value is not None and value == value else "-"  # noqa: PLR0124


class Workers:
    """Replicas by worker and state; a click leads to Dask's page of the worker."""

    def __init__(self) -> None:
        self.source = ColumnDataSource({name: [] for name in ("worker", "escaped", "address", *STATES)})
        self.root = new_figure("", x_range=FactorRange())
        self.root.vbar_stack(
            list(STATES),
            x="worker",
            width=0.8,
            line_color=None,
            color=[COLORS[state] for state in STATES],
            source=self.source,
            legend_label=list(STATES),
        )
        self.root.y_range.start = 0
        self.root.xgrid.visible = False
        self.root.yaxis.ticker.min_interval = 1
        _legend_above(self.root)
        tooltips = [("worker", "@worker @address"), *((state, f"@{state}") for state in STATES)]
        self.root.add_tools(HoverTool(tooltips=tooltips, point_policy="follow_mouse"))
        self.root.add_tools(TapTool(callback=OpenURL(url="./info/worker/@escaped.html")))

    def update(self, view: View) -> None:
        workers = by_worker(view.rows("replicas"))
        names = _unique([row["worker"] for row in workers.values()], list(workers))
        _titled(self.root, "Replicas by worker (click: the worker's page)", names, "none yet")
        data: dict[str, list[Any]] = {"worker": names, "address": list(workers)}
        for name in ("escaped", *STATES):
            data[name] = [row[name] for row in workers.values()]
        if names != self.root.x_range.factors:
            self.root.x_range.factors = names
            self.root.xaxis.visible = len(names) <= NAMED
            self.root.xaxis.major_label_orientation = 0.9 if max(map(len, names), default=0) > 4 else "horizontal"
        update(self.source, data)


def _unique(names: list[str], addresses: list[str]) -> list[str]:
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} {at}" for name, at in zip(names, addresses, strict=True)]


class Batches:
    """Sizes of batches by method, since the replicas began."""

    def __init__(self) -> None:
        self.source = ColumnDataSource({name: [] for name in ("method", "mean", "largest", "calls", "waiting")})
        self.root = new_figure("", y_range=FactorRange())
        self.root.hbar(
            "method",
            right="largest",
            height=0.8,
            source=self.source,
            color=GREY,
            fill_alpha=0.4,
            legend_label="largest",
        )
        self.root.hbar("method", right="mean", height=0.5, source=self.source, color=BLUE, legend_label="mean")
        self.root.x_range.start = 0
        self.root.ygrid.visible = False
        _legend_above(self.root)
        told = [
            ("", "@method"),
            ("mean", "@mean{0.[0]}"),
            ("largest", "@largest"),
            ("calls", "@calls"),
            ("wait", "@waiting"),
        ]
        self.root.add_tools(HoverTool(tooltips=told))

    def update(self, view: View) -> None:
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for row in view.rows("batches"):
            of = sums[f"{row['deployment']}.{row['method']}"]
            of.update({name: row.get(name, 0) for name in ("calls", "batches", "waiting")})
            of["largest"] = max(of["largest"], row.get("largest", 0))
        names = sorted(sums, reverse=True)
        _titled(self.root, "Sizes of batches, by method", names, "no method batches")
        data: dict[str, list[float]] = {
            name: [sums[method][name] for method in names] for name in ("largest", "calls", "waiting")
        }
        data["mean"] = [sums[method]["calls"] / max(sums[method]["batches"], 1) for method in names]
        _spread(self.root, names)
        update(self.source, {"method": names, **data})


class Models:
    """How many replicas have each model."""

    def __init__(self) -> None:
        self.source = ColumnDataSource({"model": [], "replicas": []})
        self.root = new_figure("", y_range=FactorRange())
        self.root.hbar("model", right="replicas", height=0.7, source=self.source, color=PURPLE)
        self.root.x_range.start = 0
        self.root.xaxis.ticker.min_interval = 1
        self.root.ygrid.visible = False
        self.root.add_tools(HoverTool(tooltips=[("", "@model"), ("replicas", "@replicas")]))

    def update(self, view: View) -> None:
        counts = Counter(f"{row['model']} ({row['deployment']})" for row in view.rows("models"))
        shown = sorted(counts, key=lambda model: (-counts[model], model))[:MODELS][::-1]
        more = f", the first {MODELS} of {len(counts)}" if len(counts) > MODELS else ""
        _titled(self.root, f"Models loaded, by replicas that have them{more}", shown, "no multiplexed model is loaded")
        _spread(self.root, shown)
        update(self.source, {"model": shown, "replicas": [counts[model] for model in shown]})


def _titled(plot: Any, title: str, rows: Sequence[Any], nothing: str) -> None:
    text = title if rows else f"{title}: {nothing}"
    if plot.title.text != text:
        plot.title.text = text
        # Axes of nothing only puzzle.
        plot.xaxis.visible = plot.yaxis.visible = bool(rows)
        for item in plot.legend:
            item.visible = bool(rows)


def _spread(plot: Any, names: list[str]) -> None:
    if names != plot.y_range.factors:
        plot.y_range.factors = names
        # Few bars need not be thick.
        plot.height = min(90 + 24 * len(names), 90 + 24 * MODELS)


def _legend_above(plot: Any) -> None:
    legend = plot.legend[0]
    plot.center.remove(legend)
    plot.add_layout(legend, "above")
    legend.update(orientation="horizontal", location="top_left", label_text_font_size="11px", glyph_width=16)
    legend.update(spacing=8, padding=2, margin=0, border_line_color=None, background_fill_alpha=0)


#: Lines of the time line from above, with the mark and color of each.
_MARKS = {
    "rollout": ("circle", BLUE),
    "scaling": ("triangle", GREEN),
    "healing": ("x", RED),
    "workers": ("square", ORANGE),
    "proxies": ("diamond", PURPLE),
}


class Decisions:
    """What the controller decided, on a time line and in words."""

    def __init__(self, times: Range1d | None = None) -> None:
        self.source = ColumnDataSource({name: [] for name in ("time", "when", "line", "subject", "text", "kind")})
        lines = list(_MARKS)[::-1]
        own = times is None
        self.range = times or Range1d(0, 1)
        self._own = own
        plot = new_figure(
            "Decisions of the controller",
            x_axis_type="datetime",
            x_range=self.range,
            y_range=FactorRange(*lines),
            height=150,
        )
        plot.xaxis.formatter = DatetimeTickFormatter(seconds="%H:%M:%S", minsec="%H:%M:%S", minutes="%H:%M")
        marks = []
        for line, (mark, color) in _MARKS.items():
            source = ColumnDataSource({name: [] for name in self.source.data})
            marks.append((line, source))
            plot.scatter("time", "line", source=source, marker=mark, size=11, color=color, fill_alpha=0.6, line_width=2)
        self._marks = marks
        plot.add_tools(HoverTool(tooltips=_TOLD))
        self.plot = plot
        narrow = {"sortable": False}
        table = DataTable(
            source=self.source,
            columns=[
                TableColumn(field="when", title="time", width=70, **narrow),
                TableColumn(field="kind", title="decision", width=90, **narrow),
                TableColumn(field="subject", title="about", width=180, **narrow),
                TableColumn(field="text", title="what, and why", width=700, **narrow),
            ],
            index_position=None,
            height=170,
            sizing_mode="stretch_width",
            fit_columns=True,
        )
        self.root = column(plot, table, sizing_mode="stretch_width")

    def update(self, view: View) -> None:
        if self._own:
            self.range.update(start=(view.now + view.offset - 300) * 1000, end=(view.now + view.offset) * 1000)
        events = [event for event in view.events if _concerns(event.subject, view.deployment)]
        rows = [
            {
                "time": (event.time + view.offset) * 1000,
                "when": str(event)[:8],
                "line": view.lines[event.kind],
                "subject": event.subject,
                "text": event.text,
                "kind": event.kind,
            }
            for event in events
        ]
        names = list(self.source.data)
        newest = rows[:-51:-1]
        data = {name: [row[name] for row in newest] for name in names}
        if data != self.source.data:
            self.source.data = data
        for line, source in self._marks:
            data = {name: [row[name] for row in rows if row["line"] == line] for name in names}
            if data != source.data:
                source.data = data


_TOLD = """<div style="max-width:420px"><b>@when @kind</b> @subject<br>@text</div>"""


def _concerns(subject: str, deployment: str) -> bool:
    """Tell whether a decision is shown for a deployment: those about its application, workers and proxies are, too."""
    if deployment == ALL or ":" in subject or subject == "proxies":
        return True
    return subject in (deployment, deployment.partition("/")[0])


class Proxies:
    """The processes that serve HTTP."""

    def __init__(self) -> None:
        names = ("node", "slot", "pid", "state", "restarts")
        self.source = ColumnDataSource({name: [] for name in names})
        self.table = DataTable(
            source=self.source,
            columns=[TableColumn(field=name, title=name, sortable=False) for name in names],
            index_position=None,
            height=HEIGHT - 30,
            sizing_mode="stretch_width",
        )
        self.title = Div(sizing_mode="stretch_width")
        self.root = column(self.title, self.table, sizing_mode="stretch_width")

    def update(self, view: View) -> None:
        rows = view.snapshot.proxies
        title = f"<b>Proxies: {len(rows)}</b>" if rows else "<b>Proxies: none; HTTP is not served</b>"
        if self.title.text != title:
            self.title.text = title
        update(self.source, {name: [row[name] for row in rows] for name in self.source.data})


_LINK = """<a href="info/worker/<%= escaped %>.html" title="<%= address %>"><%- worker %></a>"""
_STATE = "".join(
    f'<% if (value == "{state}") {{ %><span style="color:{color};font-weight:bold">●</span> <% }} %>'
    for state, color in COLORS.items()
)


class Replicas:
    """A line for each replica."""

    def __init__(self) -> None:
        names = (
            "replica",
            "state",
            "worker",
            "escaped",
            "address",
            "running",
            "queued",
            "answered",
            "failed",
            "dropped",
            "wasted",
            "note",
        )
        self.source = ColumnDataSource({name: [] for name in names})
        number = {"formatter": NumberFormatter(format="0,0", text_align="right"), "width": 70}
        wasted = {"formatter": NumberFormatter(format="0,0.[00]", text_align="right"), "width": 70}
        table = DataTable(
            source=self.source,
            columns=[
                TableColumn(field="replica", title="replica", width=220),
                TableColumn(
                    field="state",
                    title="state",
                    width=80,
                    formatter=HTMLTemplateFormatter(template=_STATE + "<%- value %>"),
                ),
                TableColumn(field="worker", title="worker", width=130, formatter=HTMLTemplateFormatter(template=_LINK)),
                TableColumn(field="running", title="in flight", **number),
                TableColumn(field="queued", title="queued", **number),
                TableColumn(field="answered", title="answered", **number),
                TableColumn(field="failed", title="failed", **number),
                TableColumn(field="dropped", title="cancelled", **number),
                TableColumn(field="wasted", title="wasted, s", **wasted),
                TableColumn(field="note", title="note", width=300),
            ],
            index_position=None,
            height=260,
            sizing_mode="stretch_width",
            fit_columns=True,
        )
        self.root = table

    def update(self, view: View) -> None:
        rows = view.rows("replicas")
        update(self.source, {name: [row[name] for row in rows] for name in self.source.data})
        height = min(max(60 + 25 * len(rows), 110), TALLEST)
        if height != self.root.height and self.root.sizing_mode == "stretch_width":
            self.root.height = height


#: Those that have a page of their own, by the name of that.
PANELS: dict[str, type[Any]] = {
    "workers": Workers,
    "batch-methods": Batches,
    "models": Models,
    "proxies": Proxies,
    "decisions": Decisions,
    "replicas": Replicas,
}
