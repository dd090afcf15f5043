"""More is asked than can be done, one server after the other: ``python -m benchmarks.peers.overload [--quick]``.

The model does one thing at a time and takes 10 ms, so that 100 requests a second are all that anybody can answer. They
come when they come, however many are not answered yet, and their clients want the answer within 100 ms.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from ..open_loop import Report, offer, quantile
from ..processes import ROOT
from ..table import number
from .__main__ import BODY, ENVIRONMENTS
from .catalogue import HTTP
from .models import CASE, SERVICE, SLEEP
from .running import running

RESULTS = ROOT / "benchmarks" / "results-overload.md"
PLOT = ROOT / "docs" / "overload-peers.svg"

#: Offered, as a multiple of what the model can do.
LOADS = (0.5, 0.9, 2.0, 5.0)
#: Seconds: until an answer is wanted, until a client leaves, and in which a server must have got over its backlog.
DEADLINE, PATIENCE, SETTLED = 0.1, 3.0, 60.0
#: Answers that say no.
REFUSALS = (503, 429)


@dataclass(frozen=True)
class Server:
    """One of those that are compared.

    Parameters
    ----------
    title : str
        Its name in the plot.
    module : str
        Of its process in this package.
    environment : str, optional
        Where it is installed, of ``.venv-peers``; by default where this runs.
    variables : dict
        Of its process.
    """

    title: str
    module: str
    environment: str = ""
    variables: tuple[tuple[str, str], ...] = ((CASE, SLEEP),)

    @property
    def python(self) -> str:
        """The interpreter."""
        return str(ENVIRONMENTS / self.environment / "bin" / "python") if self.environment else sys.executable


SERVERS = {
    "dask_serve": Server("dask_serve", "ours"),
    "ray_serve": Server("Ray Serve", "ray_serve", "ray_serve", ((CASE, SLEEP), (HTTP, "1"))),
    "litserve": Server("LitServe", "litserve", "litserve"),
    "bentoml": Server("BentoML", "bentoml", "bentoml"),
    "fastapi": Server("FastAPI", "fastapi"),
}


@dataclass(frozen=True)
class Point:
    """What became of the requests at one load."""

    title: str
    load: float
    report: Report

    @property
    def in_time(self) -> float:
        """Answers within the deadline, as a share of what the model can do."""
        return self._good / self.report.took * SERVICE

    @property
    def _good(self) -> int:
        return sum(taken <= DEADLINE for taken in self.report.seconds.get(200, []))

    @property
    def taken_in(self) -> list[float]:
        """Seconds of all that was not refused, until the answer or until the client left; sorted."""
        return sorted(
            taken for status, seconds in self.report.seconds.items() if status not in REFUSALS for taken in seconds
        )

    @property
    def late(self) -> float:
        """Those that were neither refused nor answered in time, as a share of those not refused."""
        count = len(self.taken_in)
        return (count - self._good) / max(count, 1)

    def line(self) -> str:
        """Return the row of the table."""
        counts, taken = self.report.counts, self.taken_in
        total = max(sum(counts.values()), 1)
        refusals = sorted(seconds for status in REFUSALS for seconds in self.report.seconds.get(status, []))
        share = 100 * len(refusals) / total
        refused = f"{share:.0f} % in {number(1e3 * quantile(refusals, 0.99))} ms" if refusals else ""
        left = counts.get(0, 0)
        others = {status: count for status, count in counts.items() if status not in {0, 200, *REFUSALS}}
        notes = [f"{100 * left / total:.0f} %"] if left else []
        notes += [f"{100 * count / total:.1f} % {status}" for status, count in sorted(others.items())]
        cells = [
            self.title,
            f"{self.load:g}",
            f"{self.in_time:.2f}",
            f"{100 * self.late:.1f} %",
            f"{number(1e3 * quantile(taken, 0.5))}, {number(1e3 * quantile(taken, 0.99))} ms",
            refused,
            ", ".join(notes),
        ]
        return "| " + " | ".join(cells) + " |"


def measure(server: Server, seconds: float, loads: tuple[float, ...]) -> Iterator[Point | str]:
    """Start a server, and let each load come; also say what it is."""
    with running(f"benchmarks.peers.{server.module}", server.python, dict(server.variables)) as system:
        yield f"{system.description}."
        url = system.ask("model")
        for load in loads:
            settle(url)
            report = offer(url, load / SERVICE, seconds, DEADLINE, 1.0, PATIENCE, body=BODY)
            yield Point(server.title, load, report)


def settle(url: str) -> None:
    """Wait until a lone request is answered as on an idle server, three times."""
    deadline = time.monotonic() + SETTLED
    quick = 0
    while quick < 3:
        begun = time.monotonic()
        request = Request(url, BODY.encode(), {"content-type": "application/json"})
        with urlopen(request, timeout=SETTLED) as answer:
            answer.read()
        took = time.monotonic() - begun
        quick = quick + 1 if took < DEADLINE else 0
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} takes {took:.2g} s for a lone request, {SETTLED:g} s after the load")


def page(points: list[Point], notes: list[str], seconds: float) -> str:
    """Return the page, in Markdown."""
    method = (
        f"A model that does one thing at a time and takes {SERVICE * 1e3:g} ms: {1 / SERVICE:g} requests a second are "
        f"what can be done, 1 in this table. Requests come at random times, at a mean rate, for {seconds:g} s after "
        f"one second that does not count. Their clients want an answer within {DEADLINE * 1e3:g} ms (the header "
        "X-Request-Timeout-Seconds tells it, which dask_serve and Ray Serve read), and leave after "
        f"{PATIENCE:g} s, which count as late. One server at a time, with one process for the model and its own "
        "defaults; HTTP, and the load on the same machine. Where all requests queue, their times grow with the length "
        "of the run."
    )
    columns = (
        "server",
        "offered",
        "answered in time",
        "late, of those not refused",
        "p50, p99 of those",
        "refused, p99 of that",
        "left unanswered; other answers",
    )
    lines = [
        "# Too much to do, beside other servers",
        "",
        method,
        "",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        *[f"- {note}" for note in notes],
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *[point.line() for point in points],
    ]
    return "\n".join(lines) + "\n"


def draw(points: list[Point], path: Path) -> None:
    """Plot what is answered in time, and how long answers take, against the load."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same figures give the same file.
    mpl.rcParams.update({"svg.hashsalt": "dask_serve", "svg.fonttype": "none"})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    good, slow = figure.subplots(1, 2)
    for title in dict.fromkeys(point.title for point in points):
        mine = [point for point in points if point.title == title]
        style = {"marker": "o", "markersize": 4, "linewidth": 2.5 if title == SERVERS["dask_serve"].title else 1.2}
        loads = [point.load for point in mine]
        good.plot(loads, [point.in_time for point in mine], label=title, **style)
        slow.plot(loads, [1e3 * quantile(point.taken_in, 0.99) for point in mine], label=title, **style)
    good.plot([0, 1, max(LOADS)], [0, 1, 1], color="grey", linestyle=":", linewidth=1, label="all that can be done")
    good.set_title(f"answered within {DEADLINE * 1e3:g} ms, of the capacity", fontsize=10)
    slow.set_title(f"p99 of what was not refused, ms ({PATIENCE:g} s: clients leave)", fontsize=10)
    slow.axhline(1e3 * DEADLINE, color="grey", linestyle=":", linewidth=1)
    slow.set_yscale("log")
    for axes in (good, slow):
        axes.set_xlabel("offered load, of the capacity", fontsize=9)
        axes.grid(visible=True, alpha=0.3)
    good.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers.overload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two loads of a second each: does it work?")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one load (3)")
    parser.add_argument("--only", help=f"some of {','.join(SERVERS)}; writes nothing, as --quick")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*SERVERS]
    if unknown := set(names) - {*SERVERS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SERVERS)}")
    seconds, loads = (1.0, (0.5, 2.0)) if options.quick else (options.seconds, LOADS)
    points: list[Point] = []
    notes: list[str] = []
    for name in names:
        for found in measure(SERVERS[name], seconds, loads):
            print(found if isinstance(found, str) else found.line(), file=sys.stderr, flush=True)
            if isinstance(found, str):
                notes.append(found)
            else:
                points.append(found)
    text = page(points, notes, seconds)
    if not options.quick and not options.only:
        RESULTS.write_text(text, encoding="utf-8")
        draw(points, PLOT)
        print(f"Written to {RESULTS} and {PLOT}", file=sys.stderr)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
