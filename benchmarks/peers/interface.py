"""What every system that is compared can do, and how it is asked: one process each, a line of JSON there and one back.

This module runs in the environment of each peer too, so that it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Case", "Peer", "System", "answer"]


class System(Protocol):
    """A system whose service runs: two deployments, the replica of one calls the other's.

    A peer that cannot do one of these leaves it out, and the case out of its `Peer.cases`.
    """

    def describe(self) -> str:
        """Tell version and settings, for the page."""

    def processes(self) -> dict[str, int]:
        """Return the ids of what takes part, by the name in the table; what else it has started is "others" there."""

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Keep calls from an event loop in the replica of the caller going; return how many, and the seconds."""

    def burst(self, count: int) -> float:
        """Make that many calls from a plain thread of the driver, then gather all results; return the seconds."""


@dataclass(frozen=True)
class Case:
    """Where a case is measured, and what is asked.

    Parameters
    ----------
    modes : sequence of str
        The peer's modes; where there are several, what is asked counts for the one in which the peer is fastest.
    least : float, optional
        The asked ratio.
    """

    modes: Sequence[str]
    least: float | None = None


@dataclass(frozen=True)
class Peer:
    """What the comparison has to know of a peer without importing it.

    Parameters
    ----------
    title : str
        Its name in the table.
    modes : mapping of str to mapping
        Environment variables by mode; a mode is started, measured and stopped by itself.
    cases : mapping of str to Case
        By the name of the method of `System`.
    """

    title: str
    modes: Mapping[str, Mapping[str, str]]
    cases: Mapping[str, Case] = field(default_factory=dict)


def answer(opened: Callable[[], AbstractContextManager[System]]) -> None:
    """Be the process of a system: start it, answer questions from standard input until that ends, stop it."""
    # Whatever the system prints goes to the other stream.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    with opened() as system:
        reply({"describe": system.describe(), "processes": system.processes()})
        for line in sys.stdin:
            question = json.loads(line)
            reply(getattr(system, question["case"])(**question["arguments"]))
