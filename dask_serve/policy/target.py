"""A replica, as one router sees it."""

from __future__ import annotations

from typing import Any

from .forecast import Forecast

__all__ = ["STALE_AFTER", "Target"]

#: What an answer told of others is believed for this many seconds; a replica that was busy once is tried again after.
STALE_AFTER = 0.1

_NONE: frozenset[str] = frozenset()


class Target:
    """One replica as one router sees it.

    Attributes
    ----------
    places : frozenset of str
        Names of where it is, for calls that prefer a place.
    limit : int
        ``max_ongoing_requests``.
    mine : int
        Requests of this router that are at the replica and not answered.
    others : int
        Requests of other routers, by the last answer.
    wanted : int
        Requests that wait for the replica at all routers, by the last answer.
    asked : bool
        A want of this router stands there.
    usable : bool
        False while its door is silent: no new requests go there.
    forecast : Forecast
        How long requests take there.
    worst : float
        Seconds that hardly any request exceeds there, whatever the load.
    handicap : float
        1.0, or for a slow replica how many times longer it takes than the fastest one. 0.0: try it again.
    models, loading : frozenset of str
        The models that it has, and those that it loads or will have to.
    """

    __slots__ = (
        "asked",
        "forecast",
        "handicap",
        "heard",
        "id",
        "limit",
        "link",
        "loading",
        "mine",
        "models",
        "others",
        "places",
        "usable",
        "wanted",
        "worst",
    )

    def __init__(self, id: str, limit: int, link: Any = None, places: frozenset[str] = frozenset()) -> None:
        self.id = id
        self.places = places
        self.limit = limit
        self.link = link
        self.mine = 0
        self.others = 0
        self.heard = 0.0
        self.wanted = 0
        self.asked = False
        self.usable = True
        self.forecast = Forecast()
        self.worst = 0.0
        self.handicap = 1.0
        self.models: frozenset[str] = _NONE
        self.loading: frozenset[str] = _NONE

    def load(self, now: float) -> int:
        """Requests there, as far as is known: own ones for certain, those of others by the last answer."""
        return self.mine + self.others if now - self.heard < STALE_AFTER else self.mine

    def __repr__(self) -> str:
        return f"<Target {self.id}: {self.mine} mine, {self.others} others of {self.limit}>"

    def will_have(self, model: str) -> None:
        """It will load a model that it does not have; it tells when it does."""
        if model not in self.models and model not in self.loading:
            self.loading |= {model}
