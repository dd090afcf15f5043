"""Measure dask_serve and its peers side by side: ``python -m benchmarks.peers [--quick] [--only ray_serve]``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import psutil

from ..command import run
from ..load import drive
from ..processes import ROOT, Clock
from ..table import Row, Sample, interleave, page
from .catalogue import PEERS
from .running import Running, running

ENVIRONMENTS = ROOT / ".venv-peers"
RESULTS = ROOT / "benchmarks" / "results-peers.md"

IN_FLIGHT = 50
BURST = 1000
CONNECTIONS = 100
CALLERS = 64
BODY = json.dumps({"input": 1})


def clock(system: Running) -> Clock:
    """Start a clock for the processes of a system."""
    return Clock(cast("dict[str, psutil.Process]", system.groups))


def concurrent(system: Running, seconds: float, *, case: str = "concurrent", in_flight: int = IN_FLIGHT) -> Sample:
    """Return calls a second from one replica to another."""
    watch = clock(system)
    count, took = system.ask(case, 60 + seconds, in_flight=in_flight, seconds=seconds)
    return Sample(count / took, watch.per_request(count))


def burst(system: Running, seconds: float) -> Sample:
    """Return calls a second of bursts, the median of as many as there is time for."""
    watch, took = clock(system), []
    while sum(took) < seconds or not took:
        took.append(system.ask("burst", count=BURST))
    return Sample(BURST / statistics.median(took), watch.per_request(BURST * len(took)))


def http(system: Running, seconds: float, *, case: str, body: str = "", connections: int = CONNECTIONS) -> Sample:
    """Return requests a second over HTTP."""
    url = system.ask(case)
    watch = clock(system)
    load = drive(url, connections, seconds, body)
    return Sample(load.rate, watch.per_request(load.requests))


#: By the name of the method of `System`: what is measured, the unit, and how.
CASES: dict[str, tuple[str, str, Callable[[Running, float], Sample]]] = {
    "concurrent": (f"Handle in a replica, asyncio, {IN_FLIGHT} in flight", "calls/s", concurrent),
    "burst": (f"Handle in the driver, synchronous, {BURST} refs and gather", "calls/s", burst),
    "noop": (f"HTTP no-op, {CONNECTIONS} connections", "requests/s", partial(http, case="noop")),
    "json": (
        f"HTTP, small JSON in and out, {CONNECTIONS} connections",
        "requests/s",
        partial(http, case="json", body=BODY),
    ),
    "batched": (
        f"Batches of 20 ms + 1 ms n, handle in a replica, {CALLERS} callers",
        "calls/s",
        partial(concurrent, case="batched", in_flight=CALLERS),
    ),
    "batches": (
        f"Batches of 20 ms + 1 ms n, HTTP, {CALLERS} connections",
        "requests/s",
        partial(http, case="batches", body=BODY, connections=CALLERS),
    ),
}


def compare(ours: Running, name: str, settings: list[str], *, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure all cases of a peer, mode by mode."""
    peer = PEERS[name]
    for mode, variables in peer.modes.items():
        python = str(ENVIRONMENTS / name / "bin" / "python")
        with running(f"benchmarks.peers.{name}", python, variables) as theirs:
            settings.append(f"{peer.title}, {mode}: {theirs.description}.")
            for case, (what, unit, measure) in CASES.items():
                if mode not in peer.cases.get(case, {}):
                    continue
                for system in (ours, theirs):
                    measure(system, 0.5)
                samples = interleave(pairs, partial(measure, ours, seconds), partial(measure, theirs, seconds))
                yield Row(f"{what}, against {peer.title}, {mode}", unit, *samples, least=peer.cases[case][mode])


def main() -> int:
    """Measure what the command line asks for."""
    settings: list[str] = []

    def measure(names: list[str], pairs: int, seconds: float) -> Iterator[Row]:
        with running("benchmarks.peers.ours") as ours:
            settings.append(f"{ours.description}.")
            for name in names:
                yield from compare(ours, name, settings, pairs=pairs, seconds=seconds)

    def render(rows: list[Row], how: str) -> str:
        method = (
            f"{how} Both systems run side by side on this machine, and one idles while the other is measured. A peer "
            "may have several modes. Ratios mean something, absolute figures only this machine."
        )
        packages = ["dask", "distributed"]
        return page(rows, title="Beside other servers", method=method, packages=packages, notes=settings)

    return run("benchmarks.peers", __doc__, [*PEERS], results=RESULTS, measure=measure, render=render)


if __name__ == "__main__":
    sys.exit(main())
