"""Where a router sends its requests: choice of the replica, the backlog, and the router's half of the credits.

A call goes out unasked while nothing waits here and a replica has room by this router's own count: the least loaded of
those where its largest argument is, else power of two choices on own requests in flight plus what the last answer told
of others. Everything else waits in the backlog, where it can still be cancelled, and leaves it on a credit, or unasked
to a replica that just answered and said that nobody waits for it.

While the backlog is not empty a want stands at some replicas: at least at `ASKED_AT_LEAST` and at one for each request
that waits, where there are so many; at all once a request has waited for long. While it is empty no want stands.

Pure: sending goes through a `Port`, time and randomness are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .backlog import Backlog
from .models import choose_holder

__all__ = ["Dispatcher", "Port", "Queued", "Target"]

#: What an answer told of others is believed for this many seconds; a replica that was busy once is tried again after.
STALE_AFTER = 0.1

#: A backlog, however small, asks this many replicas (all, if there are fewer).
ASKED_AT_LEAST = 4
#: A backlog whose oldest request has waited for this many seconds asks all of them.
PATIENCE = 0.1


class Queued(Protocol):
    """A request, as far as the dispatcher is concerned."""

    #: Set when the request was given up while it waited; it is skipped then.
    dropped: bool
    #: When it came to the router.
    since: float
    #: Online requests go first where both wait.
    background: bool
    #: Places it should go to if one of them has room; None: anywhere.
    prefers: frozenset[str] | None
    #: It is admitted even where results have no room; it goes before others.
    urgent: bool
    #: The model that it is for, or "".
    model_id: str


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
    models, loading : frozenset of str
        The models that it has, and those that it loads or will have to.
    """

    __slots__ = (
        "asked",
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
        self.models: frozenset[str] = _NONE
        self.loading: frozenset[str] = _NONE

    def load(self, now: float) -> int:
        """Requests there, as far as is known: own ones for certain, those of others by the last answer."""
        return self.mine + self.others if now - self.heard < STALE_AFTER else self.mine

    def __repr__(self) -> str:
        return f"<Target {self.id}: {self.mine} mine, {self.others} others of {self.limit}>"


class Port(Protocol):
    """What a dispatcher tells the world."""

    def send(self, target: Target, call: Any, credit: bool) -> None:
        """Send the call now."""

    def want(self, target: Target, count: int, oldest: float, urgent: bool) -> None:
        """Tell the replica how many wait here, since when the oldest does, and whether the next one is urgent."""

    def give_back(self, target: Target) -> None:
        """Return a credit."""


class Dispatcher:
    """The requests of one router for one deployment.

    Parameters
    ----------
    port : Port
    random : callable
        Returns a float in [0, 1).
    """

    __slots__ = ("_announced", "_announced_urgent", "_backlog", "_order", "_port", "_random", "queued", "targets")

    def __init__(self, port: Port, random: Callable[[], float]) -> None:
        self.targets: dict[str, Target] = {}
        #: Live requests in the backlog.
        self.queued = 0
        self._order: list[Target] = []
        self._backlog = Backlog()
        self._port = port
        self._random = random
        self._announced = 0
        self._announced_urgent = False

    # ------------------------------------------------------------------ requests

    def submit(self, call: Queued) -> None:
        """Take a new request: send it, or let it wait."""
        if not self.queued:
            target = self._choose(call.since, call.prefers) if not call.model_id else self._holder(call, call.since)
            if target is not None:
                # Reserved in the step that chooses, so that the next choice sees it.
                target.mine += 1
                self._port.send(target, call, False)
                return
        self._backlog.append(call)
        self.queued += 1
        self._announce(call.since)

    def cancelled(self, call: Queued, now: float) -> None:
        """A request in the backlog was given up (its ``dropped`` is set)."""
        self.queued -= 1
        if len(self._backlog) > 2 * self.queued:
            # Those behind one that waits for long would pile up.
            self._backlog.prune()
        self._announce(now)

    def refused(self, target: Target, call: Queued, running: int, wanted: int, now: float) -> None:
        """FULL or DRAINING: not executed, so it goes back to the head and waits for a credit."""
        target.mine -= 1
        self._remember(target, running, wanted, now)
        if not call.dropped:
            self._backlog.put_back(call)
            self.queued += 1
        self._announce(now)

    def put_back(self, call: Queued, now: float) -> None:
        """A request whose replica went away is to be sent again: at once, or from the head of the backlog."""
        if not self.queued:
            target = self._choose(now, call.prefers) if not call.model_id else self._holder(call, now)
            if target is not None:
                target.mine += 1
                self._port.send(target, call, False)
                return
        self._backlog.put_back(call)
        self.queued += 1
        self._announce(now)

    def answered(self, target: Target, running: int, wanted: int, credits: int, now: float) -> None:
        """A replica answered a request and told its load; use the credits that came with it."""
        target.mine -= 1
        self._remember(target, running, wanted, now)
        for _ in range(credits):
            self.credited(target, now)
        while (
            self.queued
            and not wanted
            and target.usable
            and target.mine + target.others < target.limit
            and self.targets.get(target.id) is target
        ):
            self._send_head(target, False, now)

    def _remember(self, target: Target, running: int, wanted: int, now: float) -> None:
        others = running - target.mine
        target.others = others if others > 0 else 0
        target.wanted = wanted
        target.heard = now

    def credited(self, target: Target, now: float) -> None:
        """A credit came: use it at once, or return it."""
        if self.queued and self.targets.get(target.id) is target:
            self._send_head(target, True, now)
        else:
            self._port.give_back(target)

    def _send_head(self, target: Target, credit: bool, now: float) -> None:
        call = self._backlog.pop(target.models)
        if call.model_id:
            _will_have(target, call.model_id)
        self.queued -= 1
        target.mine += 1
        self._port.send(target, call, credit)
        self._announce(now)

    def waiting(self) -> list[Any]:
        """Return the live requests of the backlog."""
        return list(self._backlog)

    def take_all(self) -> list[Any]:
        """Empty the backlog and return its live requests: nothing will ever answer them."""
        calls = self.waiting()
        self._backlog.clear()
        self.queued = 0
        self._announce(0.0)
        return calls

    # ------------------------------------------------------------------ replicas

    def add(self, target: Target, now: float) -> None:
        """A replica is ready: what waits may go there."""
        self.targets[target.id] = target
        self._order = list(self.targets.values())
        self.fill(now)

    def remove(self, target: Target, now: float) -> None:
        """A replica is gone or drains; its calls in flight are answered or failed by the router."""
        if self.targets.get(target.id) is target:
            del self.targets[target.id]
            self._order = list(self.targets.values())
            if target.asked:
                target.asked = False
                if self.queued:
                    self._ask(now, self.queued)

    def silent(self, target: Target, now: float) -> None:
        """A replica cannot be asked at present (its ``usable`` is unset): others are asked instead."""
        if target.asked:
            target.asked = False
            if self.queued:
                self._ask(now, self.queued)

    def fill(self, now: float) -> None:
        """Replicas came, or are reachable again: ask all of them for what waits."""
        if self.queued:
            self._ask(now, len(self._order))

    def remind(self, now: float) -> None:
        """To be called about twice a second: what has waited for long is asked of all replicas, and asked again."""
        if self.queued and now - self._backlog.since() >= PATIENCE:
            self._ask(now, len(self._order))

    def _choose(self, now: float, prefers: frozenset[str] | None) -> Target | None:
        order = self._order
        if prefers is not None:
            near = [
                target
                for target in order
                if target.mine < target.limit and target.usable and not prefers.isdisjoint(target.places)
            ]
            if near:
                return min(near, key=lambda target: target.load(now))
        count = len(order)
        if count == 1:
            only = order[0]
            return only if only.mine < only.limit and only.usable else None
        if not count:
            return None
        # Two different ones at random, the less loaded of them; if that one is full, any that is not.
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        best, other = order[first], order[second]
        if other.load(now) < best.load(now):
            best = other
        if best.mine < best.limit and best.usable:
            return best
        free = [target for target in order if target.mine < target.limit and target.usable]
        return min(free, key=lambda target: target.load(now)) if free else None

    def _holder(self, call: Queued, now: float) -> Target | None:
        """Choose a replica by the model that it has."""
        target = choose_holder(self._order, call.model_id, now)
        if target is not None:
            _will_have(target, call.model_id)
        return target

    # ------------------------------------------------------------------ wants

    def _announce(self, now: float) -> None:
        """Tell the level of the backlog when it left or reached 0, doubled or halved."""
        queued, told = self.queued, self._announced
        if (queued == told or told < 2 * queued < 4 * told) and self._announced_urgent == self._backlog.urgent:
            return
        if queued:
            self._ask(now, queued)
            return
        self._announced = 0
        self._announced_urgent = False
        self._backlog.clear()
        for target in self._order:
            if target.asked:
                target.asked = False
                self._port.want(target, 0, 0.0, False)

    def _ask(self, now: float, enough: int) -> None:
        """Tell ``enough`` replicas how many wait: those that know of it already, and the least loaded others."""
        self._announced = self.queued
        self._announced_urgent = urgent = self._backlog.urgent
        asked = [target for target in self._order if target.asked]
        missing = max(enough, ASKED_AT_LEAST) - len(asked)
        if missing > 0:
            rest = [target for target in self._order if target.usable and not target.asked]
            if len(rest) > missing:
                rest.sort(key=lambda target: target.load(now) + target.wanted)
            asked += rest[:missing]
        oldest = max(0.0, now - self._backlog.since())
        for target in asked:
            target.asked = True
            self._port.want(target, min(self.queued, target.limit + 1), oldest, urgent)


def _will_have(target: Target, model: str) -> None:
    """The replica will load a model that it does not have; it tells when it does."""
    if model not in target.models and model not in target.loading:
        target.loading |= {model}
