"""The door of a worker's process: one daemon thread that listens for callers and serves all replicas of the process.

It is a thread of its own so that user code that blocks its event loop silences nobody: pings, refusals and cancels go
on. It touches neither the worker's event loop nor the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, TypeVar

from ..routing.dial import notice_silence
from ..routing.fabric import Fabric
from ..routing.store import ResultStore, stores, taken_here
from ..wire import payloads
from ..wire.connection import DoorConnection
from ..wire.frames import Buffer, Frame
from ..wire.local import listen_locally
from ..wire.loops import new_event_loop
from ..wire.mailbox import Mailbox
from ..wire.messages import (
    Failure,
    Kind,
    Models,
    Reply,
    decode_body_end,
    decode_call,
    decode_event,
    decode_names,
    decode_replica,
    decode_want,
    decode_window,
    encode,
)
from .core import ReplicaCore
from .execution import Answer, Execution
from .listening import Place, TLSListener, bind
from .room import Room

__all__ = ["Door", "Visitor"]

logger = logging.getLogger("dask_serve.door")

#: The interpreter hands over between threads after this many seconds. Beside CPU-bound Python threads the default (5
#: ms) makes the door's median 5.6 ms, this one 0.34 ms, for about a tenth of the user code's speed.
SWITCH_INTERVAL = 1e-4

#: Results whose caller vanished stay this many seconds: a promoted ref may still be on its way to fetch them.
ORPHAN_LIFETIME = 60.0

T = TypeVar("T")


class Visitor(DoorConnection):
    """One caller's connection, with the requests it has here."""

    def __init__(self, door: Door, secret: bytes) -> None:
        super().__init__(secret, door.process, door._on_frame, door._on_lost)
        self._door = door
        self.executions: dict[int, Execution] = {}
        #: Names in the result store that this caller has not released.
        self.stored: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        notice_silence(transport)
        self._door.connections.add(self)

    def _welcome(self) -> None:
        super()._welcome()
        self._door.welcome(self)


class Door:
    """The listener, its connections, and the replicas behind it.

    Parameters
    ----------
    secret : bytes
        The cluster's secret.
    place : Place
        Where to listen.
    ssl : SSLContext, optional
        Serve TLS with the worker's certificates.
    dial_ssl : SSLContext, optional
        For other doors with TLS.
    results_limit : int, optional
        Bytes of stored results from which on calls from Python wait.

    Attributes
    ----------
    process : str
        Incarnation of this process.
    address : str
        ``tcp://host:port`` or ``tls://host:port``.
    """

    def __init__(
        self, secret: bytes, place: Place, ssl: Any = None, dial_ssl: Any = None, results_limit: int | None = None
    ) -> None:
        self.process = uuid.uuid4().hex
        self.address = ""
        self.store = stores[self.process] = ResultStore(results_limit)
        #: Bytes of results that were fetched from here through a connection.
        self.served = 0
        self.replicas: dict[str, ReplicaCore] = {}
        self.connections: set[Visitor] = set()
        #: Replicas whose models callers have heard of.
        self._told: set[str] = set()
        self.loop = new_event_loop()
        self.mailbox = Mailbox(self.loop, self._on_mail)
        self.room = Room(self.store, self.replicas.values(), self.loop, self.call)
        self._secret = secret
        self._place = place
        self._ssl = ssl
        self._dial_ssl = dial_ssl
        self._server: asyncio.AbstractServer | TLSListener | None = None
        self._local: asyncio.AbstractServer | None = None
        self._fabric: Fabric | None = None
        #: When it was asked whether it is there, until it answers.
        self._asked: float | None = None
        self._thread = threading.Thread(target=self._run, name="dask-serve-door", daemon=True)

    # ------------------------------------------------------------------ life

    @property
    def closed(self) -> bool:
        """Nobody comes through it any more."""
        return self.loop.is_closed() or (self._thread.ident is not None and not self._thread.is_alive())

    def start(self) -> None:
        """Listen; returns once the address is known.

        Raises
        ------
        ServeError
            No port could be had.
        """
        if sys.getswitchinterval() > SWITCH_INTERVAL:
            sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread.start()
        try:
            self.run(self._listen()).result()
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    async def _listen(self) -> None:
        self._fabric = Fabric(self.loop, name=f"door-{self.process[:8]}", secret=self._secret, ssl=self._dial_ssl)

        def visit() -> Visitor:
            return Visitor(self, self._secret)

        sock = bind(self._place)
        port, shown = sock.getsockname()[1], self._place.shown
        if self._ssl is None:
            self._server = await self.loop.create_server(visit, sock=sock, backlog=1024)
        else:
            self._server = TLSListener(sock, visit, self._ssl)
        local = listen_locally(self.process) if self._ssl is None else None
        if local is not None:
            self._local = await self.loop.create_unix_server(visit, sock=local, backlog=1024)
        host = f"[{shown}]" if ":" in shown else shown
        self.address = f"{'tls' if self._ssl else 'tcp'}://{host}:{port}"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> ConcurrentFuture[T]:
        """Run a coroutine on the door's loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self, timeout: float = 2.0) -> None:
        """Close the listener and all connections, and end the thread. Not from the door's own thread."""
        if self._thread.is_alive():
            try:
                self.run(self._close()).result(timeout)
            except Exception:  # noqa: BLE001
                logger.warning("The door of process %s did not close in %s s", self.process, timeout)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout)
        stores.pop(self.process, None)

    async def _close(self) -> None:
        for server in (self._server, self._local):
            if server is not None:
                server.close()
        for core in list(self.replicas.values()):
            self.remove(core)
        for connection in list(self.connections):
            connection.close()
        if self._fabric is not None:
            await self._fabric.close()
        self.room.close()
        # One turn for what is queued to leave, one for the transports to tell that they are closed.
        deadline = time.monotonic() + 1.0
        while self.connections and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    # ------------------------------------------------------------------ frames

    def _on_frame(self, connection: Visitor, frame: Frame) -> None:  # noqa: C901
        kind = frame.kind
        # What was answered from user threads is in the books before anything new is decided.
        self.mailbox.drain()
        if kind == Kind.CALL:
            call = decode_call(frame.header)
            core = self.replicas.get(call.replica)
            if core is None:
                connection.send(Kind.DRAINING, frame.request, encode(Reply()))
            else:
                core.on_call(connection, frame, call)
        elif kind == Kind.CANCEL:
            execution = connection.executions.get(frame.request)
            if execution is not None:
                execution.core.on_cancel(execution)
        elif kind == Kind.WANT:
            want = decode_want(frame.header)
            core = self.replicas.get(want.replica)
            if core is not None:
                core.on_want(connection, want)
        elif kind == Kind.RETURN:
            core = self.replicas.get(decode_replica(frame.header).replica)
            if core is not None:
                core.on_return(connection)
        elif kind == Kind.PING:
            connection.send(Kind.PONG, frame.request, b"")
        elif kind == Kind.WINDOW:
            execution = connection.executions.get(frame.request)
            if execution is not None:
                execution.core.user.widen(execution, decode_window(frame.header).nbytes)
        elif kind == Kind.RELEASE:
            for name in decode_names(frame.header).names:
                self.store.drop(name)
        elif kind == Kind.FETCH:
            self._on_fetch(connection, frame)
        elif kind in {Kind.CHUNK, Kind.END, Kind.EVENT}:
            execution = connection.executions.get(frame.request)
            if execution is None:
                # Answered already; its caller does not know yet.
                return
            if execution.inflow is None:
                connection._refuse(f"it sent a frame of kind {kind} behind a call that announced none")
            elif kind == Kind.CHUNK:
                execution.inflow.put(frame.parts)
            elif kind == Kind.EVENT:
                execution.inflow.put_event(decode_event(frame.header), frame.parts)
            else:
                execution.inflow.end(decode_body_end(frame.header).whole)
        elif kind <= Kind.LAST:
            connection._refuse(f"a caller does not send frames of kind {kind}")

    def _on_fetch(self, connection: Visitor, frame: Frame) -> None:
        name = decode_names(frame.header).names[0]
        parts = self.store.get(name)
        if parts is None:
            message = f"the result {name} is no longer in process {self.process}"
            connection.send(Kind.ERROR, frame.request, encode(Failure(0, 0, 0, "ReplicaLostError", message)))
        else:
            self.served += payloads.size_of(parts)
            header = Reply(stored="" if self.store.tight else name)
            connection.send(Kind.RESULT, frame.request, encode(header), parts)

    def _on_lost(self, connection: Visitor) -> None:
        self.mailbox.drain()
        self.connections.discard(connection)
        for execution in list(connection.executions.values()):
            execution.core.on_cancel(execution)
        for core in self.replicas.values():
            core.on_lost(connection)
        for name in list(connection.stored):
            self.loop.call_later(ORPHAN_LIFETIME, self.store.drop, name)

    # ------------------------------------------------------------------ from user threads

    def answer(self, core: ReplicaCore, answers: Sequence[tuple[Execution, Answer]], at_once: bool) -> None:
        """Take answers, or parts of them, from a user thread, in their order.

        Parameters
        ----------
        core : ReplicaCore
            The replica that answers.
        answers : sequence of (Execution, Answer)
        at_once : bool
            Write them in this thread where that is possible; the door is not woken for the books then.
        """
        try:
            if at_once and core.answer_from_thread(answers, len(self.mailbox)):
                self.mailbox.leave(answers)
                # The other half of this is in the core: whoever begins to wait there looks for what was left here.
                if core.is_awaited:
                    self.mailbox.wake()
            else:
                self.mailbox.put_all(answers)
        except RuntimeError:  # the door is closed: nobody is left who could read it
            logger.debug("An answer came after the door was closed")

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the door's loop, from any thread; silently nothing once the door is closed."""
        try:
            self.mailbox.put((None, function))
        except RuntimeError:
            logger.debug("%s came after the door was closed", function)

    def _on_mail(self, mail: tuple[Execution | None, Any]) -> None:
        execution, content = mail
        if execution is None:
            content()
            return
        closed = execution.core.closed
        if content.stored:
            connection = execution.connection
            # Nobody will ask for it whose connection is lost, or who was answered otherwise: it was cancelled, or its
            # replica was stopped. What a user thread has written is the answer.
            if connection.closed or execution.left or (closed and not execution.answered):
                self.store.drop(content.stored)
            else:
                self.store.own(content.stored, connection.stored)
        if not closed:
            execution.core.on_answer(execution, content)

    # ------------------------------------------------------------------ replicas and results

    def report(self) -> dict[str, Any]:
        """Tell what the process holds, for the status; from any thread."""
        store = self.store
        return {
            "process": self.process,
            "shut": self._shut_for(),
            "results": len(store),
            "result_bytes": store.nbytes,
            "limit": store.limit,
            "promoted": store.promoted,
        }

    def _shut_for(self) -> float:
        """Return for how many seconds the door has not answered, infinite when it is closed; asks it again."""
        if self.closed:
            return float("inf")
        now = time.monotonic()
        if self._asked is not None:
            return max(now - self._asked, 0.0)

        def answer() -> None:
            self._asked = None

        self._asked = now
        self.call(answer)
        return 0.0

    def add(self, core: ReplicaCore) -> None:
        """Open the door for a replica, if it has not ended meanwhile (on the door's loop)."""
        if not core.draining:
            core.room = self.room
            self.replicas[core.id] = core
            core.on_models = lambda: self.call(lambda: self._tell_models(core))
            self._tell_models(core)

    def welcome(self, connection: Visitor) -> None:
        """A caller has come: tell it what others were told before."""
        for id in self._told:
            self._tell_models(self.replicas[id], [connection])

    def _tell_models(self, core: ReplicaCore, connections: Iterable[Visitor] | None = None) -> None:
        """Tell callers what models a replica has, if it has any (on the door's loop)."""
        ready, loading = core.loaded()
        if core.id in self.replicas and (ready or loading or core.id in self._told):
            self._told.add(core.id)
            header = encode(Models(core.id, ready, loading))
            for connection in self.connections if connections is None else connections:
                connection.send(Kind.MODELS, 0, header)

    def retire(self, core: ReplicaCore, patience: float, ended: Callable[[], None]) -> None:
        """Take no more requests, and remove the replica once nothing runs, at the latest after ``patience`` seconds.

        On the door's loop; ``ended`` is called then.
        """

        def end() -> None:
            timer.cancel()
            self.remove(core)
            ended()

        timer = self.loop.call_later(patience, end)
        core.drain(list(self.connections))
        core.when_idle(end)

    def remove(self, core: ReplicaCore) -> None:
        """No request reaches the replica any more, and what runs there is answered (on the door's loop)."""
        self.replicas.pop(core.id, None)
        self._told.discard(core.id)
        if not core.closed:
            core.drain(list(self.connections))
            core.close(self.connections)

    async def fetch(self, process: str, door: str, name: str) -> Sequence[Buffer]:
        """Return a stored result, from here or from another process's door (on the door's loop).

        Raises
        ------
        ReplicaLostError
            The process is gone, or has the result no more.
        """
        fetched = taken_here(process, name)
        if fetched is None:
            assert self._fabric is not None
            fetched = await self._fabric.fetch(process, door, name)
        return fetched.parts
