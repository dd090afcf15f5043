"""What every system that is compared can do, and how it is asked: one process each, a line of JSON there and one back.

This module runs in the environment of each peer too, so that it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["LIMIT", "Peer", "System", "answer", "timed"]

#: ``max_ongoing_requests`` of the deployments, where a system has such a thing.
LIMIT = 1000


class System(Protocol):
    """A system whose service runs.

    A peer that cannot do one of the cases leaves it out, here and in its `Peer.cases`.
    """

    def describe(self) -> str:
        """Tell version and settings, for the page."""

    def processes(self) -> dict[str, int]:
        """Return the ids of what takes part, by the name in the table; what else it has started is "others" there."""

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Keep calls from one replica to another's deployment going; return how many, and the seconds."""

    def burst(self, count: int) -> float:
        """Make that many calls from a plain thread of the driver, then gather all results; return the seconds."""

    def batched(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Keep calls of a batched method going as `concurrent` does."""

    def noop(self) -> str:
        """Return the address at which GET is answered by a word."""

    def json(self) -> str:
        """Return the address to which a small JSON object is posted; it is parsed, and the answer is JSON too."""

    def model(self) -> str:
        """Return the same of a model that takes its time: `models.SleepingModel`."""

    def batches(self) -> str:
        """Return the same of one that answers up to 64 requests at a time, in `models.seconds_of` them."""


@dataclass(frozen=True)
class Peer:
    """What the comparison has to know of a peer without importing it.

    Parameters
    ----------
    title : str
        Its name in the table.
    modes : mapping of str to mapping
        Environment variables by mode; a mode is started, measured and stopped by itself.
    cases : mapping of str to mapping
        By the name of the method of `System`: the modes in which it is measured, each with the ratio that is asked.
    """

    title: str
    modes: Mapping[str, Mapping[str, str]]
    cases: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


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


def timed(call: Callable[[int], Any], gather: Callable[[list[Any]], Sequence[int]], count: int) -> float:
    """Return the seconds of a burst: calls that return their argument are made, then all results are gathered."""
    begun = time.perf_counter()
    values = gather([call(number) for number in range(count)])
    took = time.perf_counter() - begun
    assert list(values) == list(range(count))
    return took
