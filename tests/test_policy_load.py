from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dask_serve.policy.load import LEAST, REPEAT, SAMPLE, SETTLE, Levels


def run(levels: Levels, values: dict[str, int], start: float, seconds: float) -> list[tuple[float, dict[str, float]]]:
    """Sample constant values; return what was told, and when."""
    told = []
    for tick in range(round(seconds / SAMPLE)):
        now = start + tick * SAMPLE
        report = levels.sample(values, now)
        if report is not None:
            told.append((now - start, report))
    return told


def test_something_after_nothing_is_told_at_once():
    assert Levels().sample({"a": 1}, 0.0) == {"a": 1.0}


def test_nothing_is_quiet():
    levels = Levels()
    assert levels.quiet
    assert levels.sample({"a": 0}, 0.0) is None
    assert levels.quiet


def test_a_step_is_told_within_the_least_time_and_constant_load_seldom():
    levels = Levels()
    run(levels, {"a": 1}, 0.0, 10.0)
    told = run(levels, {"a": 20}, 10.0, 10.0)
    assert told[0][0] <= LEAST + SAMPLE
    exact = [when for when, report in told if report == {"a": 20.0}]
    assert exact[0] <= SETTLE + 2 * SAMPLE
    assert len(told) <= 3 + 10.0 / REPEAT


def test_the_end_is_told():
    levels = Levels()
    run(levels, {"a": 20, "b": 1}, 0.0, 5.0)
    told = run(levels, {}, 5.0, 5.0)
    assert told[-1][1] == {}
    assert told[-1][0] <= 2 * SETTLE + SAMPLE
    assert levels.quiet
    assert len(told) <= 5


def test_noise_is_averaged():
    levels = Levels()
    told = [levels.sample({"a": 10 + 8 * (-1) ** tick}, tick * SAMPLE) for tick in range(400)]
    later = [report["a"] for report in told[100:] if report]
    assert all(8 <= mean <= 12 for mean in later)
    assert len(later) <= 300 * SAMPLE / SETTLE + 1


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)), max_size=200))
def test_reports_keep_their_distance_and_end_at_zero(history):
    levels = Levels()
    times = []
    for tick, values in enumerate(history):
        report = levels.sample(values, tick * SAMPLE)
        if report is not None:
            times.append(tick * SAMPLE)
            assert all(level > 0 for level in report.values())
    assert all(b - a >= LEAST - 1e-9 for a, b in pairwise(times))
    run(levels, {}, len(history) * SAMPLE, 3 * REPEAT)
    assert levels.quiet
    assert levels.told == {}
