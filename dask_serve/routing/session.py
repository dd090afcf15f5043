"""A session: one process's view of one cluster's service.

It follows the table, and keeps a fabric for each event loop that calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future as ConcurrentFuture
from time import monotonic
from typing import Any

from ..exceptions import NotRunningError
from ..wire.loops import run_on, running_loop
from ..wire.tls import for_callers, lend_to_client
from .callers import callers
from .dial import Ways
from .engine import Engine
from .fabric import Fabric
from .leftovers import Leftovers
from .store import Fetched, stores, taken_here
from .table import Table, decode_table
from .tunnel import SchedulerTunnel

__all__ = ["Session"]

logger = logging.getLogger("dask_serve.session")

#: Seconds that the controller may hold a question for a newer table.
POLL = 30.0
#: Seconds until a controller that did not answer is asked again.
RETRY = 0.5
#: Seconds to wait for the first table where nothing goes without it.
FIRST_TABLE = 5.0
#: After this many answers "there is no such operation" dask_serve does not run on the cluster, rather than not yet.
ABSENT_AFTER = 4


class Session:
    """The service as one process sees it.

    When the controller is silent the session goes on with the table that it has.

    Parameters
    ----------
    owner : distributed.Client or distributed.Worker
        Through whose connection to the scheduler the table comes; the session ends with it.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.id = uuid.uuid4().hex
        self.table: Table | None = None
        #: There is no controller on the cluster.
        self.absent = False
        self.closed = False
        #: This process is a fork of the one that the session belongs to: nothing is left of it but what it knew.
        self.forked = False
        self.in_worker = hasattr(owner, "batched_send")
        self._loop: asyncio.AbstractEventLoop = owner.loop.asyncio_loop
        self.leftovers = Leftovers(self)
        #: Handles by target and options, while anybody has them.
        self.handles: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
        if self.in_worker:
            lend_to_client(owner.security, "worker")
        self._ssl = for_callers(owner.security)
        self._ways = Ways(SchedulerTunnel(owner))
        self._lock = threading.Lock()
        # For the owner's loop only.
        self._news = asyncio.Event()
        self._engine: Engine | None = None
        self._engine_fabric: Fabric | None = None
        self._fabrics: dict[asyncio.AbstractEventLoop, Fabric] = {}
        # Not in the context of whoever calls first: it would live as long as this, and with it a replica's model.
        self._watch = contextvars.Context().run(asyncio.run_coroutine_threadsafe, self._follow(), self._loop)
        _sessions.add(self)

    @classmethod
    def of(cls, owner: Any) -> Session:
        """Return the session of a client or worker, made at first use."""
        session = owner.__dict__.get("_dask_serve_session")
        if session is None or session.closed:
            with _making:
                session = owner.__dict__.get("_dask_serve_session")
                if session is None or session.closed:
                    session = owner.__dict__["_dask_serve_session"] = cls(owner)
        assert isinstance(session, Session)
        return session

    @property
    def is_asynchronous(self) -> bool:
        """Blocking here would block the loop that the owner runs on."""
        return not self.in_worker and bool(self.owner.asynchronous)

    @property
    def address(self) -> str:
        """Address of the scheduler."""
        return str(self.owner.scheduler.address)

    @property
    def cluster(self) -> str:
        """The scheduler's id; empty while it is not known."""
        if self.table is not None and self.table.cluster:
            return self.table.cluster
        # Workers are not told.
        return str(getattr(self.owner, "_scheduler_identity", {}).get("id", ""))

    def is_of(self, cluster: str) -> bool:
        """Tell whether this is the cluster with that scheduler id; may wait for the first table.

        In an event loop it cannot wait, and takes an unknown cluster for the right one.
        """
        if not self.cluster and running_loop() is None:
            asyncio.run_coroutine_threadsafe(self.until(lambda _: True, FIRST_TABLE), self._loop).result()
        return self.cluster in ("", cluster)

    # ------------------------------------------------------------------ the table

    def deadline_of(self, deployment: str) -> float | None:
        """Return the seconds that a deployment gives its requests, as far as the table tells."""
        entry = None if self.table is None else self.table.deployments.get(deployment)
        return None if entry is None else entry.request_timeout_s

    async def _follow(self) -> None:
        """Ask for newer tables until the owner closes (on the owner's loop)."""
        epoch, version, absent = "", 0, 0
        try:
            while not self._is_over():
                try:
                    reply = await self.owner.scheduler.serve_table(epoch=epoch, since=version, timeout=POLL)
                except asyncio.CancelledError:
                    raise
                except Exception as error:  # noqa: BLE001
                    if self._is_over():
                        return
                    logger.info(
                        "The controller at %s does not answer (%s); going on with the last table", self.owner, error
                    )
                    await asyncio.sleep(RETRY)
                    continue
                if not reply or "table" not in reply:
                    absent += 1
                    if absent == ABSENT_AFTER:
                        with self._lock:
                            self.absent, self.table = True, None
                        self._to_all(Fabric.absent)
                    await asyncio.sleep(RETRY)
                elif reply["table"] is not None:
                    table = decode_table(reply["table"])
                    epoch, version, absent = table.epoch, table.version, 0
                    self._publish(table)
        finally:
            self._end()

    def _is_over(self) -> bool:
        status = str(getattr(self.owner, "status", ""))
        # Replicas of a worker that closes drain meanwhile, and what they run may call others.
        return status in _CLOSED and not (self.in_worker and status == "Status.closing")

    async def until(self, holds: Callable[[Table], bool], timeout: float) -> bool:
        """Wait until the table is such (on the owner's loop); False after ``timeout`` seconds."""
        deadline = monotonic() + timeout
        while self.table is None or not holds(self.table):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - monotonic())
            except asyncio.TimeoutError:
                return False
        return True

    def _publish(self, table: Table) -> None:
        with self._lock:
            self.absent, self.table = False, table
        self._news.set()
        self._to_all(Fabric.apply, table)

    def _to_all(self, function: Callable[..., None], *args: Any) -> None:
        with self._lock:
            fabrics = [*self._fabrics.items()]
            if self._engine is not None and self._engine_fabric is not None:
                fabrics.append((self._engine.loop, self._engine_fabric))
        for loop, fabric in fabrics:
            try:
                loop.call_soon_threadsafe(function, fabric, *args)
            except RuntimeError:  # that loop is closed
                self._fabrics.pop(loop, None)

    # ------------------------------------------------------------------ fabrics

    def engine(self) -> tuple[Engine, Fabric]:
        """Return the background loop and its fabric, for synchronous callers."""
        engine, fabric = self._engine, self._engine_fabric
        if engine is not None and fabric is not None and engine.born == Engine.forks:
            return engine, fabric
        with self._lock:
            if self._engine is None or self._engine_fabric is None or self._engine.born != Engine.forks:
                self._check_open()
                engine = Engine.acquire()
                fabric = self._make_fabric(engine.loop, "engine")
                self._engine, self._engine_fabric = engine, fabric
                if self.table is not None:
                    engine.put(fabric.apply, self.table)
                elif self.absent:
                    engine.put(fabric.absent)
            return self._engine, self._engine_fabric

    def fabric(self, loop: asyncio.AbstractEventLoop) -> Fabric:
        """Return the fabric of the running loop (called on its thread), for asynchronous callers."""
        fabric = self._fabrics.get(loop)
        if fabric is None:
            if self._engine is not None and loop is self._engine.loop:
                assert self._engine_fabric is not None
                return self._engine_fabric
            self._check_open()
            fabric = self._make_fabric(loop, f"loop-{id(loop):x}")
            with self._lock:
                self._fabrics[loop] = fabric
                table, absent = self.table, self.absent
            if table is not None:
                fabric.apply(table)
            elif absent:
                fabric.absent()
            contextvars.Context().run(loop.create_task, self._close_with(loop, fabric))
        return fabric

    def _make_fabric(self, loop: asyncio.AbstractEventLoop, name: str) -> Fabric:
        # Only workers have a page to tell of their routers.
        measured = self.in_worker
        fabric = Fabric(loop, name=name, ssl=self._ssl, ways=self._ways, report=self._report, measured=measured)
        if measured:
            callers.add(fabric)
        return fabric

    async def _close_with(self, loop: asyncio.AbstractEventLoop, fabric: Fabric) -> None:
        """Close the fabric when its loop ends: asyncio closes the asynchronous generators of a loop then."""

        async def until_the_loop_ends() -> AsyncGenerator[None, None]:
            try:
                yield
            finally:
                self._fabrics.pop(loop, None)
                await fabric.close()

        fabric.guard = until_the_loop_ends()
        await fabric.guard.__anext__()

    def _check_open(self) -> None:
        if self.closed:
            raise NotRunningError("the Dask client behind this is closed; get the handle again from an open one")

    # ------------------------------------------------------------------ results that stay in a process's store

    async def fetch(self, process: str, door: str, name: str) -> Fetched:
        """Return a stored result; from this process, or through the door of the one that has it.

        Raises
        ------
        ReplicaLostError
            The process is gone, or has the result no more.
        """
        fetched = taken_here(process, name)
        if fetched is not None:
            return fetched
        fabric = self._fabrics.get(asyncio.get_running_loop())
        if fabric is not None:
            return await fabric.fetch(process, door, name)
        fetching: ConcurrentFuture[Fetched] = self.on_engine(self.engine()[1].fetch(process, door, name))
        return await asyncio.wrap_future(fetching)

    def on_engine(self, coroutine: Coroutine[Any, Any, Any]) -> ConcurrentFuture[Any]:
        """Run a coroutine on the engine's loop."""
        try:
            loop = self.engine()[0].loop
        except NotRunningError:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    async def on_owner(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await a coroutine on the loop of the client or worker, from any loop."""
        return await run_on(self._loop, coroutine)

    def release(self, process: str, name: str) -> None:
        """Free a stored result; from any thread and from finalisers."""
        store = stores.get(process)
        if store is not None:
            store.drop(name)
            return
        engine, fabric = self._engine, self._engine_fabric
        try:
            if engine is not None and fabric is not None and fabric.knows(process):
                engine.put(fabric.release, process, name)
                return
            for loop, other in list(self._fabrics.items()):
                if other.knows(process):
                    loop.call_soon_threadsafe(other.release, process, name)
                    return
        except RuntimeError:  # the loop is closed, and with its connection the result goes
            pass

    # ------------------------------------------------------------------ the scheduler

    def worker_of(self, process: str) -> list[str]:
        """Return the Dask address of the worker that lives in a process, if the table tells it."""
        for entry in self.table.deployments.values() if self.table else ():
            for replica in entry.replicas:
                if replica.process == process:
                    return [replica.worker]
        return []

    def later(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function soon on some loop of ours, from any thread and from finalisers."""
        try:
            self._loop.call_soon_threadsafe(function, *args, context=contextvars.Context())
        except RuntimeError:
            logger.debug("%s came after the client was closed", function)

    def tell(self, op: str, **message: Any) -> None:
        """Send a message to the controller without waiting; from any thread."""

        async def send() -> None:
            try:
                await getattr(self.owner.scheduler, op)(**message)
            except Exception as error:  # noqa: BLE001
                logger.warning("The controller did not take %s: %s", op, error)

        try:
            asyncio.run_coroutine_threadsafe(send(), self._loop)
        except RuntimeError:
            logger.debug("%s came after the client was closed", op)

    def _report(self, backlogs: dict[str, Any]) -> None:
        """Tell the controller how many requests wait; the next report makes up for one that is lost."""
        owner = self.owner.address if self.in_worker else self.owner.id

        async def send() -> None:
            with contextlib.suppress(Exception):
                await self.owner.scheduler.serve_backlogs(owner=owner, **backlogs)

        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(send(), self._loop)

    # ------------------------------------------------------------------ the end

    def _after_fork(self) -> None:
        """Forget all that runs in the parent: loops, threads, and locks that somebody there may have held."""
        self.closed = self.forked = True
        self._lock = threading.Lock()
        self._engine = self._engine_fabric = None
        self._fabrics = {}

    def _end(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            engine, fabric = self._engine, self._engine_fabric
            self._engine = self._engine_fabric = None
            fabrics, self._fabrics = dict(self._fabrics), {}
        if engine is not None and fabric is not None:

            async def close() -> None:
                await fabric.close()
                engine.release()

            asyncio.run_coroutine_threadsafe(close(), engine.loop)
        for loop, other in fabrics.items():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_close_soon, loop, other)


_making = threading.Lock()

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    global _making
    _making = threading.Lock()
    for session in list(_sessions):
        session._after_fork()


os.register_at_fork(after_in_child=_after_fork)

#: A client's and a worker's states in which their session is over.
_CLOSED = {"closed", "closing", "Status.closed", "Status.closing", "Status.failed"}


def _close_soon(loop: asyncio.AbstractEventLoop, fabric: Fabric) -> None:
    loop.create_task(fabric.close())
