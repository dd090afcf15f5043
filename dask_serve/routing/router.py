"""The router: one per event loop and deployment, the same code in proxies, sessions and replicas.

It carries out what the dispatcher decides, keeps the deadlines, and gives every request exactly one answer.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from ..exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaLostError,
    RequestCancelledError,
    RequestTimeoutError,
)
from ..measures.histogram import BOUNDS, Histogram
from ..policy.dispatch import Dispatcher
from ..policy.forecast import APART
from ..policy.retries import RetryBudget
from ..policy.target import Target
from ..wire.frames import Buffer
from ..wire.messages import Chunk, Failure, Reply
from .calls import ONCE, Outgoing
from .link import Link
from .table import DeploymentEntry

__all__ = ["Router"]

#: Routers tell each other of their backlogs, through the replicas, in steps of this part of ``max_queued_requests``.
STEPS = 16


class Router:
    """Routes the requests of one event loop to one deployment.

    Parameters
    ----------
    id : str
        ``app/deployment``.

    Attributes
    ----------
    sent, answered, failed, refused, lost, cancelled : int
        Counts since the router was made.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.entry: DeploymentEntry | None = None
        self.sent = self.answered = self.failed = self.refused = self.lost = self.cancelled = 0
        self._loop = asyncio.get_running_loop()
        self._dispatcher = Dispatcher(self, random.random)
        self._retries = RetryBudget()
        #: Replicas that the table may still list: those that said they drain, and those that cannot be reached.
        self._draining: set[str] = set()
        self._unreachable: set[str] = set()
        self._gone_for_good: str | None = None
        #: Called while the deployment scales by its load, when the level of the backlog has changed.
        self.on_backlog: Callable[[], None] | None = None
        #: How long requests waited here, where somebody asks for that: a proxy.
        self.waited: Histogram | None = None
        #: Replicas of this deployment load models: over HTTP requests may name one.
        self.knows_models = False

    def __repr__(self) -> str:
        replicas = len(self._dispatcher.targets)
        return f"<Router {self.id}: {replicas} replicas, {self.in_flight} in flight, {self.queued} queued>"

    @property
    def queued(self) -> int:
        """Requests that wait here."""
        return self._dispatcher.queued

    @property
    def in_flight(self) -> int:
        """Requests that are at replicas."""
        return sum(target.mine for target in self._dispatcher.targets.values())

    @property
    def scales(self) -> bool:
        """The deployment has as many replicas as its load needs, perhaps none."""
        return self.entry is not None and self.entry.scales

    @property
    def ready(self) -> bool:
        """A replica can be reached now."""
        return any(target.link.ready for target in self._dispatcher.targets.values())

    # ------------------------------------------------------------------ requests

    def submit(self, call: Outgoing, timeout: float | None, limit: int | None) -> None:
        """Take a request.

        Parameters
        ----------
        call : Outgoing
        timeout : float or None
            Seconds until its deadline. None: those that the deployment declares, if any.
        limit : int or None
            How many requests may wait here before this one is refused. None: as many as the deployment declares, if
            any.
        """
        now = call.since = monotonic()
        if self._gone_for_good is not None:
            self.failed += 1
            call.fail(DeploymentUnavailableError(self._gone_for_good))
            return
        dispatcher = self._dispatcher
        entry = self.entry
        if entry is not None and not call.patient:
            if timeout is None:
                timeout = entry.request_timeout_s
            if limit is None:
                limit = entry.max_queued_requests
        if timeout is not None:
            call.deadline = now + timeout
            call.timer = self._loop.call_later(timeout, self._on_deadline, call)
        late = dispatcher.submit(call)
        if late is not None:
            self._refuse(call, f"it would have been answered {late:.2g} s after its deadline", late)
            return
        if limit is not None and dispatcher.queued and call.target is None:
            dispatcher.levels.step = max(1, limit // STEPS)
            waiting = dispatcher.everywhere(now)
            if waiting > limit:
                self._refuse_waiting(call, waiting - 1, limit, now)

    def _refuse(self, call: Outgoing, why: str, wait: float) -> None:
        """It is not taken in."""
        self.refused += 1
        self._settled(call)
        call.fail(
            BackPressureError(f"deployment {self.id!r} refused request {call.request_id}: {why}", retry_after_s=wait)
        )

    def cancel(self, call: Outgoing) -> None:
        """The caller does not want the answer any more: end the request wherever it is."""
        if not call.dropped:
            self.cancelled += 1
            self._give_up(call)
            call.fail(RequestCancelledError(f"request {call.request_id} was cancelled"))

    def _on_deadline(self, call: Outgoing) -> None:
        if call.dropped:
            return
        where = f"in replica {call.target[1].id}" if call.target else "waiting at the router"
        if call.target is None and not self._dispatcher.targets:
            where += f" (deployment {self.id!r} has no ready replica)"
        waited = monotonic() - call.since
        self.failed += 1
        self._dispatcher.foresight.late()
        self._give_up(call)
        call.fail(RequestTimeoutError(f"request {call.request_id} reached its deadline after {waited:.3g} s, {where}"))

    def _give_up(self, call: Outgoing) -> None:
        call.dropped = True
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        if call.target is None:
            self._dispatcher.cancelled(call, monotonic())
        else:
            call.target[1].link.cancel(call.number)

    # ------------------------------------------------------------------ what the dispatcher tells (Port)

    def send(self, target: Target, call: Outgoing, credit: bool) -> None:
        now = monotonic()
        remaining = None if call.deadline is None else call.deadline - now
        waited = self.waited
        if waited is not None:
            # What its add does, without a call.
            seconds = now - call.since
            waited.counts[bisect_left(BOUNDS, seconds)] += 1
            waited.seconds += seconds
        self.sent += 1
        target.link.call(self, target, call, credit, remaining)

    def want(self, target: Target, count: int, online: int, oldest: float, urgent: bool) -> None:
        target.link.want(target.id, count, online, oldest, urgent)

    def give_back(self, target: Target) -> None:
        target.link.give_back(target.id)

    def too_late(self, call: Outgoing, least: float) -> None:
        self.failed += 1
        self._settled(call)
        left = max(call.deadline - monotonic(), 0.0) if call.deadline is not None else 0.0
        call.fail(
            RequestTimeoutError(
                f"request {call.request_id} waited at the router until only {left:.2g} s were left to its deadline; "
                f"as it takes at least {least:.2g} s, it was not executed"
            )
        )

    # ------------------------------------------------------------------ what links tell

    def on_result(self, target: Target, call: Outgoing, reply: Reply, parts: Sequence[Buffer]) -> None:
        now = monotonic()
        if call.sent > 0 and now - target.forecast.sampled > APART:
            self._dispatcher.foresight.learn(target, call, now)
        self._dispatcher.answered(target, reply.running, reply.wanted, reply.credits, now)
        if call.dropped:
            if reply.stored:
                target.link.release(reply.stored)
            return
        self.answered += 1
        self._settled(call)
        call.on_result(reply, parts)

    def on_chunk(self, call: Outgoing, chunk: Chunk, parts: Sequence[Buffer]) -> None:
        if call.sent > 0:
            # From here on it takes as long as it likes.
            self._dispatcher.foresight.learn(call.target[1], call, monotonic())
            call.sent = -call.sent
        if not call.dropped:
            call.on_chunk(chunk, parts)

    def on_error(self, target: Target, call: Outgoing, failure: Failure, parts: Sequence[Buffer]) -> None:
        self._dispatcher.answered(target, failure.running, failure.wanted, failure.credits, monotonic())
        if call.dropped:
            return
        if failure.error == "ReplicaLostError" and not failure.started and self._may_retry(call):
            call.target = None
            self._dispatcher.put_back(call, monotonic())
            self._fail_if_gone()
            return
        if failure.error == "RequestTimeoutError":
            self._dispatcher.foresight.late()
        self.failed += 1
        self._settled(call)
        call.on_error(failure, parts)

    def on_refused(self, target: Target, call: Outgoing, reply: Reply, draining: bool) -> None:
        """FULL or DRAINING: it was not executed, so it goes back to the head of what waits."""
        call.target = None
        if draining:
            self.forget(target, draining=True)
        self._dispatcher.refused(target, call, reply.running, reply.wanted, monotonic())
        self._fail_if_gone()

    def on_credit(self, target: Target) -> None:
        self._dispatcher.credited(target, monotonic())

    def on_models(self, target: Target) -> None:
        """A replica's models have changed."""
        self.knows_models = True
        target.models, target.loading = target.link.models[target.id]

    def on_link_lost(self, call: Outgoing, executed: bool) -> None:
        """The connection broke under a request."""
        target = call.target[1]
        target.mine -= 1
        if call.dropped:
            return
        if not executed or self._may_retry(call):
            call.target = None
            self._dispatcher.put_back(call, monotonic())
            self._fail_if_gone()
            return
        self.lost += 1
        self.failed += 1
        self._settled(call)
        call.fail(
            ReplicaLostError(
                f"replica {target.id} was lost while it ran request {call.request_id}: the connection to its worker "
                f"process {target.link.door} broke"
            )
        )

    def _may_retry(self, call: Outgoing) -> bool:
        """Whether it may be sent again, which it has to be then. What the deployment declares is looked up only now."""
        if call.retries < 0:
            declared = None if self.entry is None else self.entry.retries_on_loss
            call.retries = int(call.retries == ONCE) if declared is None else declared
        if call.retries <= 0 or not self._retries.take(self.sent, monotonic()):
            return False
        call.retries -= 1
        return True

    def _settled(self, call: Outgoing) -> None:
        call.dropped = True
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None

    def forget(self, target: Target, draining: bool = False) -> None:
        """A replica drains or its process is unreachable: no new requests, whatever the table says."""
        (self._draining if draining else self._unreachable).add(target.id)
        self._dispatcher.remove(target, monotonic())

    def forgive(self) -> None:
        """Replicas that could not be reached may be tried again."""
        self._unreachable.clear()

    def set_usable(self, target: Target, usable: bool) -> None:
        """Its door is silent, or is back."""
        target.usable = usable
        if usable:
            self._dispatcher.fill(monotonic())
        else:
            self._dispatcher.silent(target, monotonic())

    def remind(self) -> None:
        """Called about twice a second."""
        self._dispatcher.remind(monotonic())

    # ------------------------------------------------------------------ the table

    def apply(self, entry: DeploymentEntry | None, links: dict[str, Link]) -> None:
        """Take over a new version of the table's entry; None: the deployment is gone."""
        now = monotonic()
        dispatcher = self._dispatcher
        if self.entry is None and entry is not None:
            if entry.request_timeout_s is not None:
                self._set_deadlines(entry.request_timeout_s, now)
            if entry.max_queued_requests is not None:
                self._refuse_surplus(entry, entry.max_queued_requests, now)
        self.entry = entry
        dispatcher.on_level = self.on_backlog if self.scales else None
        if dispatcher.on_level is not None and dispatcher.queued:
            dispatcher.on_level()
        grown = False
        listed = {} if entry is None else {replica.id: replica for replica in entry.replicas}
        self._draining &= listed.keys()
        self._unreachable &= listed.keys()
        for target in list(dispatcher.targets.values()):
            if target.id not in listed:
                # It drains: what runs there is answered, nothing new goes there.
                target.link.targets.pop(target.id, None)
                dispatcher.remove(target, now)
            elif entry is not None:
                grown = grown or entry.max_ongoing_requests > target.limit
                target.limit = entry.max_ongoing_requests
        if grown:
            dispatcher.fill(now)
        if entry is not None:
            self._add_new(entry, links, now)
        self._gone_for_good = None
        if entry is None:
            self._fail_all(f"deployment {self.id!r} does not exist (any more); deploy it with serve.run()")
        elif entry.failure is not None and not listed:
            self._fail_all(f"deployment {self.id!r} has no replica, and none can be started: {entry.failure}")

    def _add_new(self, entry: DeploymentEntry, links: dict[str, Link], now: float) -> None:
        for replica in entry.replicas:
            link = links.get(replica.process)
            if link is None or link.lost or replica.id in self._dispatcher.targets:
                continue
            if replica.id in self._draining or replica.id in self._unreachable:
                continue
            places = frozenset((replica.process, replica.worker))
            target = Target(replica.id, entry.max_ongoing_requests, link, places)
            target.usable = not link.silent
            if replica.id in link.models:
                self.on_models(target)
            link.targets[replica.id] = (self, target)
            self._dispatcher.add(target, now)

    def fail_untrusted(self, process: str, why: str) -> None:
        """A door or this process has no certificate that the other takes: fail what waits, unless there are others."""
        entry = self.entry
        if entry is None or self._dispatcher.targets or process not in {r.process for r in entry.replicas}:
            return
        self._fail_waiting(
            f"no replica of deployment {self.id!r} can be reached: {why}. Client, scheduler, workers and proxies need "
            "certificates of one authority that have not expired (distributed.comm.tls in Dask's configuration)"
        )

    def _set_deadlines(self, timeout: float, now: float) -> None:
        """Give the calls that came before the deployment was known the deadline that it declares."""
        for call in self._dispatcher.waiting():
            if call.deadline is None and not call.patient:
                call.deadline = call.since + timeout
                call.timer = self._loop.call_later(call.deadline - now, self._on_deadline, call)

    def _refuse_surplus(self, entry: DeploymentEntry, limit: int, now: float) -> None:
        """Refuse those of the calls that came before the deployment was known who are more than may run and wait."""
        slots = len(entry.replicas) * entry.max_ongoing_requests
        for call in self._dispatcher.waiting()[limit + slots :]:
            self._refuse_waiting(call, limit, limit, now)

    def _refuse_waiting(self, call: Outgoing, others: int, limit: int, now: float) -> None:
        """Refuse a call that has been put into the backlog."""
        call.dropped = True
        self._dispatcher.cancelled(call, now)
        why = f"{others} others wait already, and {limit} may (max_queued_requests)"
        # Where nothing is known yet, a second is as good as anything.
        self._refuse(call, why, self._dispatcher.wait() or 1.0)

    def _fail_all(self, why: str) -> None:
        self._gone_for_good = why
        self._fail_waiting(why)

    def _fail_if_gone(self) -> None:
        """Something waits again: in vain, if the deployment has gone meanwhile."""
        if self._gone_for_good is not None:
            self._fail_waiting(self._gone_for_good)

    def _fail_waiting(self, why: str) -> None:
        for call in self._dispatcher.take_all():
            self.failed += 1
            self._settled(call)
            call.fail(DeploymentUnavailableError(why))

    def close(self, why: str) -> None:
        """Fail what waits; later requests fail at once."""
        self._fail_all(why)

    def stats(self) -> dict[str, Any]:
        """Counts for ``/-/metrics``."""
        return {
            "deployment": self.id,
            "sent": self.sent,
            "answered": self.answered,
            "failed": self.failed,
            "refused": self.refused,
            "lost": self.lost,
            "cancelled": self.cancelled,
            "queued": self.queued,
            "in_flight": self.in_flight,
            "replicas": len(self._dispatcher.targets),
        }
