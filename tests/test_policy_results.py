from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.results import ResultSize, most_at_once


def test_replicas_that_store_nothing_are_not_held_back():
    assert most_at_once(limit=100, held=1000, mean=0.0, sharing=1) is None


def test_as_many_as_there_is_room_for():
    assert most_at_once(limit=100, held=0, mean=10.0, sharing=1) == 10
    assert most_at_once(limit=100, held=50, mean=10.0, sharing=1) == 5
    assert most_at_once(limit=100, held=50, mean=10.0, sharing=5) == 1


def test_one_while_the_store_is_within_its_limit_and_none_beyond():
    assert most_at_once(limit=100, held=100, mean=10.0, sharing=3) == 1
    assert most_at_once(limit=100, held=0, mean=1e9, sharing=1) == 1
    assert most_at_once(limit=100, held=101, mean=10.0, sharing=1) == 0


@given(
    limit=st.integers(1, 10**12),
    held=st.integers(0, 10**12),
    mean=st.floats(1e-3, 1e12),
    sharing=st.integers(1, 50),
)
def test_what_is_let_in_fits(limit: int, held: int, mean: float, sharing: int):
    most = most_at_once(limit, held, mean, sharing)
    assert most is not None
    if most > 1:
        assert held + most * mean * sharing <= limit * (1 + 1e-9)
    assert (most >= 1) == (held <= limit)


def test_the_mean_follows_and_begins_with_the_first_stored_result():
    size = ResultSize()
    for _ in range(5):
        size.sample(0)
    assert size.mean == 0.0
    size.sample(1000)
    assert size.mean == 1000
    for _ in range(100):
        size.sample(10)
    assert 10 <= size.mean < 11
