"""Metrics of user code: `Counter`, `Gauge` and `Histogram`, on the ``/metrics`` page of the worker that runs it."""

from __future__ import annotations

import re
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import dask

from .context import replica_context
from .exceptions import ConfigError
from .measures.families import Family, Sample
from .measures.histogram import BOUNDS
from .measures.histogram import Histogram as Buckets
from .measures.sources import add_source

__all__ = ["Counter", "Gauge", "Histogram"]

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
#: Seconds that counters and histograms of a replica that has ended are told: Prometheus must have looked once more.
KEPT = 600.0
#: What names on the page begin with that are not of user code.
TAKEN = ("dask_", "process_", "python_")
#: What is told under other names than its own: what is put behind each.
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
#: Tags that each series has from the replica that it is of.
OWN = ("application", "deployment", "replica")


class _Metric:
    """One metric of this process; all objects of the same name are the same metric.

    It is pickled by its declaration, so that it may be a global of a module that travels with the code.
    """

    kind: ClassVar[Literal["counter", "gauge", "histogram"]]

    def __init__(self, name: str, description: str = "", tag_keys: Sequence[str] = ()) -> None:
        if not _NAME.match(name):
            raise ConfigError(
                f"{name!r} is no name for a metric: letters, digits and underscores, not beginning with a digit"
            )
        # Dask's own are named as its configuration says.
        for prefix in (*TAKEN, f"{dask.config.get('distributed.dashboard.prometheus.namespace', 'dask')}_"):
            if name.startswith(prefix):
                raise ConfigError(
                    f"metric {name!r} cannot have a name that begins with {prefix!r}, as metrics of dask_serve, Dask "
                    f"and Python do: begin with the name of your application, as in 'my_{name.removeprefix(prefix)}'"
                )
        taken = (*OWN, "le", "quantile")
        wrong = [key for key in tag_keys if not _NAME.match(key) or key in taken or key.startswith("__")]
        if wrong:
            raise ConfigError(
                f"tag {wrong[0]!r} of metric {name!r} cannot be used: {', '.join(taken)} and what begins with '__' are "
                "taken; letters, digits and underscores are possible"
            )
        if len(set(tag_keys)) != len(tag_keys):
            raise ConfigError(f"metric {name!r} has a tag twice: tag_keys={list(tag_keys)!r}")
        # As Prometheus has it anyway.
        self.name = name.removesuffix("_total") if self.kind == "counter" else name
        self.description = description
        self.tag_keys = tuple(tag_keys)
        self._defaults: dict[str, str] = {}
        self._series = _registry.series(self)

    def set_default_tags(self, tags: Mapping[str, Any]) -> None:
        """Set the values of tags that later calls do not give.

        Parameters
        ----------
        tags : dict of str to str

        Raises
        ------
        ConfigError
            A tag that is not one of ``tag_keys``.
        """
        self._check(tags)
        self._defaults = {key: str(value) for key, value in tags.items()}

    def _check(self, tags: Mapping[str, Any]) -> None:
        unknown = sorted(set(tags) - set(self.tag_keys))
        if unknown:
            known = ", ".join(self.tag_keys) or "none"
            raise ConfigError(f"metric {self.name!r} has no tag {unknown[0]!r}; its tag_keys: {known}")

    def _key(self, tags: Mapping[str, Any] | None) -> tuple[str, ...]:
        replica = replica_context.get(None)
        own = ("", "", "")
        if replica is not None:
            own = (replica.app_name, replica.deployment, replica.replica_id if _registry.apart else "")
        if not self.tag_keys and not tags:
            return own
        given = tags or {}
        self._check(given)
        missing = [key for key in self.tag_keys if key not in given and key not in self._defaults]
        if missing:
            raise ConfigError(f"metric {self.name!r} needs a value for tag {missing[0]!r}: give it in tags=")
        return (*own, *(str(given.get(key, self._defaults.get(key))) for key in self.tag_keys))

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.description, self.tag_keys), {"_defaults": self._defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._defaults = state["_defaults"]


class Counter(_Metric):
    """A number that grows.

    Parameters
    ----------
    name : str
        Its name in Prometheus, which adds ``_total`` where that is missing. It does not begin with ``dask_``,
        ``process_`` or ``python_``.
    description : str, default ""
    tag_keys : sequence of str, default ()
        Names of its own tags. Each series also has ``application``, ``deployment`` and, unless
        ``serve.metrics.replica-label`` is false in Dask's configuration of the worker, ``replica``.

    Raises
    ------
    ConfigError
        A name that Prometheus does not take, or that is taken by a metric of another declaration.

    Examples
    --------
    >>> import dask_serve as serve
    >>> hits = serve.metrics.Counter("cache_hits", "Answers from the cache.", tag_keys=("cache",))
    >>> hits.inc(tags={"cache": "users"})
    """

    kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, Any] | None = None) -> None:
        """Add ``value``.

        Parameters
        ----------
        value : float, default 1.0
            0 or more.
        tags : dict of str to str, optional

        Raises
        ------
        ConfigError
            A negative value, an unknown tag or one without a value.
        """
        if value < 0:
            raise ConfigError(f"counter {self.name!r} cannot grow by {value}: it takes 0 or more")
        key = self._key(tags)
        with _registry.lock:
            self._series[key] = self._series.get(key, 0.0) + value


class Gauge(_Metric):
    """A number that goes up and down.

    Parameters
    ----------
    name : str
    description : str, default ""
    tag_keys : sequence of str, default ()
        See `Counter`.

    Raises
    ------
    ConfigError
        See `Counter`.

    Examples
    --------
    >>> import dask_serve as serve
    >>> size = serve.metrics.Gauge("cache_bytes", "Bytes in the cache.")
    >>> size.set(1024)
    """

    kind = "gauge"

    def set(self, value: float, tags: Mapping[str, Any] | None = None) -> None:
        """Take ``value``.

        Parameters
        ----------
        value : float
        tags : dict of str to str, optional

        Raises
        ------
        ConfigError
            An unknown tag or one without a value.
        """
        key = self._key(tags)
        with _registry.lock:
            self._series[key] = float(value)


class Histogram(_Metric):
    """Values counted by size.

    Parameters
    ----------
    name : str
    description : str, default ""
    boundaries : sequence of float, optional
        Upper bounds of the buckets, ascending. Default: those of the latencies, 0.0005 to 60 seconds.
    tag_keys : sequence of str, default ()
        See `Counter`.

    Raises
    ------
    ConfigError
        See `Counter`; also bounds that do not ascend.

    Examples
    --------
    >>> import dask_serve as serve
    >>> words = serve.metrics.Histogram("prompt_words", "Words of a prompt.", boundaries=[10, 100, 1000])
    >>> words.observe(42)
    """

    kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] = BOUNDS,
        tag_keys: Sequence[str] = (),
    ) -> None:
        self.boundaries = tuple(float(bound) for bound in boundaries)
        if not self.boundaries or any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ConfigError(f"boundaries={list(boundaries)!r} of metric {name!r} do not ascend")
        super().__init__(name, description, tag_keys)

    def observe(self, value: float, tags: Mapping[str, Any] | None = None) -> None:
        """Count ``value``.

        Parameters
        ----------
        value : float
        tags : dict of str to str, optional

        Raises
        ------
        ConfigError
            An unknown tag or one without a value.
        """
        key = self._key(tags)
        with _registry.lock:
            buckets = self._series.get(key)
            if buckets is None:
                buckets = self._series[key] = Buckets([0.0] * (len(self.boundaries) + 2))
            buckets.counts[bisect_left(self.boundaries, value)] += 1
            buckets.seconds += value

    def __reduce__(self) -> Any:
        return Histogram, (self.name, self.description, self.boundaries, self.tag_keys), {"_defaults": self._defaults}


class _Registry:
    """The series of all metrics of this process; they outlive replicas, as counters have to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: Whether each replica has a series of its own.
        self.apart = bool(dask.config.get("serve.metrics.replica-label", True))
        self._metrics: dict[str, tuple[_Metric, dict[tuple[str, ...], Any]]] = {}
        #: Replicas that have ended, and when.
        self._ended: dict[str, float] = {}

    def series(self, metric: _Metric) -> dict[tuple[str, ...], Any]:
        """Return the series of a metric, made when it is declared for the first time."""
        with self.lock:
            known = self._metrics.get(metric.name)
            if known is None:
                told = {metric.name + suffix for suffix in _SUFFIXES[metric.kind]}
                for other, _ in self._metrics.values():
                    both = told & {other.name + suffix for suffix in _SUFFIXES[other.kind]}
                    if both:
                        raise ConfigError(
                            f"metric {metric.name!r} would be told as {min(both)!r}, as {type(other).__name__} "
                            f"{other.name!r} is: give one of them another name"
                        )
                if not self._metrics:
                    add_source("dask-serve-user", self.families)
                self._metrics[metric.name] = metric, {}
                return self._metrics[metric.name][1]
        first, series = known
        if _declaration(first) != _declaration(metric):
            raise ConfigError(
                f"metric {metric.name!r} was declared before in this process as {_declaration(first)}, and now as "
                f"{_declaration(metric)}: give one of them another name"
            )
        return series

    def forget(self, replica: str) -> None:
        """A replica has ended: its gauges are gone with it, and soon what it counted."""
        with self.lock:
            if not self._metrics:
                return
            self._ended[replica] = time.monotonic()
            self._drop({replica}, "gauge")

    def _drop(self, replicas: set[str], *kinds: str) -> None:
        for metric, series in self._metrics.values():
            if metric.kind in kinds:
                for key in [key for key in series if key[2] in replicas]:
                    del series[key]

    def families(self) -> list[Family]:
        """Return what is to be told."""
        own = OWN if self.apart else OWN[:2]
        with self.lock:
            late = {replica for replica, ended in self._ended.items() if time.monotonic() - ended > KEPT}
            self._drop(late, "counter", "gauge", "histogram")
            for replica in late:
                del self._ended[replica]
            return [
                Family(
                    metric.name,
                    metric.kind,
                    metric.description or metric.name,
                    [
                        Sample(
                            dict(zip((*own, *metric.tag_keys), (*key[: len(own)], *key[3:]), strict=True)),
                            Buckets(value.export()) if isinstance(value, Buckets) else value,
                        )
                        for key, value in series.items()
                    ],
                    metric.boundaries if isinstance(metric, Histogram) else BOUNDS,
                )
                for metric, series in self._metrics.values()
            ]


def _declaration(metric: _Metric) -> str:
    bounds = f", boundaries={list(metric.boundaries)}" if isinstance(metric, Histogram) else ""
    return f"{type(metric).__name__}(tag_keys={list(metric.tag_keys)}{bounds})"


_registry = _Registry()
forget = _registry.forget
