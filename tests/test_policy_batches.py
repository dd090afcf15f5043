"""When batches begin and what goes into them, on a turned clock."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.batches import CostModel, Pace, compose


@dataclass(eq=False)
class Call:
    size: float = 1
    since: float = 0.0
    deadline: float | None = None


def measured(each: float, fixed: float) -> CostModel:
    cost = CostModel()
    for size in [1, 1, 8, 32, 2]:
        cost.observe(size, each * size + fixed)
    return cost


# -- the cost ----------------------------------------------------------------------------------------------------------


@given(
    each=st.floats(1e-5, 0.1), fixed=st.floats(1e-4, 1.0), sizes=st.lists(st.integers(1, 64), min_size=3, max_size=20)
)
def test_cost_is_learned_from_two_sizes(each, fixed, sizes):
    cost = CostModel()
    cost.observe(64, 100.0)  # it compiled
    for size in sizes:
        cost.observe(size, each * size + fixed)
    if max(sizes) > 2 * min(sizes):
        assert cost.each == pytest.approx(each, rel=1e-3, abs=1e-9)
        assert cost.fixed == pytest.approx(fixed, rel=1e-3, abs=1e-9)
    assert cost.each >= 0
    assert cost.fixed >= 0
    # Where only one size was seen, others are not promised for less than they may take.
    assert cost.time(sizes[-1]) == pytest.approx(each * sizes[-1] + fixed, rel=0.6)


def test_what_one_more_costs_is_remembered_while_all_batches_are_equal():
    cost = measured(0.001, 0.02)
    for _ in range(200):
        cost.observe(64, 0.084)
    assert cost.fixed == pytest.approx(0.02, rel=0.05)


def test_pauses_are_set_aside_and_slowness_is_believed():
    cost = measured(0.001, 0.02)
    cost.observe(8, 3.0)
    assert cost.time(8) == pytest.approx(0.028)
    for _ in range(3):
        cost.observe(8, 3.0)
    assert cost.time(8) == pytest.approx(3.0)


# -- what goes into a batch --------------------------------------------------------------------------------------------


def test_the_largest_that_fits_in_half_of_the_deadline():
    calls = [Call(deadline=0.101) for _ in range(64)]
    taken, late = compose(calls, 0.0, measured(0.001, 0.02), 64)
    assert len(taken) == 30  # 20 ms + 30 * 1 ms
    assert not late


def test_the_most_pressing_counts_unless_the_others_suffer():
    cost = measured(0.001, 0.02)
    pressing = Call(since=0.0, deadline=0.101)
    few = [Call(since=0.07, deadline=0.171) for _ in range(5)]
    # 30 ms are left: all six take 26.
    assert compose([pressing, *few], 0.07, cost, 64) == ([pressing, *few], [])
    many = [Call(since=0.07, deadline=0.171) for _ in range(50)]
    # For its sake the batch would have to be of 10.
    taken, late = compose([pressing, *many], 0.07, cost, 64)
    assert late == [pressing]
    assert taken == many[:30]


def test_an_idle_replica_tries():
    calls = [Call(deadline=0.01) for _ in range(3)]
    assert compose(calls, 0.0, measured(0.001, 0.02), 64) == (calls, [])


@given(
    calls=st.lists(
        st.builds(
            Call,
            size=st.integers(1, 20),
            since=st.floats(0.0, 0.2),
            deadline=st.one_of(st.none(), st.floats(0.21, 0.6)),
        ),
        min_size=1,
        max_size=40,
    ),
    most=st.integers(1, 64),
    each=st.floats(1e-4, 0.02),
    fixed=st.floats(1e-3, 0.1),
)
def test_batches_keep_their_promises(calls, most, each, fixed):
    now = 0.2
    cost = measured(each, fixed)
    taken, late = compose(calls, now, cost, most)
    assert taken
    assert not {*taken} & {*late}
    assert taken == [call for call in calls if call in taken], "the order in which they came"
    size = sum(call.size for call in taken)
    assert size <= most or len(taken) == 1
    hopeless = [call for call in calls if call.deadline is not None and call.deadline < now + cost.time(call.size)]
    if len(hopeless) < len(calls):
        for call in taken:
            assert call.deadline is None or now + cost.time(size) <= call.deadline + 1e-9
    assert all(call.deadline is not None for call in late)
    # Whoever is refused would have kept the batch from being more than twice as large, or is too late in any case.
    for call in late:
        if call not in hopeless:
            before = next(i for i, other in enumerate(calls) if other is call)
            assert size > 2 * sum(other.size for other in calls[before:1])


# -- when --------------------------------------------------------------------------------------------------------------


class Replica:
    """A replica with one batcher, on a turned clock; callers are closures that say what comes next."""

    def __init__(self, each: float, fixed: float, most: int) -> None:
        self.now = 0.0
        self.each, self.fixed, self.most = each, fixed, most
        self.cost = CostModel()
        self.pace = Pace(self.cost)
        self.waiting: list[Call] = []
        self.running: list[Call] | None = None
        self.events: list = []
        self.sizes: list[int] = []
        self.refused: list[Call] = []
        self._count = itertools.count()
        self.on_done = lambda call: None

    def at(self, when: float, event) -> None:
        heapq.heappush(self.events, (when, next(self._count), event))

    def come(self, call: Call) -> None:
        self.waiting.append(call)
        self.look()

    def look(self) -> None:
        if not self.waiting:
            return
        idle = self.running is None
        due = self.pace.due(
            self.now, len(self.waiting), self.waiting[0].since, most=self.most, wait=0.0, free=idle, idle=idle
        )
        if due == math.inf:
            return
        if due > self.now:
            self.at(due, self.look)
            return
        alive = [call for call in self.waiting if call.deadline is None or call.deadline > self.now]
        self.refused += [call for call in self.waiting if call not in alive]
        self.waiting = alive
        if not alive:
            return
        taken, late = compose(alive, self.now, self.cost, self.most)
        self.refused += late
        gone = {*taken, *late}
        self.waiting = [call for call in alive if call not in gone]
        self.pace.began(len(alive))
        self.running = taken
        self.sizes.append(len(taken))
        seconds = self.fixed + self.each * len(taken)
        self.at(self.now + seconds, lambda: self.end(seconds))

    def end(self, seconds: float) -> None:
        taken, self.running = self.running, None
        self.cost.observe(len(taken), seconds)
        self.pace.ended(self.now, len(taken), len(self.waiting))
        for call in taken:
            self.on_done(call)
        self.look()

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, event = heapq.heappop(self.events)
            event()


class NeverHeld(Pace):
    """Begins as soon as anything waits."""

    def ended(self, now: float, size: float, waiting: float) -> None:
        pass


def closed_loop(
    callers: int, back: float, *, hold: bool = True, each=0.001, fixed=0.02, seconds=20.0
) -> tuple[float, Replica]:
    """Return the rate that callers get who call again ``back`` seconds after their answer (evenly, one by one)."""
    replica = Replica(each, fixed, 64)
    if not hold:
        replica.pace = NeverHeld(replica.cost)
    done = 0
    steps = itertools.count()

    def answered(call: Call) -> None:
        nonlocal done
        done += 1
        when = replica.now + back * (1 + next(steps) % callers / callers) / 2
        replica.at(when, lambda: replica.come(Call(since=replica.now)))

    replica.on_done = answered
    for _ in range(callers):
        replica.at(0.0, lambda: replica.come(Call(since=replica.now)))
    replica.run(seconds)
    return done / seconds, replica


@pytest.mark.parametrize("callers", [2, 16, 64])
def test_callers_who_come_back_share_a_batch(callers):
    ideal = callers / (0.02 + 0.001 * callers)
    rate, replica = closed_loop(callers, back=0.004)
    assert rate > 0.8 * ideal if callers < 64 else rate > 0.94 * ideal
    assert replica.sizes[-1] == callers
    without, _ = closed_loop(callers, back=0.004, hold=False)
    assert without < 0.85 * ideal


@pytest.mark.parametrize(("back", "least"), [(0.016, 0.83), (0.04, 0.79)])
def test_holding_costs_nothing_where_callers_are_slow(back, least):
    rate, _ = closed_loop(64, back)
    assert rate > least * 64 / 0.084


def test_a_lone_caller_never_waits():
    rate, replica = closed_loop(1, back=0.001)
    assert rate == pytest.approx(1 / 0.022, rel=0.05)
    assert replica.sizes == [1] * len(replica.sizes)


def open_loop(rate: float, deadline: float | None, seconds: float, seed: int = 1) -> tuple[Replica, int, int]:
    """Return the replica, how many calls were answered in time, and how many late."""
    source = random.Random(seed)
    replica = Replica(0.001, 0.02, 64)
    good = late = 0

    def answered(call: Call) -> None:
        nonlocal good, late
        if call.deadline is None or replica.now <= call.deadline + 1e-9:
            good += 1
        else:
            late += 1

    def arrive() -> None:
        replica.come(Call(since=replica.now, deadline=None if deadline is None else replica.now + deadline))
        replica.at(replica.now + source.expovariate(rate), arrive)

    replica.on_done = answered
    replica.at(0.0, arrive)
    replica.run(seconds)
    return replica, good, late


@pytest.mark.parametrize("times", [2, 5])
def test_overload_with_deadlines(times):
    # Of what fits in half of the deadline: 30 calls in 50 ms.
    capacity = 30 / 0.05
    _, good, late = open_loop(times * capacity, 0.1, 20.0)
    assert good / 20.0 >= 0.9 * capacity
    assert late <= 0.01 * (good + late)


def test_nobody_is_refused_in_calm():
    replica, good, late = open_loop(200.0, 0.1, 20.0)
    assert not late
    assert len(replica.refused) <= 0.01 * good


def test_holding_stops_where_nobody_comes_back():
    replica, good, _ = open_loop(150.0, None, 20.0)
    assert good > 0.95 * 150 * 20
    assert replica.pace.worth < 0.6


@given(
    ends=st.lists(st.tuples(st.floats(0.001, 1.0), st.integers(1, 64), st.integers(0, 64)), max_size=20),
    size=st.integers(1, 100),
    wait=st.sampled_from([0.0, 0.05]),
)
def test_holds_are_bounded(ends, size, wait):
    pace = Pace(measured(0.001, 0.02))
    now = 0.0
    for seconds, answered, waiting in ends:
        now += seconds
        pace.began(waiting or 1)
        pace.ended(now, answered, waiting)
    due = pace.due(now, size, now, most=64, wait=wait, free=True, idle=True)
    assert now <= due <= now + max(0.0201, wait)
    assert pace.due(now, size, now, most=64, wait=wait, free=False, idle=False) == math.inf
    assert pace.due(now + 1.0, size, now, most=64, wait=wait, free=True, idle=True) <= now + 1.0
