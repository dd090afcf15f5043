"""Measure everything, and write ``benchmarks/results.md``: ``python -m benchmarks [--quick] [--only http,handle]``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from distributed import Client

from . import arrays, batching, chain, door, dropped, handle_calls, http_noop, memory, streams
from .load import generator
from .processes import DEADLINE, cluster
from .table import Row, page

PARTS = ("http", "handle", "streams", "batching", "refs", "memory", "door")
PACKAGES = ("dask", "distributed", "uvicorn", "starlette", "uvloop")
RESULTS = Path(__file__).parent / "results.md"


def measure(parts: list[str], pairs: int, seconds: float) -> Iterator[Row]:
    """Measure one part after the other; the first four share a cluster, each other one has its own."""
    if {"http", "handle", "streams", "batching"} & {*parts}:
        with cluster() as running, Client(running.address, set_as_default=False) as client:
            for name, part in [
                ("http", http_noop),
                ("handle", handle_calls),
                ("streams", streams),
                ("batching", batching),
            ]:
                if name in parts:
                    yield from part.rows(running, client, pairs, seconds)
    if "refs" in parts:
        with cluster(workers=2) as running, Client(running.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=DEADLINE)
            for part in [chain, arrays, dropped]:
                yield from part.rows(running, client, pairs, seconds)
    if "memory" in parts:
        yield from memory.rows(pairs)
    if "door" in parts:
        with cluster() as running, Client(running.address, set_as_default=False) as client:
            yield from door.rows(client, pairs, seconds)


def main() -> int:
    """Parse, measure, write; the exit code is 0 whatever the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair of a second each: does it work?")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement (2)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results.md; --quick and --only write none")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    pairs, seconds = (1, 1.0) if options.quick else (options.pairs, options.seconds)

    # Dask tells of every connection it closes when many calls are in flight: thousands of lines, which cost it time.
    logging.getLogger("distributed.core").setLevel(logging.WARNING)
    rows = []
    for row in measure(parts, pairs, seconds):
        print(row.line(), file=sys.stderr, flush=True)
        rows.append(row)
    method = (
        f"{pairs} interleaved pair(s) of {seconds:g} s each; medians, and the range of the ratios. HTTP load from "
        f"{generator()}. One scheduler and one worker process, two for refs (`dask scheduler`, "
        "`dask worker --no-nanny --nthreads 4`), one proxy, one replica of each deployment, all on one machine with "
        "the load. Ratios mean something, absolute figures only this machine."
    )
    text = page(rows, title="Benchmarks", method=method, packages=PACKAGES)
    whole = not options.quick and set(parts) == set(PARTS)
    if output := options.output or (RESULTS if whole else None):
        output.write_text(text, encoding="utf-8")
        print(f"Written to {output}", file=sys.stderr)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
