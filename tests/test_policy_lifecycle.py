from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import pytest

from dask_serve.policy.lifecycle import ENDS, MOVES, Event, State, advance, diagram

STATES = get_args(State)
EVENTS = get_args(Event)


def test_ordinary_life():
    state = "starting"
    for event, then in [("ready", "ready"), ("drain", "draining"), ("stopped", "gone")]:
        state = advance(state, event)
        assert state == then


def test_every_state_is_in_the_table_and_every_move_leads_to_one():
    assert set(MOVES) == set(STATES)
    for moves in MOVES.values():
        assert set(moves) <= set(EVENTS)
        assert set(moves.values()) <= set(STATES)


def test_ends_are_ends():
    assert set(ENDS) == {"gone", "failed", "lost", "out_of_memory"}
    for state, event in itertools.product(ENDS, EVENTS):
        with pytest.raises(ValueError, match=f"{state!r} cannot take the event {event!r}"):
            advance(state, event)


@pytest.mark.parametrize("event", EVENTS)
def test_living_replicas_take_every_report(event):
    for state in set(STATES) - ENDS:
        assert advance(state, event) in STATES


def test_draining_never_answers_again():
    assert all(then in ("draining", "gone") for then in MOVES["draining"].values())


def test_the_documentation_draws_this_table():
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    drawn = page.partition("<!-- lifecycle -->\n```mermaid\n")[2].partition("\n```")[0]
    assert drawn == diagram(), "put what diagram() returns into docs/architecture.md"
    assert all(f" --> {state}" in drawn for state in STATES)
