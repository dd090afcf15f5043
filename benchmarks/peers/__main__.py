"""Measure dask_serve and its peers side by side: ``python -m benchmarks.peers [--quick] [--only ray_serve]``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import psutil

from ..processes import ROOT, Clock
from ..table import Row, Sample, interleave, page
from . import ray_serve
from .interface import Peer
from .running import Running, running

PEERS = {"ray_serve": ray_serve.PEER}
ENVIRONMENTS = ROOT / ".venv-peers"
RESULTS = ROOT / "benchmarks" / "results-peers.md"

IN_FLIGHT = 50
BURST = 1000


def clock(system: Running) -> Clock:
    """Start a clock for the processes of a system."""
    return Clock(cast("dict[str, psutil.Process]", system.groups))


def concurrent(system: Running, seconds: float) -> Sample:
    """Return calls a second from one replica to another."""
    watch = clock(system)
    count, took = system.ask("concurrent", 60 + seconds, in_flight=IN_FLIGHT, seconds=seconds)
    return Sample(count / took, watch.per_request(count))


def burst(system: Running, seconds: float) -> Sample:
    """Return calls a second of bursts, the median of as many as there is time for."""
    watch, took = clock(system), []
    while sum(took) < seconds or not took:
        took.append(system.ask("burst", count=BURST))
    return Sample(BURST / statistics.median(took), watch.per_request(BURST * len(took)))


CASES: dict[str, tuple[str, Callable[[Running, float], Sample]]] = {
    "concurrent": (f"Handle in a replica, asyncio, {IN_FLIGHT} in flight", concurrent),
    "burst": (f"Handle in the driver, synchronous, {BURST} refs and gather", burst),
}


def compare(ours: Running, name: str, settings: list[str], *, pairs: int, seconds: float) -> Iterator[tuple[str, Row]]:
    """Measure all cases of a peer, mode by mode; rows come with their case."""
    peer = PEERS[name]
    for mode, variables in peer.modes.items():
        cases = [case for case in CASES if case in peer.cases and mode in peer.cases[case].modes]
        python = str(ENVIRONMENTS / name / "bin" / "python")
        with running(f"benchmarks.peers.{name}", python, variables) as theirs:
            settings.append(f"{peer.title}, {mode}: {theirs.description}.")
            for case in cases:
                what, measure = CASES[case]
                for system in (ours, theirs):
                    measure(system, 0.5)
                samples = interleave(pairs, partial(measure, ours, seconds), partial(measure, theirs, seconds))
                yield case, Row(f"{what}, against {peer.title}, {mode}", "calls/s", *samples)


def judged(rows: list[tuple[str, Row]], peer: Peer) -> Iterator[Row]:
    """Ask what is asked of the row in which the peer is fastest."""
    for case, row in rows:
        best = max((other for name, other in rows if name == case), key=speed)
        yield replace(row, least=peer.cases[case].least) if row is best else row


def speed(row: Row) -> float:
    """Return how fast the peer is."""
    return statistics.median(sample.value for sample in row.theirs)


def main() -> int:
    """Parse, measure, write; the exit code is 0 whatever the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair of a second each: does it work?")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement (2)")
    parser.add_argument("--only", default=",".join(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument(
        "--output", type=Path, help="instead of benchmarks/results-peers.md; --quick and --only write none"
    )
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    pairs, seconds = (1, 1.0) if options.quick else (options.pairs, options.seconds)

    rows: list[Row] = []
    with running("benchmarks.peers.ours") as ours:
        settings = [f"{ours.description}."]
        for name in names:
            measured = []
            for case, row in compare(ours, name, settings, pairs=pairs, seconds=seconds):
                print(row.line(), file=sys.stderr, flush=True)
                measured.append((case, row))
            rows.extend(judged(measured, PEERS[name]))
    method = (
        f"{pairs} interleaved pair(s) of {seconds:g} s each; medians, and the range of the ratios. Both systems run "
        "side by side on this machine, and one idles while the other is measured. A peer is measured in several modes; "
        "what is asked counts for the one in which it is fastest. Ratios mean something, absolute figures only this "
        "machine."
    )
    text = page(rows, title="Beside other servers", method=method, packages=["dask", "distributed"], notes=settings)
    if output := options.output or (RESULTS if not options.quick and set(names) == set(PEERS) else None):
        output.write_text(text, encoding="utf-8")
        print(f"Written to {output}", file=sys.stderr)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
