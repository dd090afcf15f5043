from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dask_serve.policy.admission import AHEAD_BELOW, CREDIT_LIFETIME, Admission


def full(limit: int, service: float = 1.0) -> Admission:
    """Return an admission whose slots are all taken by ``someone``."""
    admission = Admission(limit)
    admission.admit("someone", False)
    admission.finish(service, 0.0)
    while admission.admit("someone", False):
        pass
    return admission


def test_unasked_while_there_is_room():
    admission = Admission(2)
    assert admission.admit("a", False)
    assert admission.admit("b", False)
    assert not admission.admit("a", False)
    assert admission.finish(1.0, 1.0) == []
    assert admission.admit("a", False)


def test_a_freed_slot_goes_to_who_waits():
    admission = full(1)
    assert admission.want("a", 1, 0.0, 1.0) == []
    assert admission.wanted == 1
    assert admission.finish(1.0, 2.0) == ["a"]
    assert not admission.admit("b", False)
    assert admission.admit("a", True)
    assert (admission.running, admission.granted) == (1, 0)


def test_nobody_overtakes_those_who_wait():
    admission = full(2)
    admission.want("a", 5, 0.0, 0.0)
    admission.finish(1.0, 1.0)
    admission.admit("a", True)
    admission.finish(1.0, 2.0)
    assert not admission.admit("b", False)
    # Without a credit a call is unasked, whoever sends it.
    assert not admission.admit("a", False)


def test_the_oldest_first_and_then_in_turn():
    admission = full(3, service=0.9)
    admission.want("young", 9, 0.05, 10.0)
    admission.want("old", 9, 1.0, 10.0)
    granted = []
    for _ in range(12):
        granted += admission.finish(0.9, 10.0)
        assert admission.admit(granted[-1], True)
    # Each credit makes a router younger by the time until the next slot is free: 0.3 s.
    assert granted == ["old"] * 4 + ["young", "old"] * 4


def test_no_more_credits_than_wanted():
    admission = Admission(10)
    assert admission.want("a", 3, 0.0, 0.0) == ["a"] * 3
    assert admission.want("a", 3, 0.0, 0.0) == []
    assert admission.want("b", 20, 0.0, 0.0) == ["b"] * 7
    assert admission.granted == 10


def test_ahead_of_a_free_slot_while_service_is_short():
    admission = Admission(1)
    assert admission.admit("a", False)
    admission.finish(AHEAD_BELOW / 2, 0.0)
    assert admission.ahead == 1
    assert admission.admit("a", False)
    assert admission.admit("a", False)
    assert not admission.admit("a", False)
    for _ in range(100):
        admission.running += 1
        admission.finish(AHEAD_BELOW * 2, 0.0)
    assert admission.ahead == 0
    # One too many is admitted already: it stays, and the next slot is granted to nobody.
    assert admission.want("b", 1, 0.0, 0.0) == []
    assert admission.finish(AHEAD_BELOW * 2, 0.0) == []
    assert admission.finish(AHEAD_BELOW * 2, 0.0) == ["b"]


def test_what_never_ran_teaches_nothing():
    admission = full(1, service=0.5)
    admission.drop(1.0)
    assert admission.service == 0.5
    assert admission.running == 0


def test_a_returned_credit_goes_to_the_next():
    admission = Admission(1)
    assert admission.want("a", 4, 1.0, 0.0) == ["a"]
    assert admission.want("b", 1, 0.0, 0.0) == []
    assert admission.give_back("a", 0.0) == ["b"]


def test_a_router_that_returns_a_credit_wants_nothing():
    """Else a replica and a router that forgot it would send each other the same credit for ever."""
    admission = Admission(1)
    assert admission.want("a", 4, 1.0, 0.0) == ["a"]
    assert admission.give_back("a", 0.0) == []
    assert admission.wanted == admission.granted == 0
    assert admission.admit("b", False)


def test_credits_lapse():
    admission = Admission(1)
    assert admission.next_lapse() is None
    admission.want("dead", 2, 5.0, 0.0)
    assert admission.next_lapse() == CREDIT_LIFETIME
    admission.want("b", 1, 0.0, 0.1)
    assert admission.lapse(0.2) == []
    assert admission.lapse(CREDIT_LIFETIME) == ["b"]
    assert admission.wanted == 1
    assert admission.admit("b", True)
    # The silent one gets nothing more, and keeps nobody from being admitted.
    admission.want("b", 0, 0.0, 0.3)
    assert admission.finish(1.0, 0.4) == []
    assert admission.admit("c", False)


@pytest.mark.parametrize("room", [True, False])
def test_a_silent_router_is_heard_of_again(room: bool):
    """It stood still, and its want still holds: it will not repeat that, since nothing changed for it."""
    admission = Admission(1)
    admission.want("slow", 2, 0.0, 0.0)
    admission.lapse(1.0)
    if not room:
        assert admission.admit("b", False)
    assert admission.admit("slow", True) is room
    assert admission.wanted == 2
    assert admission.finish(1.0, 2.0) == ["slow"]


def test_a_silent_router_returns_its_credit():
    admission = Admission(1)
    admission.want("slow", 2, 0.0, 0.0)
    admission.lapse(1.0)
    assert admission.give_back("slow", 2.0) == []
    assert admission.granted == admission.wanted == 0
    admission.want("slow", 1, 0.0, 2.0)
    assert admission.granted == 1


def test_a_lapsed_credit_overtakes_nobody():
    admission = Admission(1)
    admission.want("slow", 2, 0.0, 0.0)
    admission.want("b", 1, 0.0, 0.0)
    assert admission.lapse(1.0) == ["b"]
    assert not admission.admit("slow", True)
    assert admission.admit("b", True)


def test_used_credits_do_not_lapse():
    admission = Admission(3)
    assert admission.want("a", 2, 0.0, 0.0) == ["a", "a"]
    assert admission.admit("a", True)
    # The first of the two was used; this one is younger.
    assert admission.want("a", 2, 0.0, 0.2) == ["a"]
    assert admission.lapse(CREDIT_LIFETIME) == []
    assert admission.granted == 1
    assert admission.wanted == 0
    admission.lapse(0.2 + CREDIT_LIFETIME)
    assert admission.granted == 0


def test_a_lost_router_takes_its_wants_and_credits_along():
    admission = Admission(2)
    admission.want("a", 2, 1.0, 0.0)
    admission.want("b", 1, 0.0, 0.0)
    assert admission.lost("a", 0.1) == ["b"]
    assert admission.lost("b", 0.1) == []
    assert (admission.granted, admission.wanted, admission.next_lapse()) == (0, 0, None)
    assert admission.lost("never heard of", 0.1) == []


def test_the_limit_changes_in_place():
    admission = full(1)
    admission.want("a", 5, 0.0, 0.0)
    assert admission.resize(3, 0.0) == ["a", "a"]
    assert admission.resize(1, 0.0) == []
    assert admission.admit("a", True)
    assert admission.admit("a", True)
    assert admission.finish(1.0, 0.0) == []
    assert admission.finish(1.0, 0.0) == []
    assert admission.finish(1.0, 0.0) == ["a"]


def test_calls_that_may_store_are_held_back():
    admission = Admission(10)
    assert admission.hold_back(2, 0.0) == []
    assert [admission.admit("a", False) for _ in range(3)] == [True, True, False]
    assert admission.want("a", 8, 0.0, 0.0) == []
    assert admission.held_back
    assert admission.finish(1.0, 0.0) == ["a"]
    assert admission.finish(1.0, 0.0) == ["a"]
    assert (admission.storing, admission.granted) == (0, 2)
    assert admission.hold_back(None, 0.0) == ["a"] * 6
    assert not admission.held_back


def test_urgent_ones_are_not_held_back():
    admission = Admission(3)
    admission.hold_back(0, 0.0)
    admission.want("a", 5, 0.0, 0.0)
    # Neither by the room, nor by those who wait for it; only by the slots.
    assert admission.admit("http", False, urgent=True)
    assert admission.want("b", 5, 0.0, 0.0, urgent=True) == ["b"] * 2
    assert admission.admit("b", True, urgent=True)
    assert admission.storing == 0
    assert not admission.admit("http", False, urgent=True)
    assert admission.finish(1.0, 0.0, urgent=True) == ["b"]
    admission.want("b", 0, 0.0, 0.0)
    assert admission.held_back


def test_a_credit_that_came_for_an_urgent_one_is_of_no_use_to_others():
    admission = Admission(2)
    admission.hold_back(0, 0.0)
    assert admission.want("a", 3, 0.0, 0.0, urgent=True) == ["a", "a"]
    assert not admission.admit("a", True)
    assert admission.granted == 1
    # And the router is not granted the same again.
    assert admission.hold_back(0, 0.0) == []
    assert admission.want("a", 3, 0.0, 0.0, urgent=True) == ["a"]


def test_a_credit_given_before_there_was_less_room():
    admission = Admission(5)
    admission.hold_back(2, 0.0)
    assert admission.want("a", 5, 0.0, 0.0) == ["a", "a"]
    admission.hold_back(1, 0.0)
    assert admission.admit("a", True)
    assert not admission.admit("a", True)
    assert (admission.running, admission.granted) == (1, 0)
    assert admission.finish(1.0, 0.0) == ["a"]


ROUTERS = st.sampled_from("abcd")


class AdmissionMachine(RuleBasedStateMachine):
    """Every method in every order. The model knows each credit that is out, by its time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.admission = Admission(2)
        self.credits: dict[str, deque[float]] = {router: deque() for router in "abcd"}
        self.allowed = 2
        self.allowed_storing = 0
        self.urgent = 0

    def granted(self, routers: list) -> None:
        for router, count in Counter(routers).items():
            self.credits[router].extend([self.now] * count)
        # No slot stays free while a router that is heard of waits for it.
        admission = self.admission
        if admission.running + admission.granted < admission.limit + admission.ahead:
            for router, want in admission._wants.items():
                assert want.count <= len(self.credits[router]) or (self.held_back() and not want.urgent)

    def held_back(self) -> bool:
        admission = self.admission
        return admission.most is not None and admission.storing + admission.granted >= admission.most

    @rule(router=ROUTERS, credit=st.booleans(), urgent=st.booleans())
    def call(self, router: str, credit: bool, urgent: bool) -> None:
        admission = self.admission
        before = admission.running
        room = before + admission.granted < admission.limit + admission.ahead
        held_back = self.held_back() and not urgent
        open_to_all = admission.most is None or not urgent
        waited = any(open_to_all or want.urgent for want in admission._wants.values())
        has_room = urgent or admission.most is None or admission.storing < admission.most
        admitted = admission.admit(router, credit, urgent)
        if credit and self.credits[router]:
            self.credits[router].popleft()
            assert admitted == has_room
            if not admitted:
                # As the replica does it: the slot is free.
                self.granted(admission.hold_back(admission.most, self.now))
        elif credit:
            assert admitted == (room and not held_back)
        else:
            assert admitted == (room and not waited and not held_back)
        assert admission.running == before + admitted
        self.urgent += admitted and urgent

    @precondition(lambda self: self.admission.running)
    @rule(service=st.sampled_from([0.0, 0.001, 0.1, 3.0]), urgent=st.booleans())
    def finish(self, service: float, urgent: bool) -> None:
        self.granted(self.admission.finish(service, self.now, self.one_of(urgent)))

    @precondition(lambda self: self.admission.running)
    @rule(urgent=st.booleans())
    def drop(self, urgent: bool) -> None:
        self.granted(self.admission.drop(self.now, self.one_of(urgent)))

    def one_of(self, urgent: bool) -> bool:
        """Say which kind ends, where there is one of that kind."""
        urgent = bool(self.urgent) if urgent else not self.admission.storing
        self.urgent -= urgent
        return urgent

    @rule(most=st.sampled_from([None, 0, 1, 3]))
    def hold_back(self, most: int | None) -> None:
        self.granted(self.admission.hold_back(most, self.now))

    @rule(router=ROUTERS, count=st.integers(0, 5), oldest=st.floats(0, 10), urgent=st.booleans())
    def want(self, router: str, count: int, oldest: float, urgent: bool) -> None:
        self.granted(self.admission.want(router, count, oldest, self.now, urgent=urgent))

    @rule(router=ROUTERS)
    def give_back(self, router: str) -> None:
        if self.credits[router]:
            self.credits[router].popleft()
        self.granted(self.admission.give_back(router, self.now))

    @rule(router=ROUTERS)
    def lose(self, router: str) -> None:
        self.credits[router].clear()
        self.granted(self.admission.lost(router, self.now))

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.2, CREDIT_LIFETIME, 5.0]))
    def pass_time(self, seconds: float) -> None:
        """As the replica's timer does it: at each moment at which something is due."""
        end = self.now + seconds
        while (due := self.admission.next_lapse()) is not None and due <= end:
            self.now = max(self.now, due)
            silent = []
            for router, times in self.credits.items():
                while times and times[0] + CREDIT_LIFETIME <= self.now:
                    times.popleft()
                    silent.append(router)
            granted = self.admission.lapse(self.now)
            assert not set(granted) & set(silent)
            self.granted(granted)
        self.now = end

    @rule(limit=st.integers(1, 5))
    def change_limit(self, limit: int) -> None:
        self.granted(self.admission.resize(limit, self.now))

    @invariant()
    def no_more_than_allowed(self) -> None:
        admission = self.admission
        out = admission.running + admission.granted
        self.allowed = max(admission.limit + admission.ahead, min(self.allowed, out))
        assert out <= self.allowed
        assert admission.storing == admission.running - self.urgent
        if admission.most is not None:
            self.allowed_storing = max(admission.most, min(self.allowed_storing, admission.storing))
            assert admission.storing <= self.allowed_storing
        else:
            self.allowed_storing = admission.storing
        assert admission.granted == sum(map(len, self.credits.values()))
        assert (admission.next_lapse() is not None) == bool(admission.granted)

    def teardown(self) -> None:
        for router in "abcd":
            self.lose(router)
        while self.admission.running:
            assert self.admission.finish(0.1, self.now, self.one_of(False)) == []
        assert self.admission.storing == 0
        admission = self.admission
        assert (admission.granted, admission.wanted, admission._credits, admission._silent) == (0, 0, {}, {})


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
