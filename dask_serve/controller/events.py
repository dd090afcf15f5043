"""What the controller decided lately, for people who ask why."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Event", "Events"]

#: How many are kept.
KEPT = 50
#: Under this name Dask's own log of events has them too: ``client.get_events("dask-serve")``.
TOPIC = "dask-serve"


class Event(Struct, frozen=True, kw_only=True):
    """One decision.

    Attributes
    ----------
    time : float
        When, in seconds since 1970.
    kind : str
        What kind of decision it was: ``"scaled"``.
    subject : str
        What it is about: ``application/deployment``.
    text : str
        What was decided, and why.
    """

    time: float
    kind: str
    subject: str
    text: str

    def __str__(self) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(self.time))
        return f"{when} {self.subject}: {self.text}"


class Events:
    """The last decisions, the oldest first."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._events: deque[Event] = deque(maxlen=KEPT)
        #: How many there were of each kind.
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, subject: str, text: str) -> None:
        """Note a decision."""
        event = Event(time=time.time(), kind=kind, subject=subject, text=text)
        self._events.append(event)
        self.counts[kind] += 1
        self._scheduler.log_event(TOPIC, {"action": kind, "subject": subject, "text": text})

    def latest(self) -> list[Event]:
        """Return them."""
        return list(self._events)
