from __future__ import annotations

import math

import overload_scenarios as scenarios
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.forecast import Caution, Forecast, Pace, Spread
from dask_serve.policy.leftover import QUIET_AFTER, Leftover
from dask_serve.policy.retries import RESERVE, WINDOW, RetryBudget

SECONDS = st.floats(1e-5, 100.0)


# -- the forecast


def taught(samples: list[tuple[int, float]]) -> Forecast:
    forecast = Forecast()
    # The first is not believed: something may have been loaded or compiled.
    for number, (load, seconds) in enumerate([(0, 1e3), *samples]):
        forecast.add(load, seconds, 1.0 + number)
    return forecast


def test_nothing_is_held_against_what_is_not_known():
    forecast = Forecast()
    assert forecast.expected(5) == forecast.at_most(5, 4.0) == forecast.least == 0.0
    forecast.add(0, 30.0, 1.0)
    assert not forecast.known
    assert forecast.at_most(5, 4.0) == 0.0


def test_a_line_where_requests_stand_in_line():
    forecast = taught([(n % 8, 0.01 * (n % 8 + 1)) for n in range(100)])
    assert forecast.expected(0) == pytest.approx(0.01, rel=0.02)
    assert forecast.expected(20) == pytest.approx(0.21, rel=0.02)
    assert forecast.least == pytest.approx(0.01, rel=0.1)


def test_flat_where_they_do_not():
    forecast = taught([(n % 8, 0.01) for n in range(100)])
    assert forecast.expected(90) == pytest.approx(0.01)


def test_times_that_differ_widely_say_little():
    forecast = taught([(0, 0.2 if n % 10 == 0 else 0.001) for n in range(200)])
    assert forecast.least == 0.0
    assert forecast.at_most(0, 1.0) <= 2 * forecast.expected(0)


@given(st.lists(st.tuples(st.integers(0, 200), SECONDS), max_size=50), st.integers(0, 1000))
def test_a_forecast_is_never_absurd(samples: list[tuple[int, float]], load: int):
    forecast = taught(samples)
    expected = forecast.expected(load)
    assert math.isfinite(expected)
    assert 0.0 <= expected <= forecast.at_most(load, 1.0) <= forecast.at_most(load, 4.0)
    assert expected <= forecast.expected(load + 1) + 1e-9
    assert 0.0 <= forecast.least <= forecast.expected(0)


@given(st.lists(SECONDS, min_size=1, max_size=50))
def test_a_spread_stays_within_its_samples(samples: list[float]):
    spread = Spread()
    for sample in samples:
        spread.add(sample)
    assert min(samples) * 0.999 <= spread.mean <= max(samples) * 1.001
    assert 0.0 <= spread.deviation <= max(samples)


def test_one_outlier_is_not_believed():
    forecast = taught([(0, 0.01)] * 20 + [(0, 60.0)])
    assert forecast.expected(0) < 0.02


def test_the_pace_of_a_backlog():
    pace = Pace()
    assert pace.wait(10, 1.0) is None
    for n in range(50):
        pace.left(n * 0.01, True)
    assert pace.wait(10, 1.0) == pytest.approx(0.1, rel=0.05)
    # A pause without a backlog is no gap.
    pace.left(0.5, False)
    pace.left(100.0, True)
    assert pace.wait(10, 1.0) == pytest.approx(0.1, rel=0.05)


@given(st.lists(st.booleans(), max_size=200))
def test_caution_is_bounded(late: list[bool]):
    caution = Caution()
    for each in late:
        caution.late() if each else caution.in_time()
        assert 1.0 <= caution.factor <= Caution.MOST


# -- retries


def test_retries_have_a_budget():
    budget = RetryBudget()
    granted = sum(budget.take(10_000, 1.0) for _ in range(5000))
    assert granted == RESERVE
    # A tenth of what is sent meanwhile.
    granted = sum(budget.take(30_000, 2.0) for _ in range(5000))
    assert granted == 2000
    # Another window.
    assert budget.take(30_000, 1.0 + 2 * WINDOW)


# -- what is left for background requests


@given(
    st.lists(st.tuples(st.integers(0, 20), SECONDS, SECONDS, st.booleans(), st.booleans()), max_size=200),
    st.integers(1, 8),
    st.integers(1, 20),
)
def test_what_is_left_is_bounded(samples: list[tuple[int, float, float, bool, bool]], threads: int, limit: int):
    leftover, now = Leftover(threads), 0.0
    for found, delay, seconds, background, came in samples:
        leftover.came |= came
        leftover.began(found, delay, seconds, limit, now, background)
        now += seconds
        assert max(1, threads - 1) <= leftover.most <= max(threads, limit)


def test_short_requests_stand_in_line_for_no_longer_than_others_wait_anyway():
    leftover = Leftover(1)
    leftover.came = True
    leftover.began(0, 0.0, 0.0001, 100, 0.0)
    assert leftover.ahead == 10
    for _ in range(100):
        leftover.began(0, 0.0, 0.01, 100, 0.0)
    assert leftover.ahead == 0
    leftover = Leftover(1)
    leftover.came = True
    leftover.began(0, 0.0, 1e-9, 20, 0.0)
    assert leftover.ahead == 20


def test_longer_lines_where_nobody_else_comes():
    leftover = Leftover(2)
    assert leftover.quiet
    leftover.came = True
    leftover.began(0, 0.0, 0.0001, 1000, 5.0)
    assert (leftover.quiet, leftover.most, leftover.ahead) == (False, 1, 10)
    leftover.began(0, 0.0, 0.0001, 1000, 4.9 + QUIET_AFTER)
    assert not leftover.quiet
    leftover.began(0, 0.0, 0.0001, 1000, 5.1 + QUIET_AFTER)
    assert (leftover.quiet, leftover.most, leftover.ahead) == (True, 2, 100)
    # At once, not with the next that ends.
    leftover.came = True
    assert (leftover.quiet, leftover.most, leftover.ahead) == (False, 1, 10)


def test_background_requests_that_begin_at_once_prove_nothing_for_online_ones():
    leftover = Leftover(2)
    leftover.came = True
    for _ in range(1000):
        leftover.began(leftover.most, 0.0, 0.01, 100, 0.0, background=True)
    assert leftover.most == 1
    for _ in range(1000):
        leftover.began(leftover.most, 0.0, 0.01, 100, 0.0, background=False)
    assert leftover.most == 100


def test_what_is_left_is_found_by_trying():
    leftover = Leftover(1)
    leftover.came = True
    for _ in range(5000):
        delayed = leftover.most > 12
        leftover.began(leftover.most - 1, 0.1 if delayed else 0.0, 0.1, 100, 0.0, background=False)
    assert 10 <= leftover.most <= 13


# -- scenarios, with the same code that runs in production


@pytest.mark.parametrize("times", [2.0, 5.0])
@pytest.mark.parametrize("constant", [True, False])
def test_more_is_offered_than_can_be_done(times: float, constant: bool):
    outcome = scenarios.overload(times, constant=constant)
    assert outcome.goodput >= 0.9
    assert outcome.late <= 0.01


def test_more_is_offered_where_requests_wait_at_the_router():
    outcome = scenarios.overload(5.0, limit=4, threads=0, constant=True)
    assert outcome.goodput >= 0.9
    assert outcome.late <= 0.02


def test_nothing_is_refused_without_need():
    outcome = scenarios.overload(0.8, constant=True)
    assert outcome.ends.keys() == {"result"}


def test_after_a_step_of_the_load():
    before, _, after = scenarios.step()
    assert after.ends.keys() == {"result"}
    assert after.p99 <= 1.5 * before.p99


def test_one_slow_replica():
    even, slow = scenarios.one_slow()
    assert slow.ends.keys() == {"result"}
    assert slow.p99 <= 2.0 * even.p99


@pytest.mark.parametrize(("threads", "limit"), [(1, 100), (4, 20), (0, 20)])
def test_online_requests_before_a_background_map(threads: int, limit: int):
    alone, beside, mapped = scenarios.behind(threads=threads, limit=limit, callers=200)
    assert beside.p99 <= 1.5 * alone.p99
    # It takes what is left, but for the time on the way of what it is granted.
    assert mapped >= 0.8 * (1.0 - beside.goodput)
