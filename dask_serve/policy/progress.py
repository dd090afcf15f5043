"""Whether a replica that answers nothing is busy, or stuck."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

__all__ = ["Progress", "Sample", "Verdict"]

#: Share of the time for which a thread has to use a CPU in order to count as computing.
COMPUTES = 0.05


class Sample(Struct, frozen=True, kw_only=True):
    """What is seen of a replica at one moment."""

    at: float
    #: Changes whenever a request ends or begins in a thread, or a part of a stream comes from one.
    activity: int = 0
    #: Requests wait for threads of the pool, all of which are taken.
    waiting: bool = False
    #: When the event loop was asked for a sign of life that it has not given yet.
    loop_asked: float | None = None
    #: CPU seconds that the loop's thread, and those of the pool, have used so far.
    loop_cpu: float = 0.0
    pool_cpu: float = 0.0


class Verdict(Struct, frozen=True, kw_only=True):
    """Nothing goes on in a part of the replica."""

    #: The event loop does not run, or all threads are taken.
    part: Literal["loop", "threads"]
    since: float
    #: It uses a CPU: busy with something long. Otherwise it waits for something: stuck.
    computes: bool


class _Still:
    """Since when one part has made no progress, and what CPU it had used by then."""

    def __init__(self) -> None:
        self.since: float | None = None
        self._seen = 0.0
        self._cpu = 0.0

    def note(self, since: float | None, at: float, cpu: float) -> None:
        if since != self.since:
            self.since, self._seen, self._cpu = since, at, cpu

    def computes(self, at: float, cpu: float) -> bool:
        return cpu - self._cpu >= COMPUTES * (at - self._seen)


class Progress:
    """Follows one replica."""

    def __init__(self) -> None:
        self._loop = _Still()
        self._threads = _Still()
        self._activity = -1

    def look(self, sample: Sample, after: float) -> Verdict | None:
        """Take one more sample; return what has made no progress for ``after`` seconds.

        Requests that end are progress, and so is each part of a stream. A request may take as long as it likes: only
        where others wait for its thread, or it holds up the event loop, is anything wrong.
        """
        at = sample.at
        self._loop.note(sample.loop_asked, at, sample.loop_cpu)
        since = self._threads.since if sample.activity == self._activity else None
        self._threads.note((at if since is None else since) if sample.waiting else None, at, sample.pool_cpu)
        self._activity = sample.activity
        if self._loop.since is not None and at - self._loop.since >= after:
            return Verdict(part="loop", since=self._loop.since, computes=self._loop.computes(at, sample.loop_cpu))
        if self._threads.since is not None and at - self._threads.since >= after:
            computes = self._threads.computes(at, sample.pool_cpu)
            return Verdict(part="threads", since=self._threads.since, computes=computes)
        return None
