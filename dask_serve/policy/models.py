"""Multiplexed models: which ones make room, and which replica a call for a model goes to.

Pure: no clock, no loading.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

__all__ = ["Held", "Holder", "choose_holder", "to_unload"]

#: A model is loaded by one more replica when the least loaded one that has it runs at least this many requests, and
#: this many times as many as another one.
SPREAD_FROM, SPREAD_AT = 4, 4


class Held(Protocol):
    """A model that a replica has."""

    nbytes: int

    @property
    def in_use(self) -> bool:
        """A request that got it still runs."""


_Held = TypeVar("_Held", bound=Held)


def to_unload(
    models: Sequence[_Held], most: int | None, max_bytes: int | None, nbytes: int = 0, *, fresh: int = 1
) -> tuple[list[_Held], bool]:
    """Decide which models go, so that others have room.

    Parameters
    ----------
    models : sequence
        Those that are there, the least recently used first.
    most : int or None
        How many there may be.
    max_bytes : int or None
        How large they may be together.
    nbytes : int
        Bytes of what comes, as far as known.
    fresh : int
        How many come.

    Returns
    -------
    unload : list
        As many as are needed of those that are not in use; the least recently used first.
    enough : bool
        They make enough room.
    """
    count, total = len(models) + fresh, sum(model.nbytes for model in models) + nbytes
    unload: list[_Held] = []

    def fits() -> bool:
        # One model is always there, however large it is.
        return (most is None or count <= most) and (max_bytes is None or total <= max_bytes or count <= 1)

    for model in models:
        if fits():
            break
        if not model.in_use:
            unload.append(model)
            count -= 1
            total -= model.nbytes
    return unload, fits()


class Holder(Protocol):
    """A replica, as far as models are concerned."""

    id: str
    limit: int
    mine: int
    #: Models that it has, and those that it loads or will have to.
    models: frozenset[str]
    loading: frozenset[str]
    usable: bool

    def load(self, now: float) -> int:
        """Requests there."""


_Holder = TypeVar("_Holder", bound=Holder)


def choose_holder(replicas: Sequence[_Holder], model: str, now: float) -> _Holder | None:
    """Choose the replica for a call for a model; None: none has room.

    The least loaded one that has the model; of those that load it, if none has; else the one with the fewest models. A
    model whose replicas are much more loaded than others is loaded by one more.
    """
    open_ = [replica for replica in replicas if replica.usable and replica.mine < replica.limit]
    have = [replica for replica in open_ if model in replica.models]
    loading = [replica for replica in open_ if model in replica.loading]
    best = _least(have or loading, now)
    if best is None:
        return _newcomer(open_, model, now)
    load = best.load(now)
    if load < SPREAD_FROM or (have and loading):
        # Or it is being spread already.
        return best
    others = [replica for replica in open_ if model not in replica.models and model not in replica.loading]
    calm = [replica for replica in others if SPREAD_AT * (replica.load(now) + 1) <= load]
    return _newcomer(calm, model, now) or best


def _least(replicas: Sequence[_Holder], now: float) -> _Holder | None:
    return min(replicas, key=lambda replica: replica.load(now), default=None)


def _newcomer(replicas: Sequence[_Holder], model: str, now: float) -> _Holder | None:
    """Choose who loads a model: routers that know the same choose the same."""
    return min(
        replicas,
        key=lambda replica: (
            len(replica.models) + len(replica.loading),
            zlib.crc32(f"{model}\0{replica.id}".encode()),
        ),
        default=None,
    )
