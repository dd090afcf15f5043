"""Which models make room, and where calls for a model go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.backlog import LOOKED_AT, OVERTAKEN_AT_MOST, Backlog
from dask_serve.policy.dispatch import Dispatcher
from dask_serve.policy.models import SPREAD_FROM, choose_holder, to_unload
from dask_serve.policy.target import Target


@dataclass(eq=False)
class Model:
    nbytes: int = 1
    in_use: bool = False


@dataclass(eq=False)
class Call:
    model_id: str = ""
    since: float = 0.0
    dropped: bool = False
    background: bool = False
    urgent: bool = False
    prefers: frozenset[str] | None = None
    deadline: float | None = None
    sent: float = 0.0
    found: int = 0


def replicas(*models: str, limit: int = 100) -> list[Target]:
    targets = []
    for number, names in enumerate(models):
        target = Target(f"r{number}", limit)
        target.models = frozenset(names)
        targets.append(target)
    return targets


@given(
    models=st.lists(st.builds(Model, nbytes=st.integers(0, 50), in_use=st.booleans()), max_size=8),
    most=st.one_of(st.none(), st.integers(1, 6)),
    max_bytes=st.one_of(st.none(), st.integers(1, 100)),
    nbytes=st.integers(0, 60),
)
def test_room_is_made_by_the_least_recently_used(models, most, max_bytes, nbytes):
    unload, enough = to_unload(models, most, max_bytes, nbytes)
    assert not any(model.in_use for model in unload)
    left = [model for model in models if model not in unload]
    fits = (most is None or len(left) + 1 <= most) and (
        max_bytes is None or not left or sum(model.nbytes for model in left) + nbytes <= max_bytes
    )
    assert enough == fits
    if not enough:
        assert all(model.in_use for model in left)
    # Never one more than needed, and the oldest ones.
    free = [model for model in models if not model.in_use]
    assert unload == free[: len(unload)]
    if unload:
        assert to_unload([*left, unload[-1]], most, max_bytes, nbytes)[0]


def test_who_has_it_gets_it():
    targets = replicas("a", "ab", "b")
    targets[0].mine, targets[1].mine = 2, 1
    assert choose_holder(targets, "a", 0.0) is targets[1]
    targets[1].usable = False
    assert choose_holder(targets, "a", 0.0) is targets[0]
    targets[0].mine = targets[0].limit
    assert choose_holder(targets, "a", 0.0) is targets[2], "those that have it are full"
    targets[2].mine = targets[2].limit
    assert choose_holder(targets, "a", 0.0) is None


def test_a_new_one_goes_where_there_are_few_and_all_routers_agree():
    targets = replicas("ab", "c", "d")
    assert choose_holder(targets, "new", 0.0) in targets[1:]
    assert choose_holder(targets, "new", 0.0) is choose_holder(targets[::-1], "new", 0.0)
    spread = Counter(choose_holder(replicas("", "", "", ""), f"model-{i}", 0.0).id for i in range(400))
    assert min(spread.values()) > 60


def test_a_hot_model_is_spread_once_at_a_time():
    hot, *others = targets = replicas("a", "b", "c")
    hot.mine = SPREAD_FROM - 1
    assert choose_holder(targets, "a", 0.0) is hot
    hot.mine = SPREAD_FROM
    second = choose_holder(targets, "a", 0.0)
    assert second in others
    second.loading |= {"a"}
    second.mine += 1
    hot.mine = 30
    assert choose_holder(targets, "a", 0.0) is hot, "until the other one has loaded it"
    second.models |= {"a"}
    second.loading = frozenset()
    assert choose_holder(targets, "a", 0.0) is second
    # Equally busy everywhere: nothing is gained by loading it elsewhere.
    for target in targets:
        target.mine = 30
    assert choose_holder(targets, "a", 0.0) in (hot, second)


class Port:
    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send(self, target, call, credit):
        self.sent.append((target.id, call.model_id))

    def want(self, target, count, oldest, urgent):
        pass

    def give_back(self, target):
        pass


def test_calls_for_a_cold_model_stay_together():
    port = Port()
    dispatcher = Dispatcher(port, lambda: 0.5)
    for target in replicas("", "", ""):
        dispatcher.add(target, 0.0)
    for _ in range(SPREAD_FROM):
        dispatcher.submit(Call("a"))
    assert len({id for id, _ in port.sent}) == 1


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=120), st.sets(st.sampled_from("abc")))
def test_waiting_calls_go_where_their_model_is(models, loaded):
    backlog = Backlog()
    calls = [Call(model, since=float(i)) for i, model in enumerate(models)]
    for call in calls:
        backlog.append(call)
    left = list(calls)
    passed: Counter[Call] = Counter()
    while left:
        call = backlog.pop(loaded)
        head = left[0]
        if call is not head:
            assert head.model_id
            assert head.model_id not in loaded
            assert call.model_id in loaded
            assert left.index(call) < LOOKED_AT
            passed[head] += 1
        left.remove(call)
    assert all(count <= OVERTAKEN_AT_MOST for count in passed.values())
    assert not len(backlog)
