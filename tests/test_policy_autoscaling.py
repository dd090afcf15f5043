from __future__ import annotations

import itertools
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_serve.config import AutoscalingConfig
from dask_serve.exceptions import ConfigError
from dask_serve.policy.autoscaling import SEEN, SETTLED, STEP, Load, Scale, Wish, decide, explain, wish_of

AUTO = AutoscalingConfig(max_replicas=20, upscale_delay_s=0, downscale_delay_s=60)


def follow(config: AutoscalingConfig, scale: Scale, load: Load, now: float, until: float) -> list[tuple[float, int]]:
    """Decide under constant load whenever it is due; return the changes of the target."""
    changes = []
    for _ in range(10_000):
        decision = decide(config, scale, load, now)
        if decision.scale.target != scale.target:
            changes.append((now, decision.scale.target))
        scale = decision.scale
        if decision.wake_at is None or decision.wake_at > until:
            return changes
        assert decision.wake_at >= now
        now = decision.wake_at
    raise AssertionError("it never comes to rest")


# -- examples


def test_many_more_come_as_soon_as_they_are_seen_to_be_needed():
    decision = decide(AUTO, Scale(target=1), Load(running=3, queued=17), 5.0)
    assert decision.needed == 10
    assert decision.wake_at == 5.0 + SEEN
    assert follow(AUTO, Scale(target=1), Load(running=3, queued=17), 5.0, 100.0) == [(5.0 + SEEN, 10)]


def test_a_few_more_have_to_be_needed_for_longer():
    """What processes tell is only roughly right for a second."""
    assert follow(AUTO, Scale(target=1), Load(running=4), 5.0, 100.0) == [(5.0 + SETTLED, 2)]
    more = decide(AUTO, Scale(target=3), Load(running=8), 0.0)
    back = decide(AUTO, more.scale, Load(running=6), SETTLED / 2)
    again = decide(AUTO, back.scale, Load(running=8), SETTLED)
    assert again.scale.target == 3
    assert again.wake_at == 2 * SETTLED


def test_no_more_than_the_bounds():
    assert follow(AUTO, Scale(target=1), Load(queued=1000), 0.0, 10.0) == [(SEEN, 20)]
    assert follow(AUTO, Scale(target=20), Load(), 0.0, 1000.0) == [(60.0, 1)]


def test_changed_bounds_count_at_once():
    assert decide(AUTO, Scale(target=50), Load(running=100), 0.0).scale.target == 20
    at_least = AutoscalingConfig(min_replicas=4)
    assert decide(at_least, Scale(target=2), Load(), 0.0).scale.target == 4


def test_down_to_the_most_that_was_needed_meanwhile():
    scale = Scale(target=10)
    for now, running, target in [
        (0, 2, 10),
        (30, 8, 10),
        (59, 2, 10),
        (60, 2, 4),
        (60, 2, 4),
        (119, 2, 4),
        (120, 2, 1),
    ]:
        scale = decide(AUTO, scale, Load(running=running), now).scale
        assert scale.target == target, now


def test_a_peak_starts_the_wait_anew():
    scale = decide(AUTO, Scale(target=10), Load(running=2), 0.0).scale
    scale = decide(AUTO, scale, Load(running=20), 50.0).scale
    decision = decide(AUTO, scale, Load(running=2), 51.0)
    assert decision.scale.target == 10
    assert decision.wake_at == 111.0


def test_up_after_a_delay_by_the_least_that_was_needed():
    config = AutoscalingConfig(upscale_delay_s=10)
    scale = Scale(target=1)
    for now, running, target in [(0, 40, 1), (5, 10, 1), (10, 30, 5), (10, 30, 5), (19, 30, 5), (20, 30, 15)]:
        scale = decide(config, scale, Load(running=running), now).scale
        assert scale.target == target, now


def test_to_zero_and_back():
    config = AutoscalingConfig(min_replicas=0, upscale_delay_s=30, downscale_to_zero_delay_s=300)
    assert follow(config, Scale(target=5), Load(), 0.0, 1000.0) == [(60.0, 1), (300.0, 0)]
    # Nobody waits for the delay where nothing can answer.
    assert decide(config, Scale(target=0), Load(queued=1), 1000.0).scale.target == 1
    assert decide(config, Scale(target=1), Load(running=0.01), 1000.0).needed == 1
    quick = AutoscalingConfig(min_replicas=0, downscale_to_zero_delay_s=5)
    assert follow(quick, Scale(target=5), Load(), 0.0, 1000.0) == [(5.0, 0)]


def test_steps_of_factors_have_a_pace_of_their_own():
    up = AutoscalingConfig(upscaling_factor=0.5)
    steps = follow(up, Scale(target=1), Load(running=18), 7.0, 100.0)
    assert [target for _, target in steps] == [5, 7, 8, 9]
    assert all(after - before >= STEP for (before, _), (after, _) in itertools.pairwise(steps))
    down = AutoscalingConfig(downscaling_factor=0.5, downscale_delay_s=10)
    assert [target for _, target in follow(down, Scale(target=9), Load(running=2), 0.0, 1000.0)] == [5, 3, 2, 1]
    over = AutoscalingConfig(upscaling_factor=2)
    assert follow(over, Scale(target=1), Load(running=20), 0.0, 1000.0) == [(SEEN, 19), (SEEN + 60.0, 10)]


def test_a_wish_replaces_the_load_and_nothing_else():
    assert decide(AUTO, Scale(target=1), Load(running=2), 0.0, Wish(7.2)).scale.target == 8
    assert decide(AUTO, Scale(target=1), Load(), 0.0, Wish(700)).scale.target == 20
    to_zero = AutoscalingConfig(min_replicas=0)
    assert decide(to_zero, Scale(target=0), Load(queued=1), 0.0, Wish(0)).scale.target == 1


def test_reasons():
    assert explain(AUTO, Load(3, 17), 10) == "3 requests run and 17 wait; 2 to each replica makes 10"
    assert explain(AUTO, Load(3, 170), 20).endswith("makes 87, but max_replicas=20")
    assert explain(AUTO, Load(), 1).endswith("makes 0, but min_replicas=1")
    assert explain(AUTO, Load(), 3, Wish(3, "it is nine o'clock")) == "the policy asks for 3: it is nine o'clock"


def test_what_a_policy_may_return():
    assert wish_of(3, "m:f") == Wish(3.0)
    assert wish_of((2.5, "noon"), "m:f") == Wish(2.5, "noon")
    for wrong in (None, "3", True, float("nan"), float("inf"), (1, 2), (1, "x", 2), []):
        with pytest.raises(ConfigError, match="m:f returned"):
            wish_of(wrong, "m:f")


# -- properties

seconds = st.sampled_from([0.0, 0.3, 1.0, 5.0, 60.0])


@st.composite
def configs(draw: st.DrawFn) -> AutoscalingConfig:
    low = draw(st.integers(0, 5))
    return AutoscalingConfig(
        min_replicas=low,
        max_replicas=max(1, low + draw(st.integers(0, 40))),
        target_ongoing_requests=draw(st.sampled_from([0.5, 1.0, 2.0, 3.7, 100.0])),
        upscale_delay_s=draw(seconds),
        downscale_delay_s=draw(seconds),
        downscale_to_zero_delay_s=draw(st.none() | seconds),
        upscaling_factor=draw(st.sampled_from([0.1, 0.5, 1.0, 2.0])),
        downscaling_factor=draw(st.sampled_from([0.1, 0.5, 1.0])),
    )


loads = st.builds(Load, st.floats(0, 200), st.floats(0, 200))


@settings(deadline=None)
@given(configs(), st.integers(0, 100), loads, st.floats(0, 1e6))
def test_constant_load_leads_to_one_number_that_stays(config, start, load, now):
    changes = follow(config, Scale(target=start), load, now, float("inf"))
    target = changes[-1][1] if changes else start
    exact = config.clip(max(ceil(load.total / config.target_ongoing_requests - 1e-9), load.total > 0))
    # A load just above what so many replicas should have asks for no more of them.
    assert target == exact or (target < exact and load.total <= 1.051 * target * config.target_ongoing_requests)
    numbers = [config.clip(start), *(number for _, number in changes)]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False))
    assert turns <= (config.upscaling_factor > 1)
    assert follow(config, Scale(target=target), load, now, float("inf")) == []


@settings(max_examples=200, deadline=None)
@given(configs(), st.integers(0, 60), st.lists(st.tuples(st.floats(0, 30), loads), min_size=1, max_size=60))
def test_bounds_and_delays_hold_whatever_happens(config, start, events):
    scale, now = Scale(target=config.clip(start)), 0.0
    #: Time, what was needed, and the target before.
    seen: list[tuple[float, int]] = []
    for passed, load in events:
        now += passed
        before = scale
        decision = decide(config, before, load, now)
        scale = decision.scale
        seen.append((now, decision.needed))
        assert config.min_replicas <= scale.target <= config.max_replicas
        assert decide(config, before, load, now) == decision
        assert decision.wake_at is None or decision.wake_at >= now
        if load.total:
            assert scale.target > 0
        if scale.target > before.target > 0:
            lasted = _lasted(seen, now, lambda needed, target=before.target: needed > target)
            assert lasted >= config.upscale_delay_s - 1e-6
        elif scale.target < before.target:
            lasted = _lasted(seen, now, lambda needed, target=before.target: needed < target)
            zero = config.downscale_to_zero_delay_s
            least = config.downscale_delay_s
            if scale.target == 0:
                lasted = _lasted(seen, now, lambda needed: needed == 0)
                least = least if zero is None else zero
            assert lasted >= least - 1e-6


def _lasted(seen, now, holds) -> float:
    since = now
    for time, needed in reversed(seen):
        if not holds(needed):
            break
        since = time
    return now - since
