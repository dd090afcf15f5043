from __future__ import annotations

import random
from dataclasses import dataclass

import credits_simulator as simulator
import pytest
from credits_simulator import Simulation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dask_serve.policy.backlog import BACKGROUND_EVERY
from dask_serve.policy.dispatch import ASKED_AT_LEAST, FAR, PATIENCE, Dispatcher
from dask_serve.policy.levels import ANSWERS, LONGEST
from dask_serve.policy.target import STALE_AFTER, Target


@dataclass(eq=False)
class Call:
    since: float = 0.0
    dropped: bool = False
    number: int = 0
    background: bool = False
    prefers: frozenset[str] | None = None
    model_id: str = ""
    urgent: bool = False
    deadline: float | None = None
    sent: float = 0.0
    found: int = 0


class Port:
    """Notes what a dispatcher tells the world."""

    def __init__(self) -> None:
        self.sent: list[tuple[Target, Call, bool]] = []
        self.wants: list[tuple[str, int, float]] = []
        self.urgent: list[bool] = []
        self.returned: list[Target] = []

    def send(self, target: Target, call: Call, credit: bool) -> None:
        self.sent.append((target, call, credit))

    def want(self, target: Target, count: int, online: int, oldest: float, urgent: bool) -> None:
        self.wants.append((target.id, count, oldest))
        self.urgent.append(urgent)

    def give_back(self, target: Target) -> None:
        self.returned.append(target)

    def take_wants(self) -> list[tuple[str, int, float]]:
        wants, self.wants = self.wants, []
        return wants


def make(replicas: int, limit: int = 1) -> tuple[Dispatcher, Port, list[Target]]:
    port = Port()
    dispatcher = Dispatcher(port, random.Random(0).random)
    targets = [Target(f"r{i}", limit) for i in range(replicas)]
    for target in targets:
        dispatcher.add(target, 0.0)
    return dispatcher, port, targets


def submit(dispatcher: Dispatcher, count: int = 1, now: float = 0.0) -> list[Call]:
    calls = [Call(now, number=i) for i in range(count)]
    for call in calls:
        dispatcher.submit(call)
    return calls


def fill_up(dispatcher: Dispatcher) -> None:
    """Send as much as goes out unasked."""
    submit(dispatcher, sum(target.limit for target in dispatcher.targets.values()))
    assert not dispatcher.queued


def test_unasked_up_to_the_limit():
    dispatcher, port, targets = make(3, limit=2)
    submit(dispatcher, 6)
    assert [target.mine for target in targets] == [2, 2, 2]
    assert not any(credit for _, _, credit in port.sent)
    assert port.wants == []
    submit(dispatcher)
    assert dispatcher.queued == 1
    assert sorted(port.take_wants()) == [("r0", 1, 0.0), ("r1", 1, 0.0), ("r2", 1, 0.0)]


def test_the_less_loaded_of_two():
    dispatcher, port, (busy, _) = make(2, limit=100)
    for _ in range(20):
        submit(dispatcher, 1, now=1.0)
        dispatcher.answered(port.sent[-1][0], 60 if port.sent[-1][0] is busy else 0, 0, 0, 1.0)
    assert sum(target is busy for target, _, _ in port.sent) <= 1
    # What was heard of others is believed for a while only.
    assert busy.load(1.0 + STALE_AFTER / 2) == 60
    assert busy.load(1.0 + STALE_AFTER * 2) == 0


def placed(*places: str, limit: int = 1) -> tuple[Dispatcher, Port, list[Target]]:
    dispatcher, port, targets = make(len(places), limit)
    for target, place in zip(targets, places, strict=True):
        target.places = frozenset([place, f"worker of {target.id}"])
    return dispatcher, port, targets


def test_calls_go_where_their_largest_argument_is():
    dispatcher, port, (_, here, _) = placed("p", "q", "r", limit=100)
    for _ in range(50):
        dispatcher.submit(Call(prefers=frozenset(["q", "unknown"])))
    assert all(target is here for target, *_ in port.sent)
    dispatcher.submit(Call(prefers=frozenset(["worker of r1"])))
    assert here.mine == 51


def test_the_least_loaded_of_those_that_have_it():
    dispatcher, _port, (one, two, three) = placed("p", "q", "q", limit=10)
    for _ in range(20):
        dispatcher.submit(Call(prefers=frozenset(["q"])))
    assert (one.mine, two.mine, three.mine) == (0, 10, 10)
    # Both are full: any other.
    dispatcher.submit(Call(prefers=frozenset(["q"])))
    assert one.mine == 1
    two.mine = 0
    two.usable = False
    dispatcher.submit(Call(prefers=frozenset(["q"])))
    assert (one.mine, two.mine) == (2, 0)


def test_a_place_that_nobody_has_is_any_place():
    dispatcher, _port, targets = placed("p", "q", limit=100)
    for _ in range(100):
        dispatcher.submit(Call(prefers=frozenset(["gone"])))
    assert all(20 < target.mine < 80 for target in targets)


def test_urgent_ones_go_first_and_say_so():
    dispatcher, port, (target,) = make(1)
    fill_up(dispatcher)
    submit(dispatcher, 3)
    assert port.urgent == [False, False]
    urgent = [Call(urgent=True, number=i) for i in range(2)]
    for call in urgent:
        dispatcher.submit(call)
    # Told at once, though the level has hardly changed.
    assert port.urgent == [False, False, True]
    dispatcher.credited(target, 0.0)
    dispatcher.refused(target, urgent[0], 1, 0, 0.0)
    for _ in range(2):
        dispatcher.credited(target, 0.0)
    assert [call for _, call, _ in port.sent[1:]] == [urgent[0], *urgent]
    assert port.urgent[-1] is False
    assert dispatcher.queued == 3


def test_several_refused_ones_keep_their_order():
    """Whoever waits for the first may be the one who makes room for the others."""
    dispatcher, port, (target,) = make(1, limit=3)
    calls = [Call(float(i), number=i) for i in range(5)]
    for call in calls:
        dispatcher.submit(call)
    for call in calls[:3]:
        dispatcher.refused(target, call, 3, 0, 5.0)
    for _ in calls:
        dispatcher.credited(target, 5.0)
    assert [call.number for _, call, _ in port.sent[3:]] == [0, 1, 2, 3, 4]


def test_silent_replicas_get_nothing_new():
    dispatcher, port, (one, two) = make(2, limit=2)
    one.usable = False
    submit(dispatcher, 3)
    assert (one.mine, two.mine, dispatcher.queued) == (0, 2, 1)
    assert [name for name, *_ in port.take_wants()] == ["r1"]
    one.usable = True
    dispatcher.fill(0.0)
    assert ("r0", 1, 0.0) in port.wants


def test_others_are_asked_in_place_of_a_silent_one():
    dispatcher, port, targets = make(6)
    fill_up(dispatcher)
    submit(dispatcher)
    silent = next(target for target in targets if target.asked)
    silent.usable = False
    dispatcher.silent(silent, 0.0)
    assert not silent.asked
    assert sum(target.asked for target in targets) == ASKED_AT_LEAST
    # The want stands there nevertheless, and where it is answered that is welcome.
    dispatcher.credited(silent, 0.0)
    assert port.sent[-1][0] is silent


def test_the_level_is_told_when_it_doubles_or_halves():
    dispatcher, port, (target,) = make(1)
    target.limit = 100
    target.mine = 100
    told = []
    for _ in range(9):
        submit(dispatcher)
        told += [count for _, count, _ in port.take_wants()]
    assert told == [1, 2, 4, 8]
    for _ in range(9):
        dispatcher.credited(target, 0.0)
        told += [count for _, count, _ in port.take_wants()]
    assert told == [1, 2, 4, 8, 4, 2, 1, 0]


def test_no_chatter_around_a_level():
    """Requests that are refused or cancelled as fast as they come move a backlog to and fro between 7 and 8."""
    dispatcher, port, (target,) = make(1)
    target.limit = target.mine = 100
    calls = submit(dispatcher, 8)
    port.take_wants()
    for _ in range(10):
        calls[-1].dropped = True
        dispatcher.cancelled(calls[-1], 0.0)
        calls += submit(dispatcher)
    assert port.wants == []


def test_all_that_waits_is_told():
    """However few of it the replica can hold: the sum over all routers is what `max_queued_requests` is about."""
    dispatcher, port, _ = make(1, limit=2)
    submit(dispatcher, 20)
    assert port.wants[-1] == ("r0", 16, 0.0)
    dispatcher.levels.step = 2
    submit(dispatcher, 1)
    assert port.wants[-1] == ("r0", 19, 0.0)


@pytest.mark.parametrize("queued", [1, 3, 7, 40])
def test_a_longer_backlog_asks_more_replicas(queued: int):
    dispatcher, _, targets = make(16)
    fill_up(dispatcher)
    submit(dispatcher, queued)
    told = 1 << queued.bit_length() - 1
    assert sum(target.asked for target in targets) == min(16, max(ASKED_AT_LEAST, told))


def test_what_waits_for_long_is_asked_of_all():
    """The few that were asked may be stuck with long requests while others are free."""
    dispatcher, port, targets = make(16)
    fill_up(dispatcher)
    submit(dispatcher, now=1.0)
    assert sum(target.asked for target in targets) == ASKED_AT_LEAST
    dispatcher.remind(1.0 + PATIENCE / 2)
    assert sum(target.asked for target in targets) == ASKED_AT_LEAST
    port.take_wants()
    dispatcher.remind(1.5)
    assert sorted(port.take_wants()) == sorted((target.id, 1, 0.5) for target in targets)
    # Once more, in case that it was not heard.
    dispatcher.remind(2.0)
    assert len(port.take_wants()) == 16
    dispatcher.credited(targets[3], 2.0)
    assert sorted(port.take_wants()) == sorted((target.id, 0, 0.0) for target in targets)
    dispatcher.remind(9.0)
    assert port.wants == []


def test_a_credit_is_used_or_returned():
    dispatcher, port, (target,) = make(1)
    fill_up(dispatcher)
    (call,) = submit(dispatcher)
    dispatcher.credited(target, 1.0)
    assert port.sent[-1] == (target, call, True)
    dispatcher.credited(target, 1.0)
    assert port.returned == [target]


def test_credits_in_an_answer():
    dispatcher, port, (target,) = make(1, limit=3)
    fill_up(dispatcher)
    calls = submit(dispatcher, 2)
    dispatcher.answered(target, 2, 2, 3, 1.0)
    assert port.sent[-2:] == [(target, calls[0], True), (target, calls[1], True)]
    assert port.returned == [target]
    assert target.mine == 4


def test_an_answer_lets_in_as_many_as_have_room():
    dispatcher, port, (target,) = make(1, limit=5)
    target.mine = 5
    submit(dispatcher, 6)
    # 4 of its own are there still by its count; the replica says that 2 run, and nobody waits.
    target.mine = 3
    dispatcher.answered(target, 2, 0, 0, 1.0)
    assert [credit for _, _, credit in port.sent] == [False] * 3
    assert target.mine == 5
    # Others wait for it: its slots are theirs.
    dispatcher.answered(target, 4, 1, 0, 1.0)
    assert len(port.sent) == 3


def test_refused_goes_back_to_the_head():
    dispatcher, port, (target,) = make(1, limit=2)
    first, second, third = submit(dispatcher, 3)
    dispatcher.refused(target, second, 2, 0, 1.0)
    dispatcher.refused(target, first, 2, 0, 1.0)
    assert dispatcher.queued == 3
    for _ in range(3):
        dispatcher.credited(target, 1.0)
    assert [call for _, call, credit in port.sent if credit] == [first, second, third]


def test_refused_after_it_was_given_up():
    dispatcher, port, (target,) = make(1)
    (call,) = submit(dispatcher)
    call.dropped = True
    dispatcher.refused(target, call, 1, 0, 1.0)
    assert (dispatcher.queued, port.wants) == (0, [])


def test_cancelled_while_it_waits():
    dispatcher, port, (target,) = make(1)
    fill_up(dispatcher)
    calls = submit(dispatcher, 3)
    for call in calls[:2]:
        call.dropped = True
        dispatcher.cancelled(call, 0.0)
    dispatcher.credited(target, 1.0)
    assert port.sent[-1][1] is calls[2]
    assert port.wants[-1] == ("r0", 0, 0.0)


def test_given_up_requests_do_not_pile_up():
    """Behind one that waits for ever, since there is no replica."""
    dispatcher, _, _ = make(0)
    submit(dispatcher)
    for _ in range(1000):
        (call,) = submit(dispatcher)
        call.dropped = True
        dispatcher.cancelled(call, 0.0)
    assert dispatcher.queued == 1
    assert len(dispatcher._backlog) <= 3


def test_nothing_is_kept_alive_by_an_empty_backlog():
    dispatcher, _, (target,) = make(1)
    fill_up(dispatcher)
    calls = submit(dispatcher, 3)
    calls[2].dropped = calls[1].dropped = True
    dispatcher.cancelled(calls[2], 0.0)
    dispatcher.cancelled(calls[1], 0.0)
    dispatcher.credited(target, 0.0)
    assert len(dispatcher._backlog) == 0


def test_new_replicas_are_asked_at_once():
    """However many others are asked already: a backlog that stands must not keep scaling up from helping."""
    dispatcher, port, _ = make(8)
    fill_up(dispatcher)
    submit(dispatcher, 20)
    port.take_wants()
    names = [f"new{i}" for i in range(3)]
    for name in names:
        dispatcher.add(Target(name, 4), 1.0)
    assert {name: count for name, count, _ in port.wants if name.startswith("new")} == {
        "new0": 20,
        "new1": 20,
        "new2": 20,
    }


def test_the_first_replica_is_asked_for_what_waited():
    dispatcher, port, _ = make(0)
    submit(dispatcher, 3)
    assert port.wants == []
    dispatcher.add(Target("r0", 10), 2.0)
    assert port.wants == [("r0", 3, 2.0)]


def test_another_is_asked_in_place_of_one_that_went():
    dispatcher, port, targets = make(5)
    fill_up(dispatcher)
    submit(dispatcher)
    (left_out,) = [target for target in targets if not target.asked]
    asked = next(target for target in targets if target.asked)
    dispatcher.remove(asked, 0.0)
    assert left_out.asked
    # A late credit of the one that went is returned, so that nobody waits for it to lapse.
    dispatcher.credited(asked, 0.0)
    assert port.returned == [asked]


def test_the_same_replica_after_a_new_connection():
    dispatcher, port, (old,) = make(1)
    dispatcher.remove(old, 0.0)
    new = Target(old.id, 1)
    dispatcher.add(new, 0.0)
    dispatcher.remove(old, 0.0)
    assert dispatcher.targets == {new.id: new}
    fill_up(dispatcher)
    submit(dispatcher)
    dispatcher.answered(old, 0, 0, 1, 0.0)
    assert dispatcher.queued == 1
    assert port.returned == [old]


def test_put_back():
    dispatcher, port, (one, two) = make(2)
    first, _, third = submit(dispatcher, 3)
    dispatcher.remove(one, 0.0)
    dispatcher.put_back(first, 0.0)
    assert dispatcher.queued == 2
    dispatcher.credited(two, 0.0)
    dispatcher.credited(two, 0.0)
    assert [call for _, call, credit in port.sent if credit] == [first, third]
    two.mine = 0
    dispatcher.put_back(third, 0.0)
    assert port.sent[-1] == (two, third, False)


def test_take_all():
    dispatcher, port, _ = make(1)
    fill_up(dispatcher)
    calls = submit(dispatcher, 3)
    calls[1].dropped = True
    dispatcher.cancelled(calls[1], 0.0)
    assert dispatcher.take_all() == [calls[0], calls[2]]
    assert dispatcher.queued == 0
    assert port.wants[-1] == ("r0", 0, 0.0)
    assert dispatcher.take_all() == []


def test_background_requests_let_online_ones_go_first():
    dispatcher, port, (target,) = make(1)
    fill_up(dispatcher)
    port.sent.clear()
    for i in range(5):
        dispatcher.submit(Call(number=i, background=True))
    for i in range(25):
        dispatcher.submit(Call(number=i))
    for _ in range(30):
        dispatcher.credited(target, 1.0)
    left = [(call.background, call.number) for _, call, _ in port.sent]
    # One of ten is a background one, so that they never wait for ever; each class keeps its order.
    assert [place for place, (background, _) in enumerate(left) if background] == [9, 19, 27, 28, 29]
    assert [number for background, number in left if background] == list(range(5))
    assert [number for background, number in left if not background] == list(range(25))
    assert (dispatcher.queued, port.wants[-1]) == (0, ("r0", 0, 0.0))


def test_refused_background_requests_keep_their_place():
    dispatcher, port, (target,) = make(1, limit=2)
    first, second = (Call(background=True, number=i) for i in range(2))
    for call in (first, second):
        dispatcher.submit(call)
    dispatcher.refused(target, first, 2, 0, 1.0)
    dispatcher.submit(online := Call(1.0))
    for _ in range(2):
        dispatcher.credited(target, 1.0)
    assert [call for _, call, _ in port.sent] == [first, online, first, second]


def test_a_replica_elsewhere_serves_those_first_that_are_near_to_it():
    dispatcher, port, targets = placed("p", "q")
    fill_up(dispatcher)
    for _ in range(2):
        dispatcher.submit(Call(background=True, prefers=frozenset(["p"])))
    dispatcher.remind(0.2)
    assert {name: oldest for name, _, oldest in port.wants[-2:]} == {
        "r0": pytest.approx(0.2),
        "r1": pytest.approx(0.2 - FAR),
    }
    # A credit from there is used all the same: nobody else waits for it.
    dispatcher.credited(targets[1], 0.2)
    assert port.sent[-1][0] is targets[1]
    # Where online ones wait too it makes no difference.
    submit(dispatcher, 1, 0.3)
    dispatcher.remind(0.5)
    assert [oldest for _, _, oldest in port.wants[-2:]] == pytest.approx([0.5, 0.5])


def test_background_requests_do_not_go_unasked_to_where_others_run():
    dispatcher, port, (target,) = make(1, limit=10)
    online = submit(dispatcher)[0]
    dispatcher.submit(behind := Call(background=True))
    assert [call for _, call, _ in port.sent] == [online]
    # Online ones do not wait for it.
    others = submit(dispatcher, 2)
    assert [call for _, call, _ in port.sent] == [online, *others]
    dispatcher.answered(target, 2, 0, 0, 0.1)
    assert dispatcher.queued == 1
    dispatcher.answered(target, 1, 0, 0, 0.2)
    dispatcher.answered(target, 0, 0, 0, 0.3)
    assert port.sent[-1] == (target, behind, False)


def test_the_oldest_of_both_classes_is_told():
    dispatcher, port, _ = make(1)
    fill_up(dispatcher)
    dispatcher.submit(Call(1.0, background=True))
    submit(dispatcher, 3, now=3.0)
    assert port.wants[-1] == ("r0", 3, 2.0)
    port.take_wants()
    dispatcher.remind(5.0)
    assert port.wants[-1][2] == 4.0


def test_others_backlogs_are_known_from_answers():
    dispatcher, _, (target,) = make(1)
    submit(dispatcher, 4)
    # 3 wait here; it was told of them when they were 1, and 2.
    assert dispatcher.everywhere(0.0) == 3
    dispatcher.answered(target, 1, 10, 0, 1.0)
    assert dispatcher.everywhere(1.0) == 3 + 10 - 2
    assert dispatcher.everywhere(1.0 + 2 * STALE_AFTER) == 3


@pytest.mark.parametrize(("taken", "believed"), [(0.5, 0.5 * ANSWERS), (60.0, LONGEST)])
def test_where_requests_are_slow_others_backlogs_are_believed_for_longer(taken, believed):
    dispatcher, _, (target,) = make(1)
    calls = submit(dispatcher, 4)
    dispatcher.foresight.learn(target, calls[0], taken)
    dispatcher.answered(target, 1, 10, 0, taken)
    assert dispatcher.everywhere(taken + 0.9 * believed) == 3 + 10 - 2
    assert dispatcher.everywhere(taken + 1.1 * believed) == 3


def test_answers_on_their_way_count_what_waited_here():
    dispatcher, _, (target,) = make(1)
    calls = submit(dispatcher, 101)
    for call in calls[1:]:
        call.dropped = True
        dispatcher.cancelled(call, 1.0)
    # The replica had not heard of that yet.
    dispatcher.answered(target, 0, 64, 0, 1.01)
    submit(dispatcher, 2, now=1.02)
    assert dispatcher.everywhere(1.02) == dispatcher.queued == 1


# -- every method in every order


class DispatchMachine(RuleBasedStateMachine):
    """Replicas that answer whatever they like. Each call is at one place, and no want or credit is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.port = Port()
        self.dispatcher = Dispatcher(self, random.Random(0).random)
        self.targets: list[Target] = []
        self.sent: list[tuple[Target, Call]] = []
        self.waiting: list[Call] = []
        #: Online calls that went while a background one waited.
        self.passed = 0
        self.count = 0
        self.submitting = False
        #: What is sent now does not come out of the backlog.
        self.direct = False
        self.expected: bool | None = None
        self.wants: dict[Target, int] = {}
        self.told: dict[Target, bool] = {}

    # The port.
    def send(self, target: Target, call: Call, credit: bool) -> None:
        assert not call.dropped
        assert target in self.targets
        if self.direct:
            self.waiting.remove(call)
        elif call in self.waiting:
            urgent, online, background = self.classes()
            assert call is (background if call.background else urgent or online)[0], "out of turn"
            if any(other.background != call.background for other in self.waiting):
                assert call.background == (self.passed == BACKGROUND_EVERY - 1), "the wrong class"
            self.passed = 0 if call.background or not self.in_background() else self.passed + 1
            self.waiting.remove(call)
        if not credit:
            assert target.usable
            assert target.mine <= target.limit
        if self.submitting:
            near = [other for other in self.targets if call.prefers and call.prefers & other.places]
            near = [other for other in near if other.usable and other.mine - (other is target) < other.limit]
            assert not near or target in near
        self.sent.append((target, call))

    def want(self, target: Target, count: int, online: int, oldest: float, urgent: bool) -> None:
        assert 0 <= online <= count
        far = any(call.prefers and not call.prefers & target.places for call in self.in_background())
        assert oldest >= (-FAR if far and not online else 0)
        self.wants[target] = count
        self.told[target] = urgent

    def give_back(self, target: Target) -> None:
        assert not self.dispatcher.queued or target not in self.targets
        self.returned = True

    @initialize(replicas=st.integers(0, 6))
    def begin(self, replicas: int) -> None:
        for _ in range(replicas):
            self.add(2)

    @rule(limit=st.integers(1, 3))
    def add(self, limit: int) -> None:
        target = Target(
            f"r{self.count}", limit, places=frozenset((f"process-{self.count % 3}", f"worker-{self.count}"))
        )
        self.count += 1
        self.targets.append(target)
        self.dispatcher.add(target, self.now)

    def in_background(self) -> list[Call]:
        return [call for call in self.waiting if call.background]

    def classes(self) -> list[list[Call]]:
        """What waits, by class: urgent, online, background."""
        online = [call for call in self.waiting if not call.background]
        return [
            [call for call in online if call.urgent],
            [call for call in online if not call.urgent],
            self.in_background(),
        ]

    @rule(
        background=st.booleans(),
        urgent=st.booleans(),
        prefers=st.sampled_from([None, frozenset(["process-1"]), frozenset(["worker-0", "w"])]),
    )
    def submit(self, background: bool, urgent: bool, prefers: frozenset[str] | None) -> None:
        call = Call(self.now, background=background, urgent=urgent, prefers=prefers)
        self.waiting.append(call)
        waited = any(background or not other.background for other in self.waiting[:-1])
        self.submitting = self.direct = True
        self.dispatcher.submit(call)
        self.submitting = self.direct = False
        assert not waited or call in self.waiting

    def back(self, call: Call) -> None:
        """In front of all of its class that are not older."""
        kind = call.background, call.urgent and not call.background
        for place, other in enumerate(self.waiting):
            if (other.background, other.urgent and not other.background) == kind and other.since >= call.since:
                self.waiting.insert(place, call)
                return
        self.waiting.append(call)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        call = data.draw(st.sampled_from(self.waiting))
        call.dropped = True
        self.waiting.remove(call)
        self.dispatcher.cancelled(call, self.now)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), running=st.integers(0, 5), wanted=st.integers(0, 2), credits=st.integers(0, 3))
    def answer(self, data, running: int, wanted: int, credits: int) -> None:
        target, _ = self.take(data)
        self.dispatcher.answered(target, running, wanted, credits, self.now)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), dropped=st.booleans())
    def refuse(self, data, dropped: bool) -> None:
        target, call = self.take(data)
        call.dropped = dropped
        if not dropped:
            self.back(call)
        self.dispatcher.refused(target, call, target.limit, 0, self.now)

    def take(self, data) -> tuple[Target, Call]:
        index = data.draw(st.integers(0, len(self.sent) - 1))
        return self.sent.pop(index)

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def credit(self, data) -> None:
        before = len(self.sent)
        self.returned = False
        self.dispatcher.credited(data.draw(st.sampled_from(self.targets)), self.now)
        assert (len(self.sent) == before + 1) != self.returned

    @precondition(lambda self: self.targets)
    @rule(data=st.data(), again=st.booleans())
    def remove(self, data, again: bool) -> None:
        target = data.draw(st.sampled_from(self.targets))
        self.targets.remove(target)
        self.wants.pop(target, None)
        self.dispatcher.remove(target, self.now)
        calls = [call for other, call in self.sent if other is target]
        self.sent = [(other, call) for other, call in self.sent if other is not target]
        for call in calls:
            target.mine -= 1
            if again:
                self.back(call)
                self.direct = True
                self.dispatcher.put_back(call, self.now)
                self.direct = False
        self.returned = False
        self.dispatcher.credited(target, self.now)
        assert self.returned

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def toggle(self, data) -> None:
        target = data.draw(st.sampled_from(self.targets))
        target.usable = not target.usable
        if target.usable:
            self.dispatcher.fill(self.now)
        else:
            # The want stands there still; its credit is used, or returned.
            self.wants.pop(target, None)
            self.dispatcher.silent(target, self.now)

    @precondition(lambda self: self.targets)
    @rule(data=st.data(), limit=st.integers(1, 3))
    def change_limit(self, data, limit: int) -> None:
        for target in self.targets:
            target.limit = limit

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.remind(self.now)
        if any(self.now - calls[0].since >= PATIENCE for calls in self.classes() if calls):
            assert all(target.asked for target in self.targets if target.usable)

    @invariant()
    def everything_is_somewhere(self) -> None:
        dispatcher = self.dispatcher
        assert dispatcher.queued == len(self.waiting)
        assert list(dispatcher._backlog) == [call for calls in self.classes() for call in calls]
        for target in self.targets:
            assert target.mine == sum(other is target for other, _ in self.sent)
            # What it says of itself is what the replica was told last.
            assert target.asked == bool(self.wants.get(target))
        asked = sum(target.asked for target in self.targets)
        if not self.waiting:
            assert not asked
        else:
            assert asked >= min(ASKED_AT_LEAST, sum(target.usable for target in self.targets))
            assert not any(target.asked for target in self.targets if not target.usable)
            urgent, _, background = self.classes()
            may_be = bool(urgent) or (bool(background) and background[0].urgent)
            assert all(self.told[target] == may_be for target in self.targets if target.asked)

    def teardown(self) -> None:
        for call in self.dispatcher.take_all():
            self.waiting.remove(call)
        assert not self.waiting
        assert not any(target.asked for target in self.targets)


TestDispatchMachine = DispatchMachine.TestCase
TestDispatchMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# -- both halves together


def test_a_router_that_stood_still_hangs_not():
    """Its credits lapse, no level changes: only that it answers the credits late tells the replica that it is there."""
    sim = Simulation(replicas=1, routers=2, limit=2, service=0.05, constant=True, reminding=False)
    slow, other = sim.routers
    for _ in range(60):
        sim.at(0.0, other.submit)
    for _ in range(7):
        sim.at(0.01, slow.submit)
    sim.at(0.03, sim.freeze, slow, 0.7)
    sim.run(0.6)
    assert sim.replicas[0].admission._silent
    sim.finish(within=20.0)


def test_a_router_that_forgot_a_replica_and_its_credits():
    """A replica goes on granting to those who asked; each such credit comes back once, not to and fro."""
    sim = Simulation(replicas=1, routers=1, limit=1, service=0.01, constant=True)
    (router,), (replica,) = sim.routers, sim.replicas
    for _ in range(5):
        sim.at(0.0, router.submit)

    def forget() -> None:
        (target,) = router.connections
        router.dispatcher.remove(target, sim.now)

    sim.at(0.005, forget)
    sim.run(1.0)
    assert sim.messages["on_return"] <= 2
    assert (replica.admission.wanted, replica.admission.granted) == (0, 0)
    for request in router.dispatcher.take_all():
        router.backlog.discard(request)
        request.end("gone")
    sim.finish()


def test_scaling_up_under_a_standing_backlog():
    sim = Simulation(replicas=5, routers=2, service=0.02, load=1.4, seed=3)
    sim.at(1.0, sim.add_replica)
    sim.at(1.0, sim.add_replica)
    sim.run(3.0)
    for replica in sim.replicas[5:]:
        assert replica.busy > 0.9 * 2.0
    sim.finish()


def test_cold_start():
    """Requests came before there was a replica."""
    sim = Simulation(replicas=0, routers=3, limit=2, service=0.01)
    for router in sim.routers:
        for _ in range(20):
            sim.at(0.0, router.submit)
    sim.at(1.0, sim.add_replica)
    sim.run(1.05)
    assert sim.replicas[0].busy > 0.9 * 2 * 0.05
    sim.finish()


def test_more_slots_while_all_wait():
    """Raising the limit helps those who wait at once, not when one of the long requests ends."""
    sim = Simulation(replicas=1, routers=2, limit=1, service=5.0, constant=True)
    for router in sim.routers:
        for _ in range(5):
            sim.at(0.0, router.submit)
    sim.at(1.0, lambda: sim.replicas[0].set_limit(8))
    sim.run(1.01)
    assert sim.replicas[0].active == 8
    sim.finish(within=60)


@pytest.mark.parametrize(
    ("row", "seconds", "not_full", "idle", "frames"),
    [
        ("load 0.9", 2.0, 0.01, 0.01, 9),
        ("load 1.3", 1.0, 0.01, 0.01, 5),
        ("load 0.9, 30 % cancelled", 2.0, 0.01, 0.01, 10),
        ("load 0.6, heavy router partitioned", 4.0, 0.01, 0.01, 8),
        ("load 0.9, 8 slots", 1.0, 0.15, 0.04, 10),
        ("load 0.9, 1 ms service", 0.5, 0.06, 0.06, 10),
        ("load 0.9, 50 ms service", 15.0, 0.01, 0.01, 10),
        ("load 0.9, 16 replicas, 12 routers", 0.7, 0.08, 0.08, 10),
    ],
)
def test_figures(row: str, seconds: float, not_full: float, idle: float, frames: float):
    """The table of ``docs/decisions/0002-credits.md``, shorter and with slack."""
    got = simulator.row(row, seconds)
    assert got.not_full < not_full
    assert got.idle_slots < idle
    assert got.messages < frames
    # Who has ten times the requests waits neither for ever nor for nothing.
    assert got.heavy < 3 * got.light + 0.02
    assert got.light < 3 * got.heavy + 0.02


@pytest.mark.parametrize(
    ("row", "busy"),
    [
        ("1 slot, 50 callers, 10 ms", 0.95),
        ("1 slot, 50 callers, 1 ms", 0.85),
        ("the same, 5 routers", 0.85),
        ("2 replicas, 50 callers, 25 ms", 0.95),
    ],
)
def test_one_slot_stays_busy(row: str, busy: float):
    assert simulator.row(row, 1.0).served > busy


FAULTS = ("partition", "retry", "freeze", "kill replica", "add replica", "limit", "kill router")


def strike(sim: Simulation, fault: str, which: float, how: float) -> None:
    """Let something go wrong; ``which`` and ``how`` are in [0, 1)."""
    routers = [router for router in sim.routers if router.alive]
    router = routers[int(which * len(routers))]
    if fault == "partition":
        sim.partition(router, how, again=False)
    elif fault == "retry":
        sim.partition(router, how / 2, again=True)
    elif fault == "freeze":
        sim.freeze(router, how)
    elif fault == "kill replica" and sim.replicas:
        sim.kill_replica(sim.replicas[int(which * len(sim.replicas))], again=how < 0.5)
        sim.after(how / 2, sim.add_replica)
    elif fault == "add replica":
        sim.add_replica()
    elif fault == "limit":
        sim.limit = int(how * 6) + 1
        for replica in sim.replicas:
            replica.set_limit(sim.limit)
    elif fault == "kill router" and len(routers) > 1:
        sim.kill_router(router)


share = st.floats(0, 1, exclude_max=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {
            "replicas": st.sampled_from([1, 2, 5]),
            "routers": st.sampled_from([1, 2, 5]),
            "limit": st.sampled_from([1, 1, 2, 8]),
            "service": st.sampled_from([0.005, 0.03, 0.2]),
            "load": st.sampled_from([0.5, 0.9, 1.5]),
            "cancelled": st.sampled_from([0, 0.3, 0.8]),
            "background": st.sampled_from([0, 0, 0.5, 1.0]),
            "jitter": st.sampled_from([0, 2.0, 20.0]),
            "reminding": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    ),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(FAULTS), share, share), max_size=6),
)
def test_nothing_leaks_and_nothing_hangs(settings: dict, faults: list):
    """Whatever dies: the invariants hold after every event, and at the end every request was answered once."""
    sim = Simulation(**settings)
    for when, *fault in faults:
        sim.at(when, strike, sim, *fault)
    sim.run(1.0)
    sim.finish(within=200.0)
