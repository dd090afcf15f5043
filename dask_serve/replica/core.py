"""A replica as its door sees it: admission, the requests it has, their answers. Runs on the door's loop only."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..measures.counts import ReplicaCounts
from ..policy.admission import Admission
from ..policy.forecast import APART, Spread
from ..policy.results import ResultSize
from ..wire.frames import Buffer, Frame, encode_frame
from ..wire.messages import Call, Failure, Kind, ReplicaName, Reply, Want, encode
from .execution import Answer, Execution
from .inflow import Inflow

if TYPE_CHECKING:
    from .load import LoadReports
    from .room import Room
    from .user import UserCode

__all__ = ["ReplicaCore"]

#: Seconds between two looks for answers that are not in the books, while there are requests.
BOOKS_EVERY = 0.02

#: Seconds at least between two looks for credits that have lapsed: most that are due were used long ago.
LAPSE_EVERY = 0.02


class ReplicaCore:
    """Admission and bookkeeping of one replica.

    Parameters
    ----------
    id : str
        The replica's id.
    limit : int
        ``max_ongoing_requests``.
    user : UserCode
        Where admitted requests run.
    settle : callable
        Handles what user threads have left for the door.
    counts : ReplicaCounts, optional
        Where it counts what it does.
    """

    def __init__(  # noqa: PLR0917
        self,
        id: str,
        limit: int,
        user: UserCode,
        loop: asyncio.AbstractEventLoop,
        settle: Callable[[], object],
        counts: ReplicaCounts | None = None,
    ) -> None:
        self.id = id
        self.admission = Admission(limit, user.threads)
        self.result_size = ResultSize()
        #: Set when the door opens for it.
        self.room: Room | None = None
        #: Set while the deployment scales by its load.
        self.load: LoadReports | None = None
        self.draining = False
        #: Everything is answered; what user code still answers is dropped.
        self.closed = False
        self.counts = ReplicaCounts() if counts is None else counts
        #: Where admitted requests run.
        self.user = user
        #: Seconds that nearly every request takes from the moment that user code begins.
        self.least = 0.0
        self._takes = Spread()
        self._sampled = 0.0
        self._settle = settle
        self._books_are_due = False
        self._loop = loop
        #: Slots that are taken. Only the door counts.
        self._active = 0
        #: Admitted ahead of a slot. Whoever pops one, the door or the thread whose request ends, begins it.
        self.waiting: deque[Execution] = deque()
        self._lapse: asyncio.TimerHandle | None = None
        self._idle: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ frames

    def on_call(self, connection: Any, frame: Frame, call: Call) -> None:
        """Admit a request or refuse it; a refused one was certainly not executed."""
        admission = self.admission
        if self.draining:
            connection.send(Kind.DRAINING, frame.request, encode(Reply(admission.running, admission.wanted)))
            return
        if not admission.admit(connection, call.credit, call.urgent, call.background):
            self.counts.refused += 1
            connection.send(Kind.FULL, frame.request, encode(Reply(admission.running, admission.wanted)))
            if admission.most is not None:
                self._held_back(call)
            return
        execution = Execution(self, connection, frame.request, call, frame.parts, time.monotonic())
        connection.executions[frame.request] = execution
        execution.found = admission.running - 1
        if call.more:
            execution.inflow = Inflow(self.user, execution)
        if self._active < admission.limit:
            self._begin(execution)
        else:
            self.waiting.append(execution)
            # A user thread may have left an answer meanwhile, and not have seen that somebody waits.
            self._settle()
        if not self._books_are_due:
            self._books_are_due = True
            self._loop.call_later(BOOKS_EVERY, self._keep_books)
            if self.load is not None:
                self.load.wake()

    def _held_back(self, call: Call) -> None:
        """A call was refused, and maybe not because all slots are taken."""
        if call.credit:
            # Its credit is somebody else's now.
            self._send_credits(self.admission.hold_back(self.admission.most, time.monotonic()))
        if self.room is not None:
            self.room.refused()

    def set_most(self, most: int | None) -> None:
        """Take over how many calls may run whose results need room."""
        if most != self.admission.most:
            self._send_credits(self.admission.hold_back(most, time.monotonic()))

    def _keep_books(self) -> None:
        # Answers that user threads gave by themselves were noted without waking the door; nothing may have come since.
        self._settle()
        if self._idle and not self.admission.running:
            self._tell_idle()
        self._books_are_due = self.admission.running > 0
        if self._books_are_due:
            self._loop.call_later(BOOKS_EVERY, self._keep_books)

    def on_cancel(self, execution: Execution) -> None:
        """The caller no longer wants it: end it where it is. It is answered all the same, exactly once."""
        execution.cancelled = True
        if execution.running:
            if not execution.begun:
                # It waits for a thread or its loop; user code sees the flag before it begins.
                self._active -= 1
                execution.left = True
                execution.parts = ()
                self._leave(execution, Answer(Kind.ERROR, error="RequestCancelledError", message="cancelled"))
                self._begin_more()
            self.user.cancel(execution)
        else:
            try:
                self.waiting.remove(execution)
            except ValueError:
                # A user thread has just taken it, and sees the flag before user code begins.
                return
            self._leave(execution, Answer(Kind.ERROR, error="RequestCancelledError", message="cancelled"))

    def on_want(self, connection: Any, want: Want) -> None:
        """A router tells its level."""
        if self.draining:
            # It came to the door after the replica had told everybody.
            connection.send(Kind.DRAINING, 0, encode(ReplicaName(self.id)))
            return
        now = time.monotonic()
        credited = self.admission.want(connection, want.count, want.oldest, now, urgent=want.urgent, online=want.online)
        self._send_credits(credited)
        if self.room is not None and self.admission.held_back:
            self.room.refused()
        self._settle()

    def on_return(self, connection: Any) -> None:
        """A router had no use for a credit."""
        self._send_credits(self.admission.give_back(connection, time.monotonic()))

    def on_lost(self, connection: Any) -> None:
        """A caller is gone, with its wants and credits; its requests are cancelled by the door."""
        self._send_credits(self.admission.lost(connection, time.monotonic()))

    # ------------------------------------------------------------------ running

    def _begin(self, execution: Execution) -> None:
        now = time.monotonic()
        if execution.deadline is not None and now >= execution.deadline:
            message = f"the deadline passed while the request waited in replica {self.id}; it was not executed"
            self._leave(execution, Answer(Kind.ERROR, error="RequestTimeoutError", message=message))
            return
        execution.began = now
        execution.running = True
        if self._active:
            # An idle replica tries all: what is known of it may be out of date.
            execution.least = self.least
        self._active += 1
        self.user.begin(execution)

    def on_answer(self, execution: Execution, answer: Answer) -> None:
        """User code has answered; what it streamed before leaves first."""
        if execution.left:
            return
        kind = answer.kind
        connection = execution.connection
        if execution.outflow is not None:
            execution.outflow.drain()
        context = execution.user_context
        if context is not None and context.leases is not None:
            context.end()
        now = time.monotonic()
        if not execution.succeeded:
            self._active -= 1
        self._count(execution, kind, now)
        if answer.stored or self.result_size.mean:
            # Before somebody gets the slot.
            self._measure(execution, answer)
        if execution.entered and now - self._sampled > APART:
            self._sample(execution, kind == Kind.RESULT, now)
        credited = self.admission.finish((execution.ended or now) - execution.began, now, execution.call.urgent)
        if execution.answered:
            connection.executions.pop(execution.request, None)
            self._send_credits(credited)
        else:
            self._reply(execution, answer, credited)
        self._begin_more()
        if self._idle and not self.admission.running:
            self._tell_idle()

    def _count(self, execution: Execution, kind: int, now: float) -> None:
        counts = self.counts
        if kind == Kind.ERROR:
            counts.failed += 1
        else:
            counts.answered += 1
        entered = execution.entered
        if entered:
            # User threads keep the time, as their answers may come into the books late.
            counts.add(entered - execution.came, (execution.ended or now) - entered)
        if execution.cancelled:
            counts.cancelled += 1
            # From the moment that user code began; what it waited for cost nobody anything.
            counts.wasted += now - (entered or now)

    def _sample(self, execution: Execution, whole: bool, now: float) -> None:
        """Learn how long requests wait for user code to begin, and how long that takes."""
        self._sampled = now
        seconds = (execution.ended or now) - execution.entered
        delay = execution.entered - execution.began
        background = execution.call.background
        self.admission.leftover.began(execution.found, delay, seconds, self.admission.limit, now, background)
        if whole:
            self._takes.add(seconds)
            self.least = self._takes.least

    def _begin_more(self) -> None:
        waiting = self.waiting
        while waiting and self._active < self.admission.limit:
            try:
                execution = waiting.popleft()
            except IndexError:  # a user thread was faster
                return
            self._begin(execution)

    def next_after(self, execution: Execution) -> Execution | None:
        """Take who waits for the slot of a request that has ended, which saves the way to the door and back.

        Called by the user's thread, before it hands over the answer; who is returned has to be begun. The door keeps
        the count of slots when it has the answer.
        """
        # The slot of one that was cancelled before it began is the door's already, see `on_cancel`.
        if not execution.begun or execution.cancelled or self._active > self.admission.limit:
            return None
        try:
            successor = self.waiting.popleft()
        except IndexError:
            return None
        now = time.monotonic()
        if successor.deadline is not None and now >= successor.deadline:
            # The door tells it so.
            self.waiting.appendleft(successor)
            return None
        execution.succeeded = True
        successor.began = now
        if self._active > 1:
            successor.least = self.least
        # Last: who cancels sets its flag, and then looks whether user code has to see that.
        successor.running = True
        return successor

    def _measure(self, execution: Execution, answer: Answer) -> None:
        """See what the result means for the room that is left."""
        if execution.call.http is None and answer.kind == Kind.RESULT:
            self.result_size.sample(answer.nbytes)
        if self.room is not None:
            self.room.look()

    @property
    def is_awaited(self) -> bool:
        """Somebody waits for a slot, here or at a router."""
        return bool(self.waiting) or self.admission.wanted > 0

    def answer_from_thread(self, answers: Sequence[tuple[Execution, Answer]], unbooked: int) -> bool:
        """Write whole answers straight from the user's thread, which saves the wake-up of the door.

        What it reads here may be changed by the door meanwhile; the load that it tells is a hint in any case.

        Parameters
        ----------
        answers : sequence of (Execution, Answer)
        unbooked : int
            Answers written before that are not in the books yet.

        Returns
        -------
        bool
            False: the door has to write some of them, those that are not marked as answered.
        """
        if self.is_awaited or self.admission.granted:
            return False
        running = self.admission.running - unbooked
        quiet = self.admission.leftover.quiet
        outgoing: dict[Any, tuple[list[Execution], list[Buffer], int]] = {}
        for execution, answer in answers:
            if answer.kind != Kind.RESULT:
                return False
            running = running - 1 if running > 1 else 0
            header = encode(Reply(running, 0, 0, answer.stored, answer.nbytes, answer.status, answer.headers, quiet))
            executions, frames, size = outgoing.get(execution.connection) or ([], [], 0)
            size += encode_frame(Kind.RESULT, execution.request, header, answer.parts, frames)
            executions.append(execution)
            outgoing[execution.connection] = executions, frames, size
        whole = True
        for connection, (executions, frames, size) in outgoing.items():
            if connection.write_from_thread(frames, size):
                for execution in executions:
                    execution.answered = True
            else:
                whole = False
        return whole

    def _leave(self, execution: Execution, answer: Answer) -> None:
        """Answer a request that was admitted and never ran."""
        self.counts.failed += 1
        self._reply(execution, answer, self.admission.drop(time.monotonic(), execution.call.urgent))
        if self._idle and not self.admission.running:
            self._tell_idle()

    def _reply(self, execution: Execution, answer: Answer, credited: list[Any]) -> None:
        connection = execution.connection
        connection.executions.pop(execution.request, None)
        credits = 0
        if credited:
            credits = credited.count(connection)
            if credits:
                credited = [other for other in credited if other is not connection]
            self._send_credits(credited)
        admission = self.admission
        if answer.kind == Kind.ERROR:
            header = encode(
                Failure(
                    admission.running,
                    admission.wanted,
                    credits,
                    answer.error,
                    answer.message,
                    execution.started,
                    answer.retry_after,
                )
            )
        else:
            header = encode(
                Reply(
                    admission.running,
                    admission.wanted,
                    credits,
                    answer.stored,
                    answer.nbytes,
                    answer.status,
                    answer.headers,
                    admission.leftover.quiet,
                )
            )
        connection.send(answer.kind, execution.request, header, answer.parts)

    def _send_credits(self, connections: list[Any]) -> None:
        for connection in connections:
            connection.send(Kind.CREDIT, 0, encode(ReplicaName(self.id)))
        if self._lapse is None and self.admission.granted:
            self._arm_lapse()

    def _arm_lapse(self) -> None:
        due = self.admission.next_lapse()
        if due is not None:
            self._lapse = self._loop.call_later(max(LAPSE_EVERY, due - time.monotonic()), self._on_lapse)

    def _on_lapse(self) -> None:
        self._settle()
        self._lapse = None
        self._send_credits(self.admission.lapse(time.monotonic()))
        if self._lapse is None:
            self._arm_lapse()

    def loaded(self) -> tuple[list[str], list[str]]:
        """Return the models that are there, and those that are being loaded."""
        return self.user.host.loaded()

    @property
    def on_models(self) -> Callable[[], object]:
        """What is called when they change."""
        return self.user.host.on_models

    @on_models.setter
    def on_models(self, tell: Callable[[], object]) -> None:
        self.user.host.on_models = tell

    def stats(self) -> dict[str, Any]:
        """Counts for the status of the worker."""
        return {
            "running": self.admission.running,
            "waiting": len(self.waiting),
            "wanted": self.admission.wanted,
            "answered": self.counts.answered,
            "failed": self.counts.failed,
            "dropped": self.counts.cancelled,
            "seconds_wasted": self.counts.wasted,
        }

    # ------------------------------------------------------------------ the end

    def drain(self, connections: list[Any]) -> None:
        """Take no more requests, and say so on all connections. The replica is the authority on its own end."""
        if self.draining:
            return
        self.draining = True
        for connection in connections:
            connection.send(Kind.DRAINING, 0, encode(ReplicaName(self.id)))

    def when_idle(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` once nothing runs."""
        self._settle()
        if self.admission.running:
            self._idle.append(tell)
        else:
            tell()

    def _tell_idle(self) -> None:
        waiting, self._idle = self._idle, []
        for tell in waiting:
            tell()

    def set_limit(self, limit: int) -> None:
        """Change ``max_ongoing_requests`` in place."""
        self._send_credits(self.admission.resize(limit, time.monotonic()))
        self._begin_more()

    def close(self, connections: Iterable[Any]) -> None:
        """Forget everything, and answer what still runs as lost; what never began goes back to its router."""
        self.draining = self.closed = True
        self.waiting.clear()
        message = f"replica {self.id} was stopped while it ran the request"
        for connection in connections:
            for execution in [other for other in connection.executions.values() if other.core is self]:
                del connection.executions[execution.request]
                if _take_back(execution):
                    connection.send(Kind.DRAINING, execution.request, encode(Reply()))
                    continue
                failure = Failure(0, 0, 0, "ReplicaLostError", message, execution.started)
                connection.send(Kind.ERROR, execution.request, encode(failure))
        if self._lapse is not None:
            self._lapse.cancel()
            self._lapse = None
        self._tell_idle()


def _take_back(execution: Execution) -> bool:
    """Keep a request from user code, if that has not begun with it and the caller can send all of it again."""
    if execution.begun or execution.inflow is not None:
        return False
    # As in `on_cancel`: first the flag, then the look.
    execution.cancelled = True
    return not execution.begun
