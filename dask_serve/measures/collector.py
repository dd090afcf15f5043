"""Metrics on the ``/metrics`` page that Dask gives its processes: through ``prometheus_client``, which this needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from .histogram import Histogram
from .prometheus import cumulative
from .sources import sources

logger = logging.getLogger("dask_serve.process")

_KINDS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class _Collector:
    """What ``prometheus_client`` asks."""

    def describe(self) -> list[Any]:
        # Otherwise registering would collect, to learn the names.
        return []

    def collect(self) -> Iterator[Any]:
        for name, source in list(sources.items()):
            try:
                families = list(source())
            except Exception:
                # The page has other things on it.
                logger.exception("What %s tells is missing on /metrics", name)
                continue
            for family in families:
                names = list(family.samples[0].labels) if family.samples else []
                metric = _KINDS[family.kind](family.name, family.help, labels=names)
                for labels, value in family.samples:
                    row = [labels[name] for name in names]
                    if isinstance(value, Histogram):
                        metric.add_metric(row, cumulative(family, value), sum_value=value.seconds)
                    else:
                        metric.add_metric(row, value)
                yield metric


# Once in a process, as a module is imported once.
REGISTRY.register(_Collector())
