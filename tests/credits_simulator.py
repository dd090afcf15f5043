"""A discrete-event simulator that drives the production classes `Admission` and `Dispatcher`.

Around them it puts what the program has around them, and no more: a replica does with its `Admission` what
`ReplicaCore` does, a router with its `Dispatcher` what `Router` and `Link` do, and frames take their time. Connections
break, are partitioned in silence, routers stand still, replicas and routers die, requests are cancelled wherever they
are. After every event the invariants of both halves are checked; at the end nothing may have leaked, and every request
has had exactly one answer.

Run as a script it prints the table of ``docs/decisions/0002-credits.md``::

    PYTHONPATH=. python tests/credits_simulator.py
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dask_serve.policy.admission import Admission
from dask_serve.policy.dispatch import Dispatcher
from dask_serve.policy.forecast import Spread
from dask_serve.policy.target import Target

#: Seconds between two calls of `Dispatcher.remind`, as the fabric makes them.
CHECK_EVERY = 0.5


@dataclass(eq=False)
class Request:
    """One request; what a dispatcher needs of it, and how often it was answered."""

    since: float
    router: Router
    dropped: bool = False
    background: bool = False
    prefers: frozenset[str] | None = None
    model_id: str = ""
    urgent: bool = False
    deadline: float | None = None
    sent: float = 0.0
    found: int = 0
    #: Where it is: connection and target.
    place: Any = None
    outcomes: list[str] = field(default_factory=list)
    #: How long it took, once it is answered.
    seconds: float = 0.0
    on_end: Callable[[], None] | None = None

    def end(self, outcome: str) -> None:
        self.outcomes.append(outcome)
        if self.on_end is not None:
            self.on_end()


@dataclass(eq=False)
class Connection:
    """One router's connection to one replica; frames arrive in their order, or not at all."""

    router: Router
    replica: Replica
    up: bool = True
    partitioned: bool = False
    last: list[float] = field(default_factory=lambda: [0.0, 0.0])
    #: What the replica has of this connection, and the router's requests on it.
    executions: dict[Request, Execution] = field(default_factory=dict)
    sent: dict[Request, Target] = field(default_factory=dict)
    target: Target | None = None


@dataclass(eq=False)
class Execution:
    """One admitted request."""

    connection: Connection
    request: Request
    began: float | None = None
    entered: float = 0.0
    least: float = 0.0
    found: int = 0
    ended: bool = False


class Replica:
    """What `ReplicaCore` does with an `Admission`."""

    def __init__(self, simulation: Simulation, id: str, limit: int) -> None:
        self.sim = simulation
        self.id = id
        self.admission = Admission(limit, simulation.threads or 1)
        #: How many times longer it takes than others.
        self.times = 1.0
        #: What waits for a thread, and what has one.
        self.pool: deque[Execution] = deque()
        self.executing = 0
        self.takes = Spread()
        #: Seconds that threads worked, and those of them that were for nobody.
        self.worked = self.wasted = 0.0
        self.alive = True
        self.active = 0
        self.waiting: deque[Execution] = deque()
        self.connections: list[Connection] = []
        self._lapse: float | None = None
        # Integrals over the time in which somebody waits, and over all time.
        self.not_full = self.idle_slots = self.busy = self.longest = 0.0
        self._since = simulation.now
        self._not_full_since: float | None = None
        self._allowed = limit

    # ------------------------------------------------------------------ what ReplicaCore does

    def on_call(self, connection: Connection, request: Request, credit: bool) -> None:
        if not self.admission.admit(connection, credit, background=request.background):
            self.reply(connection, "full", request, 0)
            return
        execution = connection.executions[request] = Execution(connection, request)
        execution.found = self.admission.running - 1
        if self.active < self.admission.limit:
            self.begin(execution)
        else:
            self.waiting.append(execution)

    def begin(self, execution: Execution) -> None:
        self.account()
        execution.began = self.sim.now
        if self.active:
            execution.least = self.takes.least
        self.active += 1
        if self.sim.threads and self.executing >= self.sim.threads:
            self.pool.append(execution)
        else:
            self.enter(execution)

    def enter(self, execution: Execution) -> None:
        """User code begins, if it is not too late."""
        execution.entered = now = self.sim.now
        deadline = execution.request.deadline
        if deadline is not None and now + execution.least >= deadline:
            execution.entered = 0.0
            self.finish(execution)
            return
        self.executing += 1
        self.sim.after(self.sim.draw_service() * self.times, self.leave, execution)

    def leave(self, execution: Execution) -> None:
        """User code has ended."""
        if not self.alive:
            return
        self.executing -= 1
        seconds = self.sim.now - execution.entered
        self.worked += seconds
        if execution.ended or execution.request.dropped:
            self.wasted += seconds
        self.finish(execution)
        while self.pool and self.executing < self.sim.threads:
            waiting = self.pool.popleft()
            if not waiting.ended:
                self.enter(waiting)

    def finish(self, execution: Execution) -> None:
        if execution.ended or not self.alive:
            return
        self.account()
        execution.ended = True
        self.active -= 1
        assert execution.began is not None
        now = self.sim.now
        if execution.entered:
            seconds = now - execution.entered
            self.takes.add(seconds)
            delay = execution.entered - execution.began
            background = execution.request.background
            limit = self.admission.limit
            self.admission.leftover.began(execution.found, delay, seconds, limit, self.sim.now, background)
        self.answer(execution, self.admission.finish(now - execution.began, now))
        while self.waiting and self.active < self.admission.limit:
            self.begin(self.waiting.popleft())

    def on_cancel(self, connection: Connection, request: Request) -> None:
        execution = connection.executions.get(request)
        if execution is None:
            return
        if execution.began is not None:
            self.finish(execution)
        else:
            self.waiting.remove(execution)
            execution.ended = True
            self.answer(execution, self.admission.drop(self.sim.now))

    def answer(self, execution: Execution, credited: list[Any]) -> None:
        connection = execution.connection
        del connection.executions[execution.request]
        credits = credited.count(connection)
        self.send_credits([other for other in credited if other is not connection])
        self.reply(connection, "result" if execution.entered else "too late", execution.request, credits)

    def reply(self, connection: Connection, kind: str, request: Request, credits: int) -> None:
        load = self.admission.running, self.admission.wanted, credits
        self.sim.post(connection, 1, connection.router.on_reply, connection, kind, request, load)

    def send_credits(self, connections: list[Any]) -> None:
        for connection in connections:
            self.sim.post(connection, 1, connection.router.on_credit, connection)
        self.arm()

    def arm(self) -> None:
        due = self.admission.next_lapse()
        if due is not None and self._lapse is None:
            self._lapse = max(due, self.sim.now)
            self.sim.at(self._lapse, self.on_lapse)

    def on_lapse(self) -> None:
        self._lapse = None
        if self.alive:
            self.send_credits(self.admission.lapse(self.sim.now))

    def on_want(self, connection: Connection, count: int, online: int, oldest: float) -> None:
        self.send_credits(self.admission.want(connection, count, oldest, self.sim.now, online=online))

    def on_return(self, connection: Connection) -> None:
        self.send_credits(self.admission.give_back(connection, self.sim.now))

    def on_lost(self, connection: Connection) -> None:
        if self.alive and connection in self.connections:
            self.connections.remove(connection)
            for request in list(connection.executions):
                self.on_cancel(connection, request)
            self.send_credits(self.admission.lost(connection, self.sim.now))

    def set_limit(self, limit: int) -> None:
        self.account()
        self.send_credits(self.admission.resize(limit, self.sim.now))
        while self.waiting and self.active < limit:
            self.begin(self.waiting.popleft())

    # ------------------------------------------------------------------ measuring and checking

    def account(self) -> None:
        """Integrate up to now; called before anything changes that the integrals depend on."""
        now, limit = self.sim.now, self.admission.limit
        passed = now - self._since
        self._since = now
        if self.alive and passed > 0:
            self.busy += passed * self.active
            if self.sim.somebody_waits and self.active < limit:
                self.not_full += passed
                self.idle_slots += passed * (limit - self.active)
        full = self.active >= limit or not self.sim.somebody_waits or not self.alive
        if full:
            self._not_full_since = None
        elif self._not_full_since is None:
            self._not_full_since = now
        else:
            self.longest = max(self.longest, now - self._not_full_since)

    def check(self) -> None:
        admission = self.admission
        out = admission.running + admission.granted
        # What was admitted before the limit or `ahead` fell stays; nothing is added to it.
        self._allowed = max(admission.limit + admission.ahead, min(self._allowed, out))
        assert out <= self._allowed, f"{self.id}: {admission.running} run, {admission.granted} granted"
        assert admission.running == self.active + len(self.waiting)
        assert admission.running == sum(len(connection.executions) for connection in self.connections)
        assert admission.granted == sum(admission._credits.values())
        assert not admission.granted or self._lapse is not None


class Router:
    """What `Router` and `Link` do with a `Dispatcher`."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.sim = simulation
        self.name = name
        self.alive = True
        self.dispatcher = Dispatcher(self, simulation.random.random)
        self.connections: dict[Target, Connection] = {}
        self.backlog: set[Request] = set()
        self.served = 0
        self.waits: list[float] = []
        self._waited = False

    # ------------------------------------------------------------------ the dispatcher's port

    def send(self, target: Target, call: Request, credit: bool) -> None:
        connection = self.connections[target]
        self.backlog.discard(call)
        call.place = connection
        connection.sent[call] = target
        self.sim.post(connection, 0, connection.replica.on_call, connection, call, credit)

    def want(self, target: Target, count: int, online: int, oldest: float, urgent: bool) -> None:
        connection = self.connections.get(target)
        if connection is not None:
            self.sim.post(connection, 0, connection.replica.on_want, connection, count, online, oldest)

    def too_late(self, call: Request, least: float) -> None:
        self.backlog.discard(call)
        call.dropped = True
        call.end("too late")

    def give_back(self, target: Target) -> None:
        connection = self.connections[target]
        self.sim.post(connection, 0, connection.replica.on_return, connection)

    # ------------------------------------------------------------------ requests

    def submit(self, on_end: Callable[[], None] | None = None, background: bool | None = None) -> Request:
        sim = self.sim
        if background is None:
            background = sim.background > 0 and sim.random.random() < sim.background
        deadline = None if sim.deadline is None or background else sim.now + sim.deadline
        request = Request(sim.now, self, background=background, deadline=deadline, on_end=on_end)
        sim.requests.append(request)
        self.backlog.add(request)
        if deadline is not None:
            sim.at(deadline, self.expire, request)
        if self.dispatcher.submit(request) is not None:
            self.backlog.discard(request)
            request.dropped = True
            request.end("refused")
        return request

    def expire(self, request: Request) -> None:
        if not request.dropped and self.alive:
            self.dispatcher.foresight.late()
            self.cancel(request, "late")

    def cancel(self, request: Request, outcome: str = "cancelled") -> None:
        if request.dropped or not self.alive:
            return
        request.dropped = True
        if request.place is None:
            self.backlog.discard(request)
            self.dispatcher.cancelled(request, self.sim.now)
        else:
            connection = request.place
            self.sim.post(connection, 0, connection.replica.on_cancel, connection, request)
        request.end(outcome)

    def on_reply(self, connection: Connection, kind: str, request: Request, reply: tuple[int, int, int]) -> None:
        target = connection.sent.pop(request)
        running, wanted, credits = reply
        if kind == "full":
            request.place = None
            if not request.dropped:
                self.backlog.add(request)
            self.dispatcher.refused(target, request, running, wanted, self.sim.now)
            return
        if kind == "too late" and not request.dropped:
            self.dispatcher.foresight.late()
        if kind == "result":
            self.dispatcher.foresight.learn(target, request, self.sim.now)
        self.dispatcher.answered(target, running, wanted, credits, self.sim.now)
        if not request.dropped:
            request.dropped = True
            self.served += kind == "result"
            request.seconds = self.sim.now - request.since
            self.waits.append(request.seconds)
            request.end(kind)

    def on_credit(self, connection: Connection) -> None:
        assert connection.target is not None
        self.dispatcher.credited(connection.target, self.sim.now)

    def on_broken(self, connection: Connection, again: bool) -> None:
        """The connection is gone: what was sent on it is lost, or put back where that is safe."""
        target = connection.target
        if not self.alive or target is None or self.connections.get(target) is not connection:
            return
        self.dispatcher.remove(target, self.sim.now)
        for request in list(connection.sent):
            del connection.sent[request]
            target.mine -= 1
            if request.dropped:
                continue
            if again:
                request.place = None
                self.backlog.add(request)
                self.dispatcher.put_back(request, self.sim.now)
            else:
                request.dropped = True
                request.end("lost")
        del self.connections[target]

    @property
    def reachable(self) -> bool:
        return self.alive and any(not connection.partitioned for connection in self.connections.values())

    def check(self) -> None:
        dispatcher = self.dispatcher
        assert dispatcher.queued == len(self.backlog), f"{self.name}: {dispatcher.queued} != {len(self.backlog)}"
        for target, connection in self.connections.items():
            assert target.mine == len(connection.sent)
            assert dispatcher.queued or not target.asked, f"{self.name} asks {target} for nothing"
        waits = bool(self.backlog) and self.reachable
        if waits != self._waited:
            self.sim.count_waiting(waits)
            self._waited = waits


class Simulation:
    """One run.

    Parameters
    ----------
    replicas, routers, limit : int
    service : float
        Mean service time in seconds, exponentially distributed.
    load : float
        Arrivals as a share of the capacity; 0: none.
    callers : int
        That many callers who each send their next request as soon as the last is answered (over all routers).
    skew : float
        The first router has that many times the others' arrivals.
    cancelled : float
        Share of the requests that are cancelled after up to three times the mean service.
    background : float
        Share of the requests that let others go first.
    delay, jitter : float
        Seconds that a frame takes, and by which share it varies.
    threads : int
        Requests that a replica works on at once, however many it admits; 0: all that it admits.
    deadline : float or None
        Seconds within which requests that are no background ones have to be answered.
    reminding : bool
        Routers call `Dispatcher.remind`, as the fabric lets them.
    """

    def __init__(
        self,
        *,
        replicas: int = 4,
        routers: int = 6,
        limit: int = 1,
        service: float = 0.005,
        load: float = 0.0,
        callers: int = 0,
        skew: float = 10.0,
        cancelled: float = 0.0,
        background: float = 0.0,
        delay: float = 1.2e-4,
        jitter: float = 0.0,
        constant: bool = False,
        threads: int = 0,
        deadline: float | None = None,
        reminding: bool = True,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.dead: list[Replica] = []
        self.limit = limit
        self.threads = threads
        self.deadline = deadline
        self.service = service
        self.cancelled = cancelled
        self.background = background
        self.delay = delay
        self.jitter = jitter
        self.constant = constant
        self.messages: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.somebody_waits = False
        self._waiting = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self._numbers = itertools.count()
        self.arriving = True
        self.replicas: list[Replica] = []
        self.routers = [Router(self, f"router-{i}") for i in range(routers)]
        for _ in range(replicas):
            self.add_replica()
        weights = [skew if i == 0 else 1.0 for i in range(routers)]
        for router, weight in zip(self.routers, weights, strict=True):
            if load:
                rate = load * replicas * (threads or limit) / service * weight / sum(weights)
                self.after(self.random.expovariate(rate), self._arrive, router, rate)
            if reminding:
                self.after(CHECK_EVERY * self.random.random(), self._remind, router)
        for i in range(callers):
            self.after(self.random.random() * service, self._call, self.routers[i % routers])

    # ------------------------------------------------------------------ events

    def at(self, when: float, function: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._count), function, args))

    def after(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, function, *args)

    def post(self, connection: Connection, way: int, function: Callable[..., None], *args: Any) -> None:
        """Send a frame: ``way`` is 0 to the replica, 1 to the router."""
        self.messages[function.__name__] += 1
        due = self.now + self.delay * (1 + self.jitter * self.random.random())
        due = connection.last[way] = max(due, connection.last[way])
        self.at(due, self._deliver, connection, way, function, args)

    def _deliver(self, connection: Connection, way: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not connection.up or connection.partitioned:
            return
        if (connection.router.alive if way else connection.replica.alive) is False:
            return
        function(*args)

    def draw_service(self) -> float:
        return self.service if self.constant else self.random.expovariate(1 / self.service)

    def run(self, until: float) -> Simulation:
        """Run up to a moment, checking after every event."""
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, function, args = heapq.heappop(events)
            function(*args)
            for router in self.routers:
                router.check()
            for replica in self.replicas:
                replica.account()
                replica.check()
        self.now = max(self.now, until)
        for replica in self.replicas:
            replica.account()
        return self

    def count_waiting(self, more: bool) -> None:
        self._waiting += 1 if more else -1
        if self.somebody_waits != bool(self._waiting):
            for replica in self.replicas:
                replica.account()
            self.somebody_waits = bool(self._waiting)

    # ------------------------------------------------------------------ arrivals

    def _arrive(self, router: Router, rate: float) -> None:
        if not self.arriving:
            return
        if router.alive:
            request = router.submit()
            if self.random.random() < self.cancelled:
                self.after(self.random.uniform(0, 3 * self.service), router.cancel, request)
        self.after(self.random.expovariate(rate), self._arrive, router, rate)

    def _call(self, router: Router) -> None:
        if self.arriving and router.alive:
            # Not in the same event: the answer is still being handled.
            router.submit(lambda: self.after(0.0, self._call, router))

    def _remind(self, router: Router) -> None:
        if router.alive and (self.arriving or router.backlog):
            router.dispatcher.remind(self.now)
            self.after(CHECK_EVERY, self._remind, router)

    # ------------------------------------------------------------------ faults

    def add_replica(self) -> Replica:
        replica = Replica(self, f"replica-{next(self._numbers)}", self.limit)
        self.replicas.append(replica)
        for router in self.routers:
            if router.alive:
                self.connect(router, replica)
        return replica

    def connect(self, router: Router, replica: Replica) -> None:
        if not (router.alive and replica.alive):
            return
        connection = Connection(router, replica)
        connection.target = Target(replica.id, replica.admission.limit, connection)
        replica.connections.append(connection)
        router.connections[connection.target] = connection
        router.dispatcher.add(connection.target, self.now)

    def kill_router(self, router: Router) -> None:
        """Its process ends; the doors hear of it at once."""
        router.alive = False
        for request in router.dispatcher.take_all():
            request.end("gone")
        for connection in router.connections.values():
            connection.up = False
            for request in connection.sent:
                if not request.dropped:
                    request.end("gone")
            self.after(self.delay, connection.replica.on_lost, connection)
        router.connections.clear()
        router.backlog.clear()

    def partition(self, router: Router, seconds: float, again: bool = False, reconnect: bool = True) -> None:
        """Frames of all its connections vanish in both directions, until they are declared broken."""
        for connection in list(router.connections.values()):
            connection.partitioned = True
            self.after(seconds, self._break, connection, again, reconnect)

    def _break(self, connection: Connection, again: bool, reconnect: bool) -> None:
        if not connection.up:
            return
        connection.up = False
        connection.replica.on_lost(connection)
        connection.router.on_broken(connection, again)
        if reconnect:
            self.after(self.delay, self.connect, connection.router, connection.replica)

    def freeze(self, router: Router, seconds: float) -> None:
        """The router's process stands still: what comes for it is handled, in its order, when it goes on."""
        for connection in router.connections.values():
            connection.last[1] = max(connection.last[1], self.now + seconds)

    def kill_replica(self, replica: Replica, again: bool = False) -> None:
        replica.account()
        replica.alive = False
        self.replicas.remove(replica)
        self.dead.append(replica)
        for connection in list(replica.connections):
            connection.up = False
            self.after(self.delay, connection.router.on_broken, connection, again)

    # ------------------------------------------------------------------ the end

    def finish(self, within: float = 30.0) -> Simulation:
        """Let everything that is under way end; raise AssertionError where it does not."""
        self.arriving = False
        self.run(self.now + within)
        for request in self.requests:
            assert len(request.outcomes) == 1, f"a request of {request.router.name} was answered: {request.outcomes}"
        for replica in self.replicas:
            admission = replica.admission
            left = (admission.running, admission.granted, admission.wanted, replica.active, len(admission._lapses))
            assert left[:4] == (0, 0, 0, 0), f"{replica.id} keeps {left}"
            assert not admission._wants
            assert not admission._silent
            assert not admission._credits
        for router in self.routers:
            if router.alive:
                assert router.dispatcher.queued == 0
                assert not router.dispatcher._backlog
        return self


@dataclass
class Figures:
    """What one run measured."""

    served: float
    not_full: float
    idle_slots: float
    longest: float
    p50: float
    p99: float
    heavy: float
    light: float
    messages: float


def measure(sim: Simulation, seconds: float) -> Figures:
    """Run for ``seconds``, measure, and let it end."""
    sim.run(seconds)
    replicas = sim.replicas + sim.dead
    slots = len(sim.replicas) * sim.limit
    waits = sorted(wait for router in sim.routers for wait in router.waits)
    light = [wait for router in sim.routers[1:] for wait in router.waits]
    heavy = sim.routers[0].waits
    figures = Figures(
        served=sum(replica.busy for replica in replicas) / (slots * seconds),
        not_full=sum(replica.not_full for replica in replicas) / (len(sim.replicas) * seconds),
        idle_slots=sum(replica.idle_slots for replica in replicas) / (slots * seconds),
        longest=max(replica.longest for replica in replicas),
        p50=waits[len(waits) // 2],
        p99=waits[int(len(waits) * 0.99)],
        heavy=sum(heavy) / max(1, len(heavy)),
        light=sum(light) / max(1, len(light)),
        messages=sum(sim.messages.values()) / max(1, len(waits)),
    )
    sim.finish(within=60.0)
    return figures


#: The rows of the table: what is simulated, and for how many seconds.
ROWS: dict[str, tuple[dict[str, Any], float]] = {
    "load 0.9": ({"load": 0.9}, 10.0),
    "load 1.3": ({"load": 1.3}, 4.0),
    "load 0.9, 30 % cancelled": ({"load": 0.9, "cancelled": 0.3}, 10.0),
    "load 0.6, heavy router partitioned": ({"load": 0.6}, 10.0),
    "load 0.9, 8 slots": ({"load": 0.9, "limit": 8}, 5.0),
    "load 0.9, 1 ms service": ({"load": 0.9, "service": 0.001}, 3.0),
    "load 0.9, 50 ms service": ({"load": 0.9, "service": 0.05}, 60.0),
    "load 0.9, 16 replicas, 12 routers": ({"load": 0.9, "replicas": 16, "routers": 12}, 3.0),
    "1 slot, 50 callers, 10 ms": (
        {"callers": 50, "replicas": 1, "routers": 1, "service": 0.01, "constant": True},
        10.0,
    ),
    "1 slot, 50 callers, 1 ms": (
        {"callers": 50, "replicas": 1, "routers": 1, "service": 0.001, "constant": True},
        3.0,
    ),
    "the same, 5 routers": ({"callers": 50, "replicas": 1, "routers": 5, "service": 0.001, "constant": True}, 3.0),
    "2 replicas, 50 callers, 25 ms": ({"callers": 50, "replicas": 2, "routers": 2, "service": 0.025}, 20.0),
}


def row(name: str, seconds: float | None = None, seed: int = 1) -> Figures:
    """Run one row of the table."""
    settings, usual = ROWS[name]
    seconds = usual if seconds is None else seconds
    sim = Simulation(**settings, seed=seed)
    if "partitioned" in name:
        sim.at(seconds / 2, sim.partition, sim.routers[0], seconds / 2)
    return measure(sim, seconds)


def main() -> None:
    """Print the table."""
    columns = "simulated", "busy", "not full", "idle slots", "longest", "p50", "p99", "heavy / light", "frames"
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    for name in ROWS:
        got = row(name)
        longest, p50, p99, heavy, light = (
            f"{value * 1e3:.1f}" for value in (got.longest, got.p50, got.p99, got.heavy, got.light)
        )
        shares = " | ".join(f"{share * 100:.1f} %" for share in (got.served, got.not_full, got.idle_slots))
        print(f"| {name} | {shares} | {longest} | {p50} | {p99} | {heavy} / {light} | {got.messages:.1f} |")


if __name__ == "__main__":
    main()
