"""The life of a replica, as a table of moves. The diagram in ``docs/architecture.md`` is drawn from it by `diagram`.

`gone`, `failed`, `lost` and `out_of_memory` are ends: a replica never comes back from them, another takes its place.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["ENDS", "MOVES", "Event", "State", "advance", "diagram"]

State = Literal["starting", "ready", "draining", "gone", "failed", "lost", "out_of_memory"]
Event = Literal["ready", "drain", "stopped", "failed", "lost", "out_of_memory"]

#: ``{state: {event: next state}}``. A pair that is missing cannot happen.
MOVES: dict[State, dict[Event, State]] = {
    "starting": {
        "ready": "ready",
        "drain": "draining",
        "stopped": "lost",
        "failed": "failed",
        "lost": "lost",
        "out_of_memory": "out_of_memory",
    },
    # A replica that stops unasked goes with its worker: to those who need it, it is lost.
    "ready": {
        "ready": "ready",
        "drain": "draining",
        "stopped": "lost",
        "failed": "failed",
        "lost": "lost",
        "out_of_memory": "out_of_memory",
    },
    # A constructor may end, well or badly, after the replica was told to stop; a worker may announce
    # the same drain that the controller asked for. Nothing of this needs a replacement.
    "draining": {
        "ready": "draining",
        "drain": "draining",
        "failed": "draining",
        "stopped": "gone",
        "lost": "gone",
        "out_of_memory": "gone",
    },
    "gone": {},
    "failed": {},
    "lost": {},
    "out_of_memory": {},
}

#: States without a way on.
ENDS: frozenset[State] = frozenset(state for state, moves in MOVES.items() if not moves)


def advance(state: State, event: Event) -> State:
    """Return the state after ``event``.

    Raises
    ------
    ValueError
        When ``event`` cannot happen in ``state``.
    """
    try:
        return MOVES[state][event]
    except KeyError:
        raise ValueError(f"a replica that is {state!r} cannot take the event {event!r}") from None


def diagram() -> str:
    """Return the moves as a Mermaid state diagram; those that lead back to where they began are left out."""
    lines = ["stateDiagram-v2", "    [*] --> starting"]
    for state, moves in MOVES.items():
        events: dict[State, list[Event]] = {}
        for event, then in moves.items():
            if then != state:
                events.setdefault(then, []).append(event)
        lines += [f"    {state} --> {then}: {', '.join(names)}" for then, names in events.items()]
    return "\n".join([*lines, *(f"    {state} --> [*]" for state in MOVES if state in ENDS)])
