"""A link: this event loop's one connection to one worker process, and what is under way on it."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..exceptions import ReplicaLostError
from ..wire.connection import CallerConnection
from ..wire.frames import Buffer, Frame
from ..wire.messages import (
    BodyEnd,
    Call,
    Event,
    Kind,
    Models,
    Names,
    ReplicaName,
    Want,
    Window,
    decode_chunk,
    decode_event,
    decode_failure,
    decode_models,
    decode_replica,
    decode_reply,
    decode_window,
    encode,
)
from .dial import UntrustedError, Ways, reach
from .store import Fetched

if TYPE_CHECKING:
    from ..policy.target import Target
    from .calls import Outgoing
    from .router import Router

__all__ = ["Link"]

logger = logging.getLogger("dask_serve.routing")

#: A process from which nothing was heard for this many seconds while it was asked is silent: no new requests go there.
SILENT_AFTER = 1.0


class Link:
    """The connection to one process, dialled at once.

    Frames sent before it stands wait in it. When it breaks, or cannot be made, every request that was sent fails with
    `ReplicaLostError` and every one that certainly was not goes back to its router.

    Parameters
    ----------
    door : str
        Address of the door.
    process : str
        The incarnation that must answer.
    on_lost : callable
        Called once with the link when it is of no more use.
    ways : Ways, optional
        How to get there; by default only directly.
    """

    def __init__(
        self,
        secret: bytes,
        process: str,
        door: str,
        ssl: Any,
        on_lost: Callable[[Link], None],
        *,
        ways: Ways | None = None,
    ) -> None:
        self.process = process
        self.door = door
        self.lost = False
        self.silent = False
        #: Since when it is.
        self.silent_since = 0.0
        #: Why one side does not trust the other, if that is why it could not be made.
        self.untrusted = ""
        #: Routers with a target on this link, by replica.
        self.targets: dict[str, tuple[Router, Target]] = {}
        #: What the door told of models, by replica: loaded ones, and those that are being loaded.
        self.models: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, Any] = {}
        self._number = 0
        #: The most calls under way since there was none.
        self._most = 0
        self._asked = 0.0
        #: Bytes that waited to leave at the last look.
        self._unsent = 0
        self._on_lost = on_lost
        #: One that leads nowhere keeps the frames until the one that is found takes its place.
        self._connection = self._make(secret, lambda _: None, self._on_broken)
        self._task: asyncio.Task[None] | None = self._loop.create_task(self._dial(secret, ssl, ways or Ways()))

    # ------------------------------------------------------------------ life

    def _make(self, secret: bytes, on_ready: Callable[[Any], None], on_lost: Callable[[Any], None]) -> CallerConnection:
        return CallerConnection(secret, self.process, self._on_frame, on_ready, on_lost)

    async def _dial(self, secret: bytes, ssl: Any, ways: Ways) -> None:
        try:
            make = functools.partial(self._make, secret)
            connection = await reach(self.process, self.door, ssl, ways, make=make, on_lost=self._on_broken)
            if connection.closed:
                raise ConnectionError("the connection broke at once")
            connection.take_over(self._connection)
            self._connection = connection
            logger.debug("Connected to the door %s", self.door)
        except OSError as error:
            self.untrusted = str(error) if isinstance(error, UntrustedError) else ""
            logger.info("Cannot reach the door %s of process %s: %s", self.door, self.process, error)
            self._break()
        except asyncio.CancelledError:
            # The loop ends, or the link was closed.
            self._break()
            raise
        finally:
            self._task = None

    def _on_broken(self, connection: CallerConnection) -> None:
        if connection is self._connection:
            self._break()

    @property
    def ready(self) -> bool:
        """The door has proved itself: what is sent leaves at once."""
        return self._connection.ready

    def _break(self) -> None:
        if self.lost:
            return
        self.lost = True
        self._connection.closed = True
        calls, self._calls = self._calls, {}
        # Before the handshake nothing has left this side.
        executed = self._connection.ready
        for router, target in list(self.targets.values()):
            router.forget(target)
        self.targets.clear()
        # The last first, as each that goes back goes to the head of its queue.
        for call in reversed(calls.values()):
            if isinstance(call, _Fetch):
                call.fail(self.process)
            else:
                call.target[0].on_link_lost(call, executed)
        self._on_lost(self)

    def close(self) -> None:
        """Close it for good; what is under way fails."""
        if self._task is not None:
            self._task.cancel()
        self._connection.close()
        self._break()

    def give_up(self) -> None:
        """Nothing will come any more; what is under way there is lost."""
        logger.warning("Gave up the door %s, which is silent and not in the table any more", self.door)
        self._connection.abort()

    def check(self, now: float) -> None:
        """Called about twice a second: ask a process that owes an answer whether it is there."""
        connection = self._connection
        if not connection.ready or self.lost:
            return
        unsent = connection.unsent
        # A large payload that goes on leaving is as good as an answer, which has to wait behind it.
        heard = now if unsent < self._unsent else max(connection.heard, connection.drained)
        self._unsent = unsent
        if self._asked and heard >= self._asked:
            self._asked = 0.0
            self._mark(False)
        if self._calls and not self._asked:
            if now - heard > SILENT_AFTER / 2:
                self._asked = now
                connection.send(Kind.PING, 0, b"")
        elif self._asked and now - self._asked > SILENT_AFTER:
            self._mark(True)

    def _mark(self, silent: bool) -> None:
        if self.silent == silent:
            return
        self.silent = silent
        self.silent_since = self._loop.time()
        logger.warning("The door %s is %s", self.door, "silent: no new requests go there" if silent else "back")
        for router, target in list(self.targets.values()):
            router.set_usable(target, not silent)

    # ------------------------------------------------------------------ sending

    def call(self, router: Router, target: Target, call: Outgoing, credit: bool, remaining: float | None) -> None:
        """Send a request."""
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        self._calls[number] = call
        call.target = (router, target)
        call.number = number
        header = Call(
            target.id,
            call.method,
            call.request_id,
            remaining,
            credit,
            call.http,
            list(call.attachments),
            call.model_id,
            call.background,
            call.stream,
            call.urgent,
            call.follows,
            call.trace,
        )
        self._connection.send(Kind.CALL, number, encode(header), call.parts)
        under_way = len(self._calls)
        if under_way == 1:
            if self._most <= 1:
                # A caller that calls one after the other: there is nothing to wait for, and a turn of the loop to save.
                self._connection.flush()
            self._most = 1
        elif under_way > self._most:
            self._most = under_way

    def cancel(self, number: int) -> None:
        """Tell that a request is not wanted any more; its answer still comes."""
        self._connection.send(Kind.CANCEL, number, b"")

    def widen(self, number: int, nbytes: int) -> None:
        """Tell that a part of a streamed answer was consumed."""
        self._connection.send(Kind.WINDOW, number, encode(Window(nbytes)))

    def want(self, replica: str, count: int, online: int, oldest: float, urgent: bool) -> None:
        self._connection.send(Kind.WANT, 0, encode(Want(replica, count, oldest, urgent, online)))

    def send_body(self, number: int, piece: Buffer) -> None:
        """Send another piece of a request's body."""
        self._connection.send(Kind.CHUNK, number, b"", (piece,))

    def end_body(self, number: int, whole: bool) -> None:
        """Tell that nothing follows of a request's body."""
        self._connection.send(Kind.END, number, encode(BodyEnd(whole)))

    def send_event(self, number: int, event: Event, parts: Sequence[Buffer] = ()) -> None:
        """Send a step of a WebSocket."""
        self._connection.send(Kind.EVENT, number, encode(event), parts)

    def give_back(self, replica: str) -> None:
        self._connection.send(Kind.RETURN, 0, encode(ReplicaName(replica)))

    def release(self, name: str) -> None:
        """Free a result in the process's store."""
        self._connection.send(Kind.RELEASE, 0, encode(Names([name])))

    def fetch(self, name: str) -> asyncio.Future[Fetched]:
        """Ask for a result in the process's store."""
        fetch = _Fetch(name, self._loop.create_future())
        if self.lost:
            fetch.fail(self.process)
        else:
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            self._calls[number] = fetch
            self._connection.send(Kind.FETCH, number, encode(Names([name])))
        return fetch.future

    # ------------------------------------------------------------------ receiving

    def _on_frame(self, connection: CallerConnection, frame: Frame) -> None:  # noqa: C901
        kind = frame.kind
        if kind == Kind.RESULT or kind == Kind.END:  # noqa: PLR1714
            call = self._calls.pop(frame.request, None)
            if call is None:
                return
            reply = decode_reply(frame.header)
            if isinstance(call, _Fetch):
                call.done(Fetched(frame.parts, tight=not reply.stored))
            else:
                router, target = call.target
                router.on_result(target, call, reply, frame.parts)
        elif kind == Kind.CHUNK:
            call = self._calls.get(frame.request)
            if call is not None:
                call.target[0].on_chunk(call, decode_chunk(frame.header), frame.parts)
        elif kind == Kind.ERROR:
            call = self._calls.pop(frame.request, None)
            if call is None:
                return
            failure = decode_failure(frame.header)
            if isinstance(call, _Fetch):
                call.fail(self.process)
            else:
                router, target = call.target
                router.on_error(target, call, failure, frame.parts)
        elif kind == Kind.FULL or (kind == Kind.DRAINING and frame.request):
            call = self._calls.pop(frame.request, None)
            if call is not None:
                router, target = call.target
                router.on_refused(target, call, decode_reply(frame.header), kind == Kind.DRAINING)
        elif kind == Kind.CREDIT:
            name = decode_replica(frame.header).replica
            entry = self.targets.get(name)
            if entry is None:
                self.give_back(name)
            else:
                entry[0].on_credit(entry[1])
        elif kind == Kind.DRAINING:
            name = decode_replica(frame.header).replica
            self.models.pop(name, None)
            entry = self.targets.pop(name, None)
            if entry is not None:
                entry[0].forget(entry[1], draining=True)
        elif kind == Kind.WINDOW:
            call = self._calls.get(frame.request)
            if call is not None and not call.dropped:
                call.on_window(decode_window(frame.header).nbytes)
        elif kind == Kind.EVENT:
            call = self._calls.get(frame.request)
            if call is not None and not call.dropped:
                call.on_event(decode_event(frame.header), frame.parts)
        elif kind == Kind.MODELS:
            self._on_models(decode_models(frame.header))
        elif kind != Kind.PONG and kind <= Kind.LAST:
            connection._refuse(f"a door does not send frames of kind {kind}")

    def _on_models(self, told: Models) -> None:
        self.models[told.replica] = frozenset(told.ready), frozenset(told.loading)
        entry = self.targets.get(told.replica)
        if entry is not None:
            entry[0].on_models(entry[1])


class _Fetch:
    """A stored result that is on its way."""

    __slots__ = ("future", "name")

    def __init__(self, name: str, future: asyncio.Future[Fetched]) -> None:
        self.name = name
        self.future = future

    def done(self, fetched: Fetched) -> None:
        if not self.future.done():
            self.future.set_result(fetched)

    def fail(self, process: str) -> None:
        if not self.future.done():
            self.future.set_exception(
                ReplicaLostError(f"the result {self.name} is lost: process {process} that held it is gone")
            )
