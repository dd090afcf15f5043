"""Counts of many sources as one. Sources come, restart and go; what they counted stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Totals"]


class _Counts(Protocol):
    def merge(self, other: Any) -> None:
        """Count what another has counted."""


C = TypeVar("C", bound=_Counts)


class Totals(Generic[C]):
    """Sums by deployment over all sources, those included that are gone.

    Parameters
    ----------
    kind : type
        Of the counts: made without arguments, with ``merge``.
    """

    def __init__(self, kind: type[C]) -> None:
        self._kind = kind
        #: The last that each source told; a source is one life of one process.
        self._told: dict[str, Mapping[str, C]] = {}
        self._gone: dict[str, C] = {}

    def tell(self, source: str, counts: Mapping[str, C]) -> None:
        """Take over the counts of a source by deployment; they replace what it told before."""
        self._told[source] = counts

    def gone(self, source: str) -> None:
        """A source will not tell anything any more."""
        for deployment, counts in self._told.pop(source, {}).items():
            self._into(self._gone, deployment, counts)

    def by_deployment(self) -> dict[str, C]:
        """Return the sums."""
        sums: dict[str, C] = {}
        for each in (self._gone, *self._told.values()):
            for deployment, counts in each.items():
                self._into(sums, deployment, counts)
        return sums

    def _into(self, sums: dict[str, C], deployment: str, counts: C) -> None:
        if deployment not in sums:
            sums[deployment] = self._kind()
        sums[deployment].merge(counts)
