"""What the controller decided lately, for people who ask why."""

from __future__ import annotations

import time
from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["KINDS", "Event", "Events", "brief"]

#: How many are kept, and how many of them the status has.
KEPT, TOLD = 500, 50
#: Under this name Dask's own log of events has them too: ``client.get_events("dask-serve")``.
TOPIC = "dask-serve"
#: Characters of a message that are told.
LONGEST = 300


#: What is told, and which line of the dashboard has it.
KINDS = {
    # What people ask for, and how far it is.
    "deployed": "rollout",
    "rolled_back": "rollout",
    "deleted": "rollout",
    "status": "rollout",
    "taken_back": "rollout",
    "started": "rollout",
    "stopped": "rollout",
    # What the load asks for, and where there is no room for it.
    "scaled": "scaling",
    "unplaced": "scaling",
    "placed": "scaling",
    # What went wrong, and is put right.
    "start_failed": "healing",
    "unhealthy": "healing",
    "out_of_memory": "healing",
    "lost": "healing",
    # Workers that come into question for replicas, or no more.
    "leaving": "workers",
    "stays": "workers",
    "silent": "workers",
    "answers": "workers",
    # HTTP.
    "proxies": "proxies",
    "proxy_died": "proxies",
}


class Event(Struct, frozen=True, kw_only=True):
    """One decision.

    Attributes
    ----------
    time : float
        When, in seconds since 1970.
    kind : str
        What kind of decision it was, one of `KINDS`.
    subject : str
        What it is about: ``application``, ``application/deployment``, the address of a worker, ``proxies``.
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
        assert kind in KINDS, kind
        event = Event(time=time.time(), kind=kind, subject=subject, text=text)
        self._events.append(event)
        self.counts[kind] += 1
        self._scheduler.log_event(TOPIC, {"action": kind, "subject": subject, "text": text})

    def latest(self, number: int = TOLD) -> list[Event]:
        """Return the last ones."""
        return list(islice(self._events, max(len(self._events) - number, 0), None))


def brief(text: str) -> str:
    """Return what says most of a message: its first line, and of a traceback the last one."""
    first, *rest = text.strip().splitlines() or [""]
    return (f"{first} ... {rest[-1].strip()}" if rest else first)[:LONGEST]
