"""Which requests a replica takes, and to which routers it grants its free slots.

The replica's half of the credit protocol; `dispatch` is the router's. The invariant, kept by every method::

    running + granted <= limit + ahead

(where ``limit`` or ``ahead`` falls, what was admitted before stays, and nothing is added until it fits).

A *credit* is a slot promised to one router: it is used at once by a call that carries it, returned, or lapses. A *want*
is a level: how many requests wait at a router, and since when the oldest does. Slots go to the router whose oldest has
waited longest. Of the calls that may leave a large result in the process's store only ``most`` are admitted at once; an
*urgent* one (HTTP, made by a running request, or the first to take a stored result) is none of them, and a want says
whether the router's next request is urgent.

*Background* requests take what online ones leave: they are admitted while few enough run (`leftover`) and no online one
waits, but for one of ten.

A router that let a credit lapse is granted no more until it is heard of. It will be, if it lives: the
frames of a connection arrive in order, so each credit is answered by a call, a return, or the loss of the connection.

Pure: the time is an argument, credits are returned for the caller to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from .backlog import BACKGROUND_EVERY
from .leftover import Leftover

__all__ = ["CREDIT_LIFETIME", "Admission"]

#: Seconds after which an unused credit lapses: its router is silent, or the message was lost with it.
CREDIT_LIFETIME = 0.25

#: With a mean service below this many seconds one request is admitted ahead of a free slot, so that the replica does
#: not idle for the round trip of a credit (a 1 ms service would for 19 % of the time).
AHEAD_BELOW = 0.02

#: Weight of the newest sample in the moving mean of the service time.
_SMOOTHING = 0.1


class _Want:
    __slots__ = ("count", "online", "since", "urgent")

    def __init__(self, count: int, online: int, since: float, urgent: bool) -> None:
        self.count = count
        self.online = online
        self.since = since
        self.urgent = urgent


class Admission:
    """Admission at one replica.

    Parameters
    ----------
    limit : int
        ``max_ongoing_requests``.
    threads : int
        How many ``def`` methods run at once.

    Attributes
    ----------
    leftover : Leftover
        How many requests may run for another background one to be admitted.
    running : int
        Requests admitted and not finished, those included that wait for a slot (at most ``ahead``).
    granted : int
        Credits that are out.
    ahead : int
        How many requests may be admitted beyond ``limit``: 0 or 1, by the mean service time.
    service : float
        Moving mean of the seconds from admission to the answer; 0.0 before the first request has finished. What waits
        for a thread or a batch counts as running, so that ``limit`` of them in so many seconds are what leaves. Nothing
        is predicted from it.
    storing : int
        Running requests that are not urgent.
    most : int or None
        How many of those may run at once.
    """

    __slots__ = (
        "_credits",
        "_due",
        "_lapses",
        "_passed",
        "_silent",
        "_wants",
        "ahead",
        "granted",
        "leftover",
        "limit",
        "most",
        "running",
        "service",
        "storing",
    )

    def __init__(self, limit: int, threads: int = 1) -> None:
        self.limit = limit
        self.leftover = Leftover(threads)
        self.running = 0
        self.granted = 0
        self.ahead = 0
        self.service = 0.0
        self.storing = 0
        self.most: int | None = None
        self._wants: dict[Hashable, _Want] = {}
        # Wants of routers that let a credit lapse. They keep nobody from being admitted.
        self._silent: dict[Hashable, _Want] = {}
        self._credits: dict[Hashable, int] = {}
        # When each credit lapses, oldest first. Used and returned ones leave a stale entry, counted off when it is due.
        self._lapses: deque[tuple[float, Hashable]] = deque()
        #: How many entries each router has there: thousands are due at once where requests are short and many wait.
        self._due: dict[Hashable, int] = {}
        #: Online requests that were admitted since a background one was granted a slot, while some waited.
        self._passed = 0

    @property
    def wanted(self) -> int:
        """Sum of the wants: how many requests wait for this replica (among others) at all routers."""
        return sum(want.count for want in self._wants.values()) if self._wants else 0

    @property
    def held_back(self) -> bool:
        """Requests wait that are not admitted, whatever slots are free."""
        return self._is_held_back() and any(not want.urgent for want in self._wants.values())

    def admit(self, router: Hashable, credit: bool, urgent: bool = False, background: bool = False) -> bool:
        """Decide on a call; an unasked one is admitted only while nobody waits who could be admitted."""
        if not credit:
            if background and self.running + self.granted >= self._leftover():
                return False
            if (
                self._wants and self._anybody_waits(urgent, background)
            ) or self.running + self.granted >= self.limit + self.ahead:
                return False
            if not urgent and self.most is not None and self._is_held_back():
                return False
        elif router in self._credits:
            self._take_credit(router)
            if not urgent and self.most is not None and self.storing >= self.most:
                # It was granted for an urgent one, or before there was less room.
                if router in self._wants:
                    self._wants[router].urgent = False
                return False
        else:
            # Its credit lapsed. Where there is room now, nobody is waiting for that: it would have been granted.
            self._revive(router)
            if self.running + self.granted >= self.limit + self.ahead or (not urgent and self._is_held_back()):
                return False
        self.running += 1
        if not urgent:
            self.storing += 1
        if not background:
            self.leftover.came = True
            if self._wants:
                self._passed += 1
        return True

    def _leftover(self) -> int:
        return self.leftover.most + self.leftover.ahead

    def _is_held_back(self) -> bool:
        return self.most is not None and self.storing + self.granted >= self.most

    def _anybody_waits(self, urgent: bool, background: bool) -> bool:
        """Whether somebody waits who comes before such a request: online ones do not wait for background ones."""
        if self.most is not None and urgent:
            return any(want.urgent for want in self._wants.values())
        return background or any(want.online for want in self._wants.values())

    def finish(self, service: float, now: float, urgent: bool = False) -> list[Hashable]:
        """A request ended after ``service`` seconds; return the routers that get a credit each."""
        self.running -= 1
        if not urgent:
            self.storing -= 1
        mean = self.service
        self.service = mean + _SMOOTHING * (service - mean) if mean else service
        self.ahead = 1 if self.service < AHEAD_BELOW else 0
        return self._grant(now) if self._wants else []

    def drop(self, now: float, urgent: bool = False) -> list[Hashable]:
        """A request left before it ran (cancelled, too late): its slot is free, and the mean learns nothing."""
        self.running -= 1
        if not urgent:
            self.storing -= 1
        return self._grant(now)

    def want(
        self,
        router: Hashable,
        count: int,
        oldest: float,
        now: float,
        *,
        urgent: bool = False,
        online: int | None = None,
    ) -> list[Hashable]:
        """A router says how many wait there (``online`` of them, or all), and for how many seconds the oldest has."""
        self._silent.pop(router, None)
        if count <= 0:
            self._wants.pop(router, None)
        else:
            self._wants[router] = _Want(count, count if online is None else online, now - oldest, urgent)
        return self._grant(now)

    def resize(self, limit: int, now: float) -> list[Hashable]:
        """Take over another limit; what runs beyond a lower one goes on."""
        self.limit = limit
        return self._grant(now)

    def hold_back(self, most: int | None, now: float) -> list[Hashable]:
        """Take over how many requests that are not urgent may run at once."""
        self.most = most
        return self._grant(now)

    def give_back(self, router: Hashable, now: float) -> list[Hashable]:
        """A router returns a credit: it had no request for this replica any more, so its want is void."""
        self._silent.pop(router, None)
        self._wants.pop(router, None)
        if router in self._credits:
            self._take_credit(router)
        return self._grant(now)

    def lapse(self, now: float) -> list[Hashable]:
        """Take back the credits that were out for too long; their routers get no more until they are heard of."""
        while self._lapses and self._lapses[0][0] <= now:
            _, router = self._lapses.popleft()
            younger = self._due.pop(router) - 1
            if younger:
                self._due[router] = younger
            if self._credits.get(router, 0) > younger:
                self._take_credit(router)
                want = self._wants.pop(router, None)
                if want is not None:
                    self._silent[router] = want
        return self._grant(now)

    def next_lapse(self) -> float | None:
        """When `lapse` has to be called; None while no credit is out."""
        return self._lapses[0][0] if self._lapses and self.granted else None

    def lost(self, router: Hashable, now: float) -> list[Hashable]:
        """A router is gone with its wants and credits; its calls are ended one by one through `drop` or `finish`."""
        self._silent.pop(router, None)
        self._wants.pop(router, None)
        self.granted -= self._credits.pop(router, 0)
        self._lapses = deque(entry for entry in self._lapses if entry[1] != router)
        self._due.pop(router, None)
        return self._grant(now)

    def _revive(self, router: Hashable) -> None:
        want = self._silent.pop(router, None)
        if want is not None:
            self._wants[router] = want

    def _take_credit(self, router: Hashable) -> None:
        left = self._credits[router] - 1
        self.granted -= 1
        if left:
            self._credits[router] = left
        else:
            del self._credits[router]
            if not self.granted:
                self._lapses.clear()
                self._due.clear()

    def _grant(self, now: float) -> list[Hashable]:
        granted: list[Hashable] = []
        while self._wants and self.running + self.granted < self.limit + self.ahead:
            best = self._next()
            if best is None:
                break
            # Its next request is younger: without this one router with an old backlog would take every slot.
            self._wants[best].since += max(self.service, 1e-4) / self.limit
            self._credits[best] = self._credits.get(best, 0) + 1
            self.granted += 1
            self._lapses.append((now + CREDIT_LIFETIME, best))
            self._due[best] = self._due.get(best, 0) + 1
            granted.append(best)
        return granted

    def _next(self) -> Hashable:
        """Return the router whose next request is to come: the oldest online one, or else background."""
        online = behind = None
        since = behind_since = float("inf")
        open_to_all = self.most is None or not self._is_held_back()
        for router, want in self._wants.items():
            credits = self._credits.get(router, 0)
            if not (open_to_all or want.urgent) or want.count <= credits:
                continue
            if want.online <= credits:
                if want.since < behind_since:
                    behind, behind_since = router, want.since
            elif want.since < since:
                online, since = router, want.since
        if behind is None:
            return online
        starves = self._passed >= BACKGROUND_EVERY - 1
        if online is not None and not starves:
            return online
        if not starves and self.running + self.granted >= self._leftover():
            return None
        self._passed = 0
        return behind
