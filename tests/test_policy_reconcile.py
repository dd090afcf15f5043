from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dask_serve.policy.reconcile import Attempts, Reconfigure, Seen, Start, Stop, Want, has_failed, plan, share

D = "app/d"


def seen(id: str, state: str = "ready", revision: str = "new", **fields) -> Seen:
    return Seen(id=id, deployment=fields.pop("deployment", D), revision=revision, state=state, **fields)


def do(want: Want | None, replicas: list[Seen], attempts: Attempts | None = None, now: float = 0.0):
    tried = {(D, "new"): attempts} if attempts is not None else {}
    return plan({D: want} if want is not None else {}, replicas, tried, now)


def want(replicas: int, **fields) -> Want:
    return Want(revision="new", replicas=replicas, **fields)


def test_start_what_is_missing():
    assert do(want(3), [seen("1"), seen("2", "starting")]).actions == [Start(D, "new")]


def test_nothing_to_do():
    assert do(want(2), [seen("1"), seen("2", "starting"), seen("3", "draining")]).actions == []


def test_surplus_goes_starting_first_then_youngest():
    replicas = [seen("1"), seen("2", "starting"), seen("3"), seen("4")]
    assert do(want(3), replicas).actions == [Stop("2")]
    assert sorted(a.replica for a in do(want(2), replicas).actions) == ["2", "4"]


def test_deployment_that_is_not_wanted():
    assert do(None, [seen("1"), seen("2", "starting"), seen("3", "draining")]).actions == [Stop("1"), Stop("2")]


def test_lost_replicas_are_replaced_at_once():
    assert do(want(2), [seen("2")]).actions == [Start(D, "new")]


def test_options_change_in_place():
    replicas = [seen("1", settings=b"a"), seen("2", "starting", settings=b"a"), seen("3", settings=b"b")]
    assert do(want(3, settings=b"b"), replicas).actions == [Reconfigure("1")]


def test_rollout_surges_first():
    old = [seen(str(n), revision="old") for n in range(4)]
    assert do(want(4), old).actions == [Start(D, "new")]
    assert do(want(4), [*old, seen("5", "starting")]).actions == []
    assert do(want(4), [*old, seen("5")]).actions == [Stop("0"), Start(D, "new")]
    assert do(want(4), [*old[1:], seen("5")]).actions == [Start(D, "new")]
    assert do(want(4), [old[3], *(seen(n) for n in "5678")]).actions == [Stop("3")]


def test_single_replica_surges_too():
    assert do(want(1), [seen("1", revision="old")]).actions == [Start(D, "new")]
    assert do(want(1), [seen("1", revision="old"), seen("2")]).actions == [Stop("1")]


def test_old_replicas_that_only_start_are_in_vain():
    assert do(want(1), [seen("1", "starting", "old")]).actions == [Stop("1"), Start(D, "new")]


@pytest.mark.parametrize(("failures", "delay"), [(1, 0.2), (2, 1.0), (3, 5.0), (4, 25.0), (5, 30.0), (10000, 30.0)])
def test_back_off(failures, delay):
    assert Attempts(failures=failures, last=10.0).again_at == pytest.approx(10.0 + delay)


def test_failures_wait_for_their_time():
    tried = Attempts(failures=2, last=10.0)
    early = do(want(1), [], tried, now=10.5)
    assert (early.actions, early.wake_at) == ([], {D: 11.0})
    late = do(want(1), [], tried, now=11.0)
    assert (late.actions, late.wake_at) == ([Start(D, "new")], {})


def test_three_failures_in_a_row_are_the_end():
    tried = Attempts(failures=3, last=0.0)
    result = do(want(2), [seen("1", "starting")], tried, now=1000.0)
    assert result.failed == {D}
    assert result.actions == [Stop("1")]
    assert result.wake_at == {}


def test_a_ready_replica_keeps_hope():
    tried = Attempts(failures=3, last=0.0)
    result = do(want(2), [seen("1")], tried, now=1.0)
    assert not result.failed
    assert result.wake_at == {D: 5.0}
    assert do(want(2), [seen("1")], tried, now=5.0).actions == [Start(D, "new")]


def test_old_replicas_serve_on_when_the_new_fail():
    tried = Attempts(failures=3, last=0.0)
    old = [seen("1", revision="old"), seen("2", revision="old")]
    assert do(want(2), old, tried, now=9.0) == plan({D: want(2)}, old, {(D, "new"): tried}, 9.0)
    assert do(want(2), old, tried, now=9.0).actions == []
    assert do(want(2), old, tried, now=9.0).failed == {D}


def test_where_an_older_revision_stands_by_a_ready_replica_is_no_hope():
    tried = Attempts(failures=3, last=0.0)
    replicas = [seen("1"), seen("2", "starting"), seen("3", revision="old")]
    result = do(want(3, retreat=True), replicas, tried, now=9.0)
    assert result.failed == {D}
    assert result.actions == [Stop("2")]


@pytest.mark.parametrize(
    ("value", "up", "down"), [(2, 2, 2), (0, 0, 0), (0.25, 2, 1), (0.01, 1, 0), (1.0, 7, 7), (0.5, 4, 3)]
)
def test_shares(value, up, down):
    assert (share(value, 7, up=True), share(value, 7, up=False)) == (up, down)


def test_the_surge_is_a_limit():
    old = [seen(str(n), revision="old") for n in range(4)]
    assert do(want(4, surge=3), old).actions == [Start(D, "new")] * 3
    assert do(want(4, surge=9), old).actions == [Start(D, "new")] * 4


def test_without_a_surge_old_ones_make_room():
    old = [seen(str(n), revision="old") for n in range(4)]
    assert do(want(4, surge=0, unavailable=2), old).actions == [Stop("0"), Stop("1"), Start(D, "new"), Start(D, "new")]


def test_old_ones_that_hold_the_last_place_make_room_as_far_as_they_may():
    old = [seen(str(n), revision="old") for n in range(2)]
    assert crowded(want(2), old) == [Start(D, "new")]
    assert crowded(want(2, unavailable=1), old) == [Stop("0"), Start(D, "new"), Start(D, "new")]
    # While the first drains the second one stays, and when its successor starts as well.
    assert Stop("1") not in crowded(want(2, unavailable=1), [seen("0", "draining", "old"), old[1]])
    assert crowded(want(2, unavailable=1), [old[1], seen("2", "starting")]) == [Start(D, "new")]
    assert crowded(want(2, unavailable=1), [old[1], seen("2")]) == [Stop("1"), Start(D, "new")]


def crowded(want: Want, replicas: list[Seen]):
    return plan({D: want}, replicas, {}, 0.0, [D]).actions


def test_replicas_of_leaving_workers_are_replaced_before_they_stop():
    there = [seen("1", leaving=True), seen("2", leaving=True), seen("3")]
    # All at once: the worker does not wait.
    assert do(want(3), there).actions == [Start(D, "new")] * 2
    assert do(want(3), [*there, seen("4", "starting"), seen("5")]).actions == [Stop("1")]
    assert do(want(1), [seen("1", "starting", leaving=True)]).actions == [Stop("1"), Start(D, "new")]
    assert do(want(2), there[:1]).actions == [Start(D, "new")] * 2


def test_deployments_are_independent():
    other = "app/e"
    result = plan(
        {D: want(1), other: want(1)}, [seen("1", deployment=other)], {(D, "new"): Attempts(failures=1, last=0.0)}, 0.1
    )
    assert result.actions == []
    assert result.wake_at == {D: pytest.approx(0.2)}


# -- the plan in motion

states = st.sampled_from(["starting", "ready", "draining"])
observed = st.lists(st.tuples(st.sampled_from(["older", "old", "new"]), states), max_size=8)


def start(observed) -> list[Seen]:
    return [seen(f"r{number}", state, revision) for number, (revision, state) in enumerate(observed)]


def ready(replicas: list[Seen]) -> int:
    return sum(replica.state == "ready" for replica in replicas)


class World:
    """Carries plans out; what happens in between is up to the test."""

    def __init__(self, replicas: list[Seen], want: Want) -> None:
        self.replicas = replicas
        self.want = want
        self.attempts: dict = {}
        self.now = 0.0
        self.started = 0

    def step(self) -> bool:
        actions = plan({D: self.want}, self.replicas, self.attempts, self.now).actions
        for action in actions:
            if isinstance(action, Start):
                self.started += 1
                self.replicas = [*self.replicas, seen(f"s{self.started}", "starting", action.revision)]
            elif isinstance(action, Stop):
                self.set(action.replica, "draining")
        return bool(actions)

    def set(self, id: str, state: str) -> None:
        self.replicas = [replace(r, state=state) if r.id == id else r for r in self.replicas]

    def of(self, state: str, revision: str | None = None) -> list[Seen]:
        return [r for r in self.replicas if r.state == state and revision in (None, r.revision)]


@given(observed, st.integers(1, 6), st.data())
def test_rollouts_never_reduce_what_is_ready_and_converge(observed, target, data):
    world = World(start(observed), want(target))
    before = ready(world.replicas)
    for _ in range(100):
        moved = world.step()
        assert ready(world.replicas) >= min(before, target)
        before = ready(world.replicas)
        # Old ones and the surge together stay within bounds once surplus went.
        assert len(world.of("starting", "new")) + len(world.of("ready", "new")) <= target
        if starting := world.of("starting", "new"):
            world.set(data.draw(st.sampled_from(starting)).id, "ready")
        elif draining := world.of("draining"):
            gone = data.draw(st.sampled_from(draining))
            world.replicas = [r for r in world.replicas if r is not gone]
        elif not moved:
            break
    assert [r.revision for r in world.replicas] == ["new"] * target
    assert ready(world.replicas) == target
    # The same again changes nothing.
    assert not world.step()


@given(observed, st.integers(1, 6))
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(observed, target):
    world = World(start(observed), want(target))
    world.step()
    assert not world.step()


@given(observed, st.integers(1, 6), st.booleans())
def test_failing_starts_end_and_keep_what_serves(observed, target, with_previous):
    replicas = [r for r in start(observed) if r.revision != "new"]
    world = World(replicas, want(target, retreat=with_previous))
    serving = min(ready(world.replicas), target)
    for _ in range(50):
        world.step()
        assert ready(world.replicas) >= serving
        starting = world.of("starting")
        failing = [r for r in starting if r.revision == "new"]
        for replica in starting:
            world.set(replica.id, "ready" if replica.revision == "old" else "starting")
        if not failing:
            if has_failed(world.attempts.get((D, "new")), 0):
                break
            world.now = world.attempts[D, "new"].again_at
            continue
        world.replicas = [r for r in world.replicas if r not in failing]
        tried = world.attempts.get((D, "new"))
        world.attempts[D, "new"] = Attempts(failures=1 + (tried.failures if tried else 0), last=world.now)
    assert world.attempts[D, "new"].failures == 3
    world.step()
    assert not world.step()
    assert world.of("starting", "new") == []
