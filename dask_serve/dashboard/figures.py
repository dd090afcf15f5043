"""Plots over time, of one source of columns that all of them share."""

from __future__ import annotations

from typing import Any

from bokeh.models import (
    ColumnDataSource,
    CrosshairTool,
    DatetimeTickFormatter,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from .series import STATUSES

__all__ = [
    "BLACK",
    "BLUE",
    "COLORS",
    "GREEN",
    "GREY",
    "HEIGHT",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "Times",
    "new_figure",
]

# The colours of Okabe and Ito, which people tell apart whatever colours they see.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

#: Of replicas by state.
COLORS = {"ready": GREEN, "starting": SKY, "draining": ORANGE}
#: Pixels of a plot.
HEIGHT = 230

_STATUS_COLORS = dict(zip(STATUSES, (GREEN, SKY, ORANGE, GREY, PURPLE, RED), strict=True))
_STATUS_WORDS = {"499": "499 client left", "503": "503 refused"}
#: Color and dash of quantiles: dashes differ too.
_PARTS = {"p50": (BLUE, "solid"), "p95": (ORANGE, "dashed"), "p99": (RED, "dotted")}


def new_figure(title: str, **options: Any) -> Any:
    """Return an empty plot in the common style."""
    options = {"height": HEIGHT, "sizing_mode": "stretch_width", "toolbar_location": None, "tools": "", **options}
    plot = figure(title=title, **options)
    plot.title.text_font_size = "12px"
    plot.grid.grid_line_alpha = 0.5
    plot.yaxis.minor_tick_line_color = None
    plot.xaxis.minor_tick_line_color = None
    plot.outline_line_color = None
    plot.min_border_left = 55
    return plot


class Times:
    """Makes plots over time which share their data, their range and a cross hair.

    Parameters
    ----------
    source : ColumnDataSource
        Has the columns of `dask_serve.dashboard.series`.
    """

    def __init__(self, source: ColumnDataSource) -> None:
        self.source = source
        self.range = Range1d(0, 1)
        self._told: list[tuple[Any, str, tuple[str, ...]]] = []
        self._crosshair = CrosshairTool(dimensions="height", line_alpha=0.3)

    def statuses(self) -> Any:
        """HTTP answers per second, by class of status."""
        plot = self._new("HTTP answers per second, by status", STATUSES)
        names = list(STATUSES)
        areas = plot.varea_stack(names, x="time", source=self.source, color=[_STATUS_COLORS[name] for name in names])
        # Told by more than their colours.
        areas[names.index("5xx")].glyph.hatch_pattern = "/"
        areas[names.index("503")].glyph.hatch_pattern = "."
        for area in areas:
            area.glyph.hatch_alpha, area.glyph.hatch_scale = 0.5, 6
        self._legend(plot, [(_STATUS_WORDS.get(name, name), area) for name, area in zip(names, areas, strict=True)])
        # Areas tell no points.
        line = plot.line("time", "2xx", source=self.source, line_alpha=0)
        self._hover(plot, line, {_STATUS_WORDS.get(name, name): f"@{{{name}}}{{0,0.[0]}}" for name in names})
        return plot

    def latency(self) -> Any:
        """How long HTTP answers took."""
        return self._quantiles("HTTP answers, milliseconds", {"": "took"})

    def outcomes(self) -> Any:
        """What replicas did, per second."""
        lines = {"answered": (GREEN, "solid"), "failed": (RED, "dashed")}
        return self._lines("Requests at replicas per second, HTTP and handles", lines)

    def service(self) -> Any:
        """How long user code ran."""
        return self._quantiles("User code, milliseconds", {"": "ran"})

    def waiting(self) -> Any:
        """How long requests waited at replicas."""
        return self._quantiles("Wait at replicas before user code, milliseconds", {"": "waited"})

    def levels(self) -> Any:
        """What runs and what waits."""
        lines = {"running": (BLUE, "solid"), "queued": (ORANGE, "dashed")}
        return self._lines("In flight at replicas, and queued for them", lines, {"running": "in flight"})

    def replicas(self) -> Any:
        """How many replicas there are and should be."""
        lines = {"ready": (GREEN, "solid"), "wanted": (BLACK, "dotted")}
        return self._lines("Replicas", lines, step=True)

    def refused(self) -> Any:
        """What was refused and given up, per second."""
        lines = {"refused": (PURPLE, "solid"), "cancelled": (GREY, "dashed")}
        words = {"refused": "refused: full, sent again", "cancelled": "cancelled while running"}
        return self._lines("Refused and cancelled at replicas, per second", lines, words)

    def wasted(self) -> Any:
        """Seconds of user code that nobody wanted any more."""
        lines = {"wasted": (RED, "solid")}
        return self._lines("Wasted: seconds of cancelled user code, per second", lines)

    def batch_sizes(self) -> Any:
        """How large batches are, and how many there are."""
        lines = {"batch_size": (BLUE, "solid")}
        words = {"batch_size": "mean", "batches": "batches per second"}
        return self._lines("Requests in a batch, on average", lines, words, told=("batches",))

    def tell_empty(self) -> None:
        """Say in the titles of which plots there is nothing to see."""
        data = self.source.data
        for plot, title, names in self._told:
            # Not a number, or zero.
            empty = not any(value == value and value for name in names for value in data[name])  # noqa: PLR0124
            text = f"{title}: none yet" if empty else title
            if plot.title.text != text:
                plot.title.text = text

    # -- parts

    def _new(self, title: str, names: tuple[str, ...]) -> Any:
        plot = new_figure(title, x_axis_type="datetime", x_range=self.range)
        plot.y_range.start = 0
        plot.y_range.range_padding = 0.15
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
        plot.xaxis.formatter = DatetimeTickFormatter(seconds="%H:%M:%S", minsec="%H:%M:%S", minutes="%H:%M")
        plot.yaxis.ticker.desired_num_ticks = 4
        plot.add_tools(self._crosshair)
        # Bokeh draws no axes of nothing.
        plot.line("time", "zero", source=self.source, line_alpha=0)
        self._told.append((plot, title, names))
        return plot

    def _lines(
        self,
        title: str,
        lines: dict[str, tuple[str, str]],
        words: dict[str, str] | None = None,
        *,
        step: bool = False,
        told: tuple[str, ...] = (),
    ) -> Any:
        plot = self._new(title, tuple(lines))
        words = words or {}
        drawn = []
        for name, (color, dash) in lines.items():
            options = {"source": self.source, "color": color, "line_dash": dash, "line_width": 2}
            if step:
                drawn.append((words.get(name, name), plot.step("time", name, mode="after", **options)))
            else:
                drawn.append((words.get(name, name), plot.line("time", name, **options)))
        if len(lines) > 1:
            self._legend(plot, drawn)
        self._hover(plot, drawn[0][1], {words.get(name, name): f"@{name}{{0,0.[00]}}" for name in (*lines, *told)})
        return plot

    def _quantiles(self, title: str, names: dict[str, str]) -> Any:
        lines, words = {}, {}
        for prefix, name in names.items():
            for part, style in _PARTS.items():
                lines[f"{name}_{part}"] = style
                words[f"{name}_{part}"] = f"{prefix}{part}"
        return self._lines(title, lines, words)

    def _legend(self, plot: Any, drawn: list[tuple[str, Any]]) -> None:
        items = [LegendItem(label=label, renderers=[renderer]) for label, renderer in drawn]
        legend = Legend(items=items, orientation="horizontal", location="top_left", click_policy="hide")
        legend.update(
            label_text_font_size="11px", glyph_width=16, spacing=8, padding=2, margin=0, border_line_color=None
        )
        legend.background_fill_alpha = 0
        plot.add_layout(legend, "above")

    def _hover(self, plot: Any, renderer: Any, told: dict[str, str]) -> None:
        tooltips = [("", "@time{%H:%M:%S}"), *told.items()]
        plot.add_tools(
            HoverTool(renderers=[renderer], mode="vline", tooltips=tooltips, formatters={"@time": "datetime"})
        )
