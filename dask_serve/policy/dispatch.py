"""Where a router sends its requests: choice of the replica, the backlog, and the router's half of the credits.

A call goes out unasked while nothing waits here and a replica has room by this router's own count: the least loaded of
those where its largest argument is, else power of two choices on own requests in flight plus what the last answer told
of others. Everything else waits in the backlog, where it can still be cancelled, and leaves it on a credit, or unasked
to a replica that just answered and said that nobody waits for it.

A call with a deadline that will most likely not be met is refused when it comes; one whose deadline cannot be met any
more when its turn has come is not sent. A replica that has nothing to do gets every call: what is known of it may be
out of date. A replica that takes much longer than others at the same load counts as that much more loaded.

While the backlog is not empty a want stands at some replicas: at least at `ASKED_AT_LEAST` and at one for each request
that waits, where there are so many; at all once a request has waited for long. While it is empty no want stands.

Pure: sending goes through a `Port`, time and randomness are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .backlog import Backlog
from .foresight import SLOW, Foresight, compare
from .levels import Levels
from .models import choose_holder
from .target import Target

__all__ = ["Dispatcher", "Port", "Queued"]

#: A backlog, however small, asks this many replicas (all, if there are fewer).
ASKED_AT_LEAST = 4
#: A backlog whose oldest request has waited for this many seconds asks all of them.
PATIENCE = 0.1
#: Seconds that a background request which prefers other places counts as younger at a replica.
FAR = 1.0


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
    #: When it has to be answered; None: whenever.
    deadline: float | None
    #: Set when it is sent: the time, and how many others are at the replica, as far as is known.
    sent: float
    found: int
    #: The model that it is for, or "".
    model_id: str


class Port(Protocol):
    """What a dispatcher tells the world."""

    def send(self, target: Target, call: Any, credit: bool) -> None:
        """Send the call now."""

    def want(self, target: Target, count: int, online: int, oldest: float, urgent: bool) -> None:
        """Tell the replica how many wait here, how many of them are online ones, and for how long the oldest has."""

    def give_back(self, target: Target) -> None:
        """Return a credit."""

    def too_late(self, call: Any, least: float) -> None:
        """The call will not be sent: its deadline comes before the ``least`` seconds have passed that it would take."""


class Dispatcher:
    """The requests of one router for one deployment.

    Parameters
    ----------
    port : Port
    random : callable
        Returns a float in [0, 1).
    """

    __slots__ = (
        "_backlog",
        "_order",
        "_port",
        "_random",
        "foresight",
        "levels",
        "on_level",
        "online",
        "queued",
        "targets",
    )

    def __init__(self, port: Port, random: Callable[[], float]) -> None:
        self.targets: dict[str, Target] = {}
        #: Live requests in the backlog, and how many of them are online ones.
        self.queued = 0
        self.online = 0
        #: Called when the level of the backlog has changed: it left or reached 0, doubled or halved.
        self.on_level: Callable[[], None] | None = None
        self.levels = Levels()
        self.foresight = Foresight()
        self._order: list[Target] = []
        self._backlog = Backlog()
        self._port = port
        self._random = random

    # ------------------------------------------------------------------ requests

    def submit(self, call: Queued) -> float | None:
        """Take a new request: send it, or let it wait.

        Returns
        -------
        float or None
            None: it was taken. Else it was refused, since its deadline would most likely be missed: the seconds after
            which another like it would be in time.
        """
        now = call.since
        if not (self.queued if call.background else self.online):
            target = self._holder(call, now) if call.model_id else self._choose(now, call.prefers)
            # A background one does not come unasked to where others run.
            if target is not None and not (call.background and target.mine + target.others):
                if call.deadline is not None and target.worst > (slack := call.deadline - now):
                    target = self.foresight.in_time(target, self._order, slack, now)
                    if target is None:
                        return self.foresight.stay_away(self._order, slack, now)
                self._send(target, call, False, now)
                return None
        if call.deadline is not None:
            # Online ones do not wait for background ones.
            ahead = self.queued if call.background else self.online
            late = self.foresight.lateness(self._order, ahead, call.deadline - now)
            if late > 0:
                return late
        self._backlog.append(call)
        self._count(call, 1)
        self._announce(now)
        return None

    def _send(self, target: Target, call: Queued, credit: bool, now: float) -> None:
        call.sent = now
        call.found = target.mine + target.others
        # Reserved in the step that chooses, so that the next choice sees it.
        target.mine += 1
        if call.model_id:
            target.will_have(call.model_id)
        self._port.send(target, call, credit)

    def cancelled(self, call: Queued, now: float) -> None:
        """A request in the backlog was given up (its ``dropped`` is set)."""
        self._count(call, -1)
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
            self._count(call, 1)
        self._announce(now)

    def put_back(self, call: Queued, now: float) -> None:
        """A request whose replica went away is to be sent again: at once, or from the head of the backlog."""
        if not (self.queued if call.background else self.online):
            target = self._holder(call, now) if call.model_id else self._choose(now, call.prefers)
            if target is not None and not (call.background and target.mine + target.others):
                self._send(target, call, False, now)
                return
        self._backlog.put_back(call)
        self._count(call, 1)
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
            and not (target.mine + target.others and self._backlog.background)
        ):
            self._send_head(target, False, now)

    def _remember(self, target: Target, running: int, wanted: int, now: float) -> None:
        others = running - target.mine
        target.others = others if others > 0 else 0
        target.wanted = wanted
        target.heard = now
        if wanted:
            self.levels.hear(wanted, target.asked, now)

    def credited(self, target: Target, now: float) -> None:
        """A credit came: use it at once, or return it."""
        if self.queued and self.targets.get(target.id) is target:
            self._send_head(target, True, now)
        else:
            self._port.give_back(target)

    def _send_head(self, target: Target, credit: bool, now: float) -> None:
        least = target.forecast.least if target.mine else 0.0
        while self.queued:
            call = self._backlog.pop(target.models)
            self._count(call, -1)
            self.foresight.pace.left(now, self.queued > 0)
            if call.deadline is None or now + least <= call.deadline:
                self._send(target, call, credit, now)
                break
            self.foresight.late()
            self._port.too_late(call, least)
        else:
            if credit:
                self._port.give_back(target)
        self._announce(now)

    def _count(self, call: Queued, change: int) -> None:
        self.queued += change
        if not call.background:
            self.online += change

    def everywhere(self, now: float) -> int:
        """Return how many requests wait at all routers, as far as is known here."""
        return self.queued + self.levels.elsewhere(now, self.foresight.taken)

    def wait(self) -> float:
        """Return the seconds until all that waits here is answered, as far as can be told."""
        return self.foresight.wait(self._order, self.queued)

    def waiting(self) -> list[Any]:
        """Return the live requests of the backlog."""
        return list(self._backlog)

    def take_all(self) -> list[Any]:
        """Empty the backlog and return its live requests: nothing will ever answer them."""
        calls = self.waiting()
        self._backlog.clear()
        self.queued = self.online = 0
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
        if len(self._order) > 1:
            compare(self._order, now)
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
        if (other.load(now) + 1) * other.handicap < (best.load(now) + 1) * best.handicap:
            best = other
        if best.mine < best.limit and best.usable:
            if not best.handicap:
                # One request shall tell.
                best.handicap = SLOW * best.limit
            return best
        free = [target for target in order if target.mine < target.limit and target.usable]
        return min(free, key=lambda target: (target.load(now) + 1) * target.handicap) if free else None

    def _holder(self, call: Queued, now: float) -> Target | None:
        """Choose a replica by the model that it has."""
        return choose_holder(self._order, call.model_id, now)

    # ------------------------------------------------------------------ wants

    def _announce(self, now: float) -> None:
        """Tell the level of the backlog when it left or reached 0, doubled or halved."""
        if not self.levels.differ(self.queued, self.online, self._backlog.urgent):
            return
        if self.on_level is not None:
            self.on_level()
        if self.queued:
            self._ask(now, self.queued)
            return
        self.levels.tell(0, 0, False, now)
        self.foresight.pace.stopped()
        self._backlog.clear()
        for target in self._order:
            if target.asked:
                target.asked = False
                self._port.want(target, 0, 0, 0.0, False)

    def _ask(self, now: float, enough: int) -> None:
        """Tell ``enough`` replicas how many wait: those that know of it already, and the least loaded others."""
        urgent = self._backlog.urgent
        prefers = None if self.online else self._backlog.prefers
        self.levels.tell(self.queued, self.online, urgent, now)
        asked = [target for target in self._order if target.asked]
        missing = max(enough, ASKED_AT_LEAST) - len(asked)
        if missing > 0:
            rest = [target for target in self._order if target.usable and not target.asked]
            if len(rest) > missing:
                rest.sort(key=lambda target: (_is_far(target, prefers), target.load(now) + target.wanted))
            asked += rest[:missing]
        oldest = max(0.0, now - self._backlog.since())
        for target in asked:
            target.asked = True
            # One elsewhere shall serve those first that are near to it.
            waited = oldest - FAR if _is_far(target, prefers) else oldest
            self._port.want(target, self.queued, self.online, waited, urgent)


def _is_far(target: Target, prefers: frozenset[str] | None) -> bool:
    return prefers is not None and prefers.isdisjoint(target.places)
