"""One replica from the first line of its life to the last: code fetched, object made, door opened, drained, closed.

It is kept out of the actor, because a thread that holds the actor itself would keep it alive after Dask let go of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from .. import metrics as user_metrics
from ..config import DeploymentOptions
from ..context import ReplicaContext, replica_context
from ..exceptions import ServeError
from ..levels import LEVELS
from ..measures.counts import ReplicaCounts
from .clients import Clients
from .code import fetch_code
from .construction import Construction, observe
from .core import ReplicaCore
from .datasets import DataSets
from .door import Door
from .environment import ProcessEnvironment
from .errors import ErrorReports
from .health import Health
from .hold import Hold
from .ledger import Ledger
from .load import LoadReports
from .user import CLEAN_UP, UserCode

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["ReplicaUnit"]

logger = logging.getLogger("dask_serve.replica")

#: Seconds that a report of a failed start may take.
REPORT_TIMEOUT = 5.0

_decode_options = msgspec.msgpack.Decoder(DeploymentOptions).decode


class ReplicaUnit:
    """A replica's parts, and the order in which they come and go.

    Parameters
    ----------
    spec : dict
        ``id``, ``app``, ``deployment``, ``revision``, ``options`` (msgpack of DeploymentOptions), ``devices`` (their
        ordinals), ``key`` of the actor, and ``holds``: it keeps the Dask resources that the actor acquired.
    worker : distributed.Worker
        The worker whose actor this is.
    """

    def __init__(self, spec: dict[str, Any], worker: Worker) -> None:
        ProcessEnvironment.used = True
        self.id: str = spec["id"]
        self.spec = spec
        self.options = _decode_options(spec["options"])
        self.door: Door | None = None
        self.core: ReplicaCore | None = None
        self._worker = worker
        self._released = threading.Event()
        self._ended = threading.Event()
        self._drained_in_vain = False
        self._health: Health | None = None
        self._hold = Hold(worker, spec["key"]) if spec.get("holds") else None
        devices = tuple(spec.get("devices") or ())
        self._context = ReplicaContext(spec["app"], spec["deployment"], self.id, worker.address, None, devices)
        context = _user_context(worker)
        # While it is constructed, code can ask for everything but the object that is being made.
        context.run(replica_context.set, self._context)
        self.user = UserCode(self.id, self.options.threads, context, self._value_of, self.options.inline_result_bytes)
        self.user.debug = self.options.debug
        self.user.clients = Clients(worker, self.user.loop)
        self.user.clients.enter(context)
        self.user.host.data_sets = DataSets(self.user, lambda: self.options.datasets)
        self.user.on_end = self._on_user_end
        self.user.on_error = ErrorReports(self.id, worker).note
        self._user_ended = threading.Event()
        self._on_end: list[Callable[[], None]] = []
        self._construction = Construction(self.user, worker, spec["deployment"], self._on_worker)

    @property
    def released(self) -> bool:
        """Dask has let go of it: it takes no more requests, and ends when what runs has finished."""
        return self._released.is_set()

    @property
    def ended(self) -> bool:
        """Its threads have been told to end."""
        return self._ended.is_set()

    # ------------------------------------------------------------------ start

    def start(self) -> None:
        """Begin; the outcome goes to the controller as a report. In the actor's constructor."""
        if self._hold is not None:
            self._hold.take()
        self.user.start(self._main)

    async def _main(self) -> None:
        """Run on the user loop: whatever happens here is told to the controller."""
        from .process import ServeProcess  # the process knows its units

        try:
            door = await self._prepare()
            if door is None:
                return
            self.user.open(door)
            ledger = ServeProcess.ledger_of(self._worker)
            counts = ledger.open(f"{self._context.app_name}/{self._context.deployment}", self.id)
            self._on_end.append(lambda: self._close_counts(ledger, counts))
            self.core = ReplicaCore(
                self.id,
                self.options.max_ongoing_requests,
                self.user,
                door.loop,
                door.mailbox.drain,
                counts,
            )
            self.door = door
            # Who releases it sets the flag first and then looks for the door: one of the two sees the other.
            if self._released.is_set():
                return
            await asyncio.wrap_future(door.run(self._open(door, self.core)))
            await self.report("ready", door=door.address, process=door.process)
        except BaseException as error:  # noqa: BLE001
            if self._released.is_set():
                return
            text = "".join(traceback.format_exception(type(error), error, _user_part(error)))
            await self._fail(text)

    async def _ask_for_code(self, part: int) -> Any:
        return await self._on_worker(self._worker.scheduler.serve_code(revision=self.spec["revision"], part=part))

    async def _fail(self, why: str, level: int = logging.ERROR) -> None:
        logger.log(level, "Replica %s could not be started:\n%s", self.id, why)
        # A worker that is closing may not carry the report any more, and lets go of its actors late.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.report("failed", error=why), REPORT_TIMEOUT)
        self.end()

    async def _prepare(self) -> Door | None:
        """Do all that comes before the first request; return the door by which it will come. None: it has failed."""
        from .process import ServeProcess  # the process knows its units

        # Beside the wait for the code.
        libraries = asyncio.ensure_future(self.user.in_pool(self.user.look_for_libraries))
        reply, code = await fetch_code(self._ask_for_code)
        await libraries
        if code is None:
            # Deleted or replaced meanwhile.
            await self._fail(f"the controller has no code for {self.id}: {_told(reply)}", logging.INFO)
            return None
        door: Door = await self.user.in_pool(lambda: ServeProcess.door_of(self._worker, reply["secret"], self))
        await self._construction.run(code, self.spec.get("keys") or [], self._context, lambda: self.options)
        return door

    async def _open(self, door: Door, core: ReplicaCore) -> None:
        self._settle_options(door, core)
        door.add(core)
        self._health = Health(self.user, core, door, lambda: self.options, self._report_health)
        self._health.start()

    def _settle_options(self, door: Door, core: ReplicaCore) -> None:
        """Let the door's part of the replica have the present options (on the door's loop)."""
        core.set_limit(self.options.max_ongoing_requests)
        LoadReports.follow(core, self._worker, door.loop, self.options.autoscaling_config is not None)

    async def _report_health(self, event: str, message: str) -> None:
        await self.report(event, message=message)

    async def _value_of(self, key: Any) -> Any:
        return await self._construction.value_of(key)

    # ------------------------------------------------------------------ control

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait at most ``timeout`` seconds until nothing runs; True if so.

        What is left of the time is for the object's ``shutdown``. Runs on the worker's loop.
        """
        deadline = time.monotonic() + timeout
        door, core = self.door, self.core
        if door is None or core is None:
            return True
        if not self.ended and not await self._until_idle(door, core, timeout):
            self._drained_in_vain = True
            logger.warning("Replica %s still ran requests after %.1f s of draining", self.id, timeout)
            return False
        left = max(deadline - time.monotonic(), 0.0)
        ended, tell_ended = _event()
        self._on_end.append(tell_ended)
        if not self._user_ended.is_set():
            self._end(left)
            try:
                await asyncio.wait_for(ended.wait(), left)
            except asyncio.TimeoutError:
                logger.warning("The code of replica %s has not ended after %.1f s of draining", self.id, timeout)
        return True

    async def _until_idle(self, door: Door, core: ReplicaCore, timeout: float) -> bool:
        idle, tell_idle = _event()

        def begin() -> None:
            core.drain(list(door.connections))
            core.when_idle(tell_idle)

        door.call(begin)
        try:
            await asyncio.wait_for(idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def change(self, options: DeploymentOptions) -> None:
        """Take over options that change in place (on the worker's loop)."""
        door, core = self.door, self.core
        changed = options.user_config != self.options.user_config
        self.options = options
        self.user.inline_below = options.inline_result_bytes
        await asyncio.get_running_loop().run_in_executor(None, observe, self.user, self._context, options)
        if door is not None and core is not None:
            door.call(lambda: self._settle_options(door, core))
        if not changed or self.user.instance is None:
            # While it is constructed, `_construct` comes to it.
            return
        try:
            # In the context that user code has everywhere: this one is of the worker's loop.
            reconfiguring = self.user.spawn(self._construction.reconfigure(options.user_config))
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(reconfiguring, self.user.loop))
        except Exception as error:
            logger.exception("reconfigure() of replica %s failed", self.id)
            # The scheduler unpickles what an actor raises, and must not be given a class of the user's.
            raise ServeError("".join(traceback.format_exception(type(error), error, _user_part(error)))) from None

    def release(self) -> None:
        """Take no more requests, and end once what runs has finished. From any thread: it waits for nothing.

        A replica that was drained in vain has no more time; one that Dask let go of unasked (``client.restart()``, a
        cancelled key) has as long as it would have had to drain.
        """
        if self._released.is_set():
            return
        self._released.set()
        door, core = self.door, self.core
        if door is None or core is None or door.closed:
            self._end()
        else:
            patience = 0.0 if self._drained_in_vain else self.options.graceful_shutdown_timeout_s
            door.call(lambda: door.retire(core, patience, self._end))

    def end(self) -> None:
        """End it now; what runs is cancelled, and answered as lost. From any thread."""
        self._released.set()
        door, core = self.door, self.core
        if door is not None and core is not None:
            door.call(lambda: door.remove(core))
        self._end()

    def _end(self, patience: float | None = None) -> None:
        self._ended.set()
        if self._health is not None and self.door is not None:
            self.door.call(self._health.stop)
        if patience is None:
            patience = CLEAN_UP if self._drained_in_vain else self.options.graceful_shutdown_timeout_s
        self.user.stop(max(patience, CLEAN_UP))

    def _on_user_end(self) -> None:
        LEVELS.set(self.id, ("", ""), None, ())
        if self._hold is not None:
            self._hold.give_back()
        self._user_ended.set()
        for tell in self._on_end:
            tell()

    def _close_counts(self, ledger: Ledger, counts: ReplicaCounts) -> None:
        counts.batches = self.user.host.batch_totals()
        ledger.close(self.id)
        user_metrics.forget(self.id)

    async def report(self, event: str, **info: str) -> None:
        """Tell the controller; a controller that is gone needs no report."""
        try:
            await self._on_worker(self._worker.scheduler.serve_report(replica=self.id, event=event, **info))
        except Exception as error:  # noqa: BLE001
            logger.warning("Replica %s could not report %r: %s", self.id, event, error)

    async def _on_worker(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await a coroutine on the worker's loop, from any other."""
        loop = self._worker.loop.asyncio_loop
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


def _told(reply: dict[str, Any]) -> str:
    """Return the controller's words in an answer without what was asked for."""
    return str(reply["error"][1]) if reply.get("error") else "it gave no answer"


def _event() -> tuple[asyncio.Event, Callable[[], None]]:
    """Return an event of the loop that runs, and what sets it from any thread."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def tell() -> None:
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    return event, tell


def _user_context(worker: Worker) -> contextvars.Context:
    """Return what user code starts from: ``get_worker()`` answers there as in a task."""
    context = contextvars.Context()
    try:
        from distributed.worker import _worker_cvar
    except ImportError:  # pragma: no cover - a private name of distributed
        return context
    context.run(_worker_cvar.set, worker)
    return context


def _user_part(error: BaseException) -> Any:
    """Cut our own frames off a traceback."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and "dask_serve" in tb.tb_frame.f_code.co_filename:
        tb = tb.tb_next
    return tb
