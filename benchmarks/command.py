"""The command line of both commands: ``python -m benchmarks`` and ``python -m benchmarks.peers``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .table import Row

__all__ = ["run"]


def run(
    prog: str,
    about: str | None,
    parts: Sequence[str],
    *,
    results: Path,
    measure: Callable[[list[str], int, float], Iterable[Row]],
    render: Callable[[list[Row], str], str],
    slow: Sequence[str] = (),
) -> int:
    """Parse, measure, write; the exit code is 0 whatever the figures.

    Parameters
    ----------
    parts : sequence of str
        What ``--only`` knows.
    results : Path
        Where the page of a whole run goes.
    measure : callable
        Gives the rows of some parts, from the number of pairs and the seconds of one measurement.
    render : callable
        Makes the page of the rows; its second argument says how they were measured.
    slow : sequence of str
        Parts that ``--quick`` leaves out, unless ``--only`` names them.
    """
    there = f"benchmarks/{results.name}"
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--quick", action="store_true", help="one pair of a second each: does it work?")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs (5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement (1)")
    parser.add_argument("--only", help=f"some of {','.join(parts)}")
    parser.add_argument("--output", type=Path, help=f"instead of {there}; --quick and --only write none")
    options = parser.parse_args()
    if options.only is not None:
        names = options.only.split(",")
    else:
        names = [name for name in parts if not (options.quick and name in slow)]
    if unknown := set(names) - set(parts):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    pairs, seconds = (1, 1.0) if options.quick else (options.pairs, options.seconds)

    # Dask tells of every connection it closes when many calls are in flight: thousands of lines, which cost it time.
    logging.getLogger("distributed.core").setLevel(logging.WARNING)
    rows = []
    for row in measure(names, pairs, seconds):
        print(row.line(), file=sys.stderr, flush=True)
        rows.append(row)
    how = f"{pairs} interleaved pair(s) of {seconds:g} s each; medians, and the range of the ratios."
    text = render(rows, how)
    if output := options.output or (None if options.quick or set(names) != set(parts) else results):
        output.write_text(text, encoding="utf-8")
        print(f"Written to {output}", file=sys.stderr)
    print(text)
    return 0
