"""How many rows one call brings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.pieces import ANSWERS, FIRST, LARGEST, MOST, TARGET, PieceSize, PieceSizes


def settled(fixed: float, each: float, answers: int = 200) -> PieceSize:
    """Answer pieces that take ``fixed`` seconds, and ``each`` for each row."""
    size = PieceSize()
    for _ in range(answers):
        size.answered(size.rows, fixed + each * size.rows)
    return size


@pytest.mark.parametrize("each", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_pieces_take_about_the_target(each: float):
    size = settled(0.0003, each)
    assert TARGET / 3 <= 0.0003 + each * size.rows <= 1.5 * TARGET


def test_pieces_are_larger_where_calls_cost_more_than_rows():
    size = settled(0.02, 1e-6)
    # Half of the time or more is the rows'.
    assert 1e-6 * size.rows >= 0.01
    assert 0.02 + 1e-6 * size.rows <= MOST


def test_pieces_stay_shorter_beside_online_requests():
    sizes = PieceSizes()

    def answer(quiet: bool) -> float:
        for _ in range(200):
            sizes.answered(sizes.rows, 0.01 + 1e-6 * sizes.rows, quiet)
        return 0.01 + 1e-6 * sizes.rows

    assert 0.012 <= answer(quiet=False) <= 0.016
    assert 0.018 <= answer(quiet=True) <= 0.03
    # The first answer that tells of online requests is enough.
    sizes.answered(sizes.rows, 0.03, quiet=False)
    assert 0.01 + 1e-6 * sizes.rows <= 0.016


def test_single_rows_where_one_takes_longer():
    assert settled(0.001, 0.05).rows == 1


@given(st.floats(0, 0.1), st.floats(1e-9, 1.0))
def test_they_come_to_rest(fixed: float, each: float):
    before, after = settled(fixed, each, 200), settled(fixed, each, 200 + 3 * ANSWERS)
    assert before.rows == after.rows
    assert fixed + each * after.rows <= max(MOST, fixed + each, 2 * TARGET)


@given(st.lists(st.tuples(st.integers(0, LARGEST), st.floats(0, 10) | st.just(-1.0)), max_size=100))
def test_they_are_bounded(answers: list[tuple[int, float]]):
    size = PieceSize()
    for rows, seconds in answers:
        size.answered(rows, seconds)
        size.answered(size.rows, seconds)
        assert 1 <= size.rows <= LARGEST


def test_what_disturbs_one_answer_changes_nothing():
    size = PieceSize()
    for disturbed in [False, True, False] * 20:
        size.answered(size.rows, 5.0 if disturbed else 0.003 * size.rows / FIRST)
    assert size.rows == FIRST


def test_the_rest_of_a_partition_tells_nothing():
    size = PieceSize()
    for _ in range(20):
        size.answered(5, 0.0001)
    assert size.rows == FIRST
