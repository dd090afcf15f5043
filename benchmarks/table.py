"""Samples, their medians, and the page that is made of them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version


@dataclass(frozen=True)
class Sample:
    """One measurement: its value in the row's unit, and CPU microseconds a request by process."""

    value: float
    cpu: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line: what dask_serve does, beside what it is compared with (nothing: an absolute figure).

    Parameters
    ----------
    what : str
        The case.
    unit : str
        Of the values; put behind them.
    ours, theirs : sequence of Sample
        Interleaved measurements; pairs have the same index.
    least, most : float, optional
        The asked figure, of the ratio or of the value where there is nothing to compare with.
    note : str, default ""
        Behind the case.
    """

    what: str
    unit: str
    ours: Sequence[Sample]
    theirs: Sequence[Sample] = ()
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def figures(self) -> list[float]:
        """The ratios of the pairs, or the values."""
        if self.theirs:
            return [ours.value / theirs.value for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return [sample.value for sample in self.ours]

    @property
    def met(self) -> bool | None:
        """Whether the median is what was asked; None where nothing was."""
        median = statistics.median(self.figures)
        if self.least is not None:
            return median >= self.least
        return None if self.most is None else median <= self.most

    def line(self) -> str:
        """Return the row of the first table."""
        sign = "x" if self.theirs else f" {self.unit}"
        asked = f"≥ {self.least:g}{sign}" if self.least is not None else ""
        asked = f"≤ {self.most:g}{sign}" if self.most is not None else asked
        verdict = {None: "", True: "yes", False: "**no**"}[self.met]
        figures = self.figures
        spread = f"**{number(statistics.median(figures))}{sign}** ({number(min(figures))} to {number(max(figures))})"
        cells = [self.what + self.note, median_of(self.ours, self.unit), median_of(self.theirs, self.unit)]
        return "| " + " | ".join([*cells, spread, asked, verdict]) + " |"

    def cpu_line(self) -> str:
        """Return the row of the second table."""
        return f"| {self.what} | {cpu_of(self.ours)} | {cpu_of(self.theirs)} |"


def number(value: float) -> str:
    """Write a number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median_of(samples: Sequence[Sample], unit: str) -> str:
    """Write the median of values."""
    return f"{number(statistics.median(sample.value for sample in samples))} {unit}" if samples else ""


def cpu_of(samples: Sequence[Sample]) -> str:
    """Write the median CPU microseconds of each process."""
    names = dict.fromkeys(name for sample in samples for name in sample.cpu)
    medians = {name: statistics.median(sample.cpu.get(name, 0.0) for sample in samples) for name in names}
    return ", ".join(f"{name} {number(value)}" for name, value in medians.items())


def interleave(
    pairs: int, ours: Callable[[], Sample], theirs: Callable[[], Sample]
) -> tuple[list[Sample], list[Sample]]:
    """Measure one after the other, in turns; who begins changes, so that drift hits both."""
    mine: list[Sample] = []
    other: list[Sample] = []
    for pair in range(pairs):
        for measure, samples in [(ours, mine), (theirs, other)][:: -1 if pair % 2 else 1]:
            samples.append(measure())
    return mine, other


def page(rows: Sequence[Row], *, title: str, method: str, packages: Sequence[str], notes: Sequence[str] = ()) -> str:
    """Return the page, in Markdown."""
    versions = ", ".join(f"{name} {installed(name)}" for name in packages)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = [
        f"# {title}",
        "",
        method,
        "",
        f"{machine}; {versions}.",
        "",
        *[f"- {note}" for note in notes],
        *[""][: len(notes)],
        "| what | dask_serve | beside it | ratio or value | asked | met |",
        "|---|---|---|---|---|---|",
        *[row.line() for row in rows],
        "",
        "CPU microseconds a request, by process:",
        "",
        "| what | dask_serve | beside it |",
        "|---|---|---|",
        *[row.cpu_line() for row in rows if any(sample.cpu for sample in row.ours)],
    ]
    return "\n".join(head) + "\n"


def installed(name: str) -> str:
    """Return the version of a package, or say that it is not there."""
    try:
        return version(name)
    except ImportError:
        return "missing"
