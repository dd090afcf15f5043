"""Metrics as Prometheus reads them.

The text follows https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .families import Family, Labels
from .histogram import Histogram

__all__ = ["cumulative", "render"]


def render(families: Iterable[Family]) -> str:
    """Return families as text."""
    lines = []
    for family in families:
        counter = family.kind == "counter"
        name = f"{family.name}_total" if counter else family.name
        lines += [f"# HELP {name} {_escaped(family.help)}", f"# TYPE {name} {family.kind}"]
        for labels, value in family.samples:
            if isinstance(value, Histogram):
                lines += _buckets(family, labels, value)
            else:
                lines.append(f"{name}{_labels(labels)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _buckets(family: Family, labels: Labels, histogram: Histogram) -> Iterator[str]:
    buckets = cumulative(family, histogram)
    for bound, total in buckets:
        yield f"{family.name}_bucket{_labels({**labels, 'le': bound})} {total}"
    yield f"{family.name}_sum{_labels(labels)} {histogram.seconds!r}"
    yield f"{family.name}_count{_labels(labels)} {buckets[-1][1]}"


def cumulative(family: Family, histogram: Histogram) -> list[tuple[str, int]]:
    """Return the buckets as Prometheus has them: each with all that are below it."""
    buckets, total = [], 0
    for bound, count in zip([*(repr(float(bound)) for bound in family.bounds), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value, quote=True)}"' for name, value in labels.items()) + "}"


def _escaped(text: str, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
