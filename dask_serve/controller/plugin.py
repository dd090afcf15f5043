"""The controller: a scheduler plugin that answers for what runs where."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from distributed import Client
from distributed.comm.addressing import get_address_host
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from ..config import HTTPOptions
from ..dashboard.attach import Dashboard
from ..defaults import overlaid
from ..logs import join_dask
from ..measures.sources import add_source, drop_source
from ..records import keep_records, told_since
from ..routing.table import Table, encode_table
from ..wire.tls import for_callers, lend_to_client
from .applications import Applications
from .boot import Boot, BootDocument
from .changes import Changes, Throttle
from .checkup import Checkup
from .child import Deployer
from .desired import Desired
from .editor import Editor
from .errors import Errors
from .events import Events, brief
from .front import Front, first_options
from .hearing import Hearing
from .history import History
from .leaving import Leaving
from .live import filled_in
from .measures import Measures
from .metrics import controller_families
from .notes import Notes
from .operations import install, operation
from .pieces import Uploads
from .promises import Promises
from .pulse import Pulse
from .reconciler import Reconciler
from .registry import Registry
from .rest import Rest
from .scaling import Scaling
from .service_file import ServiceFile
from .shown import Shown
from .state_file import StateFile, configured, history_length
from .status import ProxyStatus, ServeStatus, encode_status
from .store import Store
from .tunnel import Tunnels
from .views import Views

if TYPE_CHECKING:
    from distributed.comm import Comm
    from distributed.scheduler import Scheduler, WorkerState

__all__ = ["Controller"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two reminders to the scheduler that it is not idle; it looks every 0.25 s.
NOT_IDLE = 0.1


class Controller(SchedulerPlugin):
    """Runs in the scheduler and owns applications, replicas and proxies.

    Its operations are handlers of the scheduler: ``await client.scheduler.serve_status()``. Hooks of the scheduler only
    note what happened and wake the reconciler.

    Parameters
    ----------
    http : HTTPOptions or None, default None
        Start proxies with these at once, rather than with the first application.
    explicit : list of str, default []
        Names of those options that a person gave, for which there is no way round.
    state : StateFile, optional
        Where the desired state is saved; by default where the scheduler's configuration says, if it does.
    document : BootDocument, optional
        Deployed once the scheduler runs.
    service_file : str, optional
        Path of a file that tells where HTTP is served.
    """

    name = "dask-serve"
    idempotent = True

    def __init__(
        self,
        http: HTTPOptions | None = None,
        explicit: list[str] | None = None,
        state: StateFile | None = None,
        document: BootDocument | None = None,
        service_file: str | None = None,
    ) -> None:
        self._http_at_start = http
        self._explicit = set(explicit or ())
        self._state = state
        self._document = document
        self._service_file = service_file

    async def start(self, scheduler: Scheduler) -> None:
        """Install the operations. Never waits, so that two registrations cannot overlap."""
        join_dask()
        keep_records()
        lend_to_client(scheduler.security, "scheduler")
        self.scheduler = scheduler
        self.epoch = uuid.uuid4().hex
        self.secret = secrets.token_bytes(32)
        self.registry = Registry(History(history_length()))
        self.views = Views(self.registry)
        self._publish_soon = Throttle(self.publish)
        self.events = Events(scheduler)
        self.reconciler = Reconciler(
            scheduler, self.registry, self._publish_soon, Notes(self.registry, self.events.add)
        )
        self.leaving = Leaving(scheduler, self.registry, self.reconciler)
        self.editor = Editor(self.registry, self.reconciler.wake, self.events.add)
        self.registry.on_taken_back = self.editor.taken_back
        self.scaling = Scaling(self.registry, self.events, self.reconciler.wake)
        self.errors = Errors(self.registry)
        self.promises = Promises()
        self.uploads = Uploads()
        self.tunnels = Tunnels(for_callers(scheduler.security))
        self.measures = Measures()
        for worker in scheduler.workers.values():
            self.measures.joined(worker)
        self.front = Front(
            scheduler.security, self.editor, self.publish, self.scaling.waits, self.measures, note=self.events.add
        )
        add_source("dask-serve-controller", lambda: controller_families(self._with_workers, self.measures, self.events))
        self.desired = Desired(self)
        self.deployer = Deployer(scheduler)
        self.boot = None if self._document is None else Boot(self._document, self.deployer, self.publish)
        self._booting: asyncio.Task[None] | None = None
        Rest(self).install()
        self._shown = Shown(scheduler, status=self._with_workers, measures=self.measures, events=self.events)
        self.dashboard = Dashboard(scheduler, self._shown)
        self.measures.on_proxy, self.measures.on_worker = self.dashboard.proxy_told, self.dashboard.replicas_told
        self._table = Table(epoch=self.epoch, version=0, secret=self.secret, deployments={}, routes=[])
        self._table_bytes = encode_table(self._table)
        self._tables = Changes()
        self._status = ServeStatus()
        self._statuses = Changes()
        self._client: Client | None = None
        #: Why nothing is started any more, if so.
        self.over = ""
        self._not_idle = PeriodicCallback(self._keep_awake, NOT_IDLE * 1000)
        hearing = Hearing(self)
        install(scheduler, self, self.desired, Applications(self), hearing, Checkup(self))
        scheduler.stream_handlers["serve-load"] = hearing.on_load
        self._adaptive_before = scheduler.adaptive_target
        # Both names are used: Dask's own Adaptive asks over the wire, dashboards and gateways call the method.
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self._adaptive_target
        # Before anybody is answered: nobody may see the service empty, and take that for its state.
        self._state = self._state or configured()
        http = self.editor.open(Store(self._state.path)) if self._state.path is not None else None
        if self._http_at_start is not None:
            self.front.standing = {name: getattr(self._http_at_start, name) for name in self._explicit}
        self._http_at_start, self._explicit = first_options(self._http_at_start, self._explicit, http)
        self.publish()
        self.dashboard.start()
        self._main = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        # A connection to this scheduler before it runs would wait for itself.
        await self.scheduler
        if self._service_file is not None:
            address = self.scheduler.address
            self.front.file = ServiceFile(self._service_file, address, get_address_host(address))
        try:
            self._client = await Client(
                self.scheduler.address,
                asynchronous=True,
                set_as_default=False,
                security=self.scheduler.security,
                direct_to_workers=True,
                name="dask-serve-controller",
            )
            if self._http_at_start is not None:
                self.front.begin(self._http_at_start, self._explicit)
            if self.boot is not None:
                self._booting = asyncio.create_task(self.boot.run())
            pulse = asyncio.create_task(Pulse(self.scheduler, self.registry, self.reconciler, self.secret).run())
            try:
                await self.reconciler.run(self._client)
            finally:
                pulse.cancel()
        except Exception as error:
            logger.exception("the controller of dask_serve ended")
            self._shown.ended = f"{type(error).__name__}: {error}"
            self.over = f"the controller of dask_serve ended, see the scheduler's log: {error!r}"
            self.publish()
            raise

    async def before_close(self) -> None:
        """End with the scheduler."""
        self._shown.ended = "its scheduler closes"
        self.dashboard.close()
        self._not_idle.stop()
        drop_source("dask-serve-controller")
        self._main.cancel()
        if self._booting is not None:
            self._booting.cancel()
        self.deployer.close()
        with suppress(asyncio.CancelledError, Exception):
            await self._main
        self._publish_soon.close()
        self._tables.close()
        self._statuses.close()
        self.promises.close()
        await self.tunnels.close()
        self.scaling.close()
        await self.reconciler.close()
        await self.front.close()
        if self._client is not None:
            await self._client.close()
        self.editor.flush()
        await self.editor.close(remove=self.saves_for_crashes)

    # -- hooks of the scheduler

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """There is room for replicas that wait."""
        self.measures.joined(scheduler.workers[worker])
        self.reconciler.joined_worker(worker)

    def remove_worker(self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **kwargs: Any) -> None:
        """Its replicas leave the table at once, and are replaced."""
        self.tunnels.forget(worker)
        self.measures.left(worker)
        self.scaling.lost(worker)
        self.reconciler.lost_worker(worker)
        self._publish_soon.flush()

    def restart(self, scheduler: Scheduler) -> None:
        """All replicas are lost."""
        self.reconciler.restarted()

    def log_event(self, topic: str, msg: Any) -> None:
        """A worker begins to run, which it does not yet when it joins, or again; or its nanny kills it for memory."""
        if not isinstance(msg, dict):
            return
        if msg.get("action") == "worker-status-change" and msg.get("status") == Status.running.name:
            self.reconciler.joined_worker(topic)
        elif topic == "worker-restart-memory" and "worker" in msg:
            self.reconciler.killed_for_memory(msg["worker"], int(msg.get("rss", 0)))

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Nobody will settle the promises of this client any more."""
        self.promises.remove_client(client)
        self.uploads.remove_client(client)
        self.scaling.lost(client)

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Keep the workers that hold replicas."""
        hosting = self.reconciler.workers.hosting()
        return [worker for worker in workers if worker.address not in hosting]

    # -- operations: the table and the status

    async def serve_table(self, epoch: str = "", since: int = 0, timeout: float = 30.0) -> dict[str, Any]:
        """Return the routing table as soon as it differs from the caller's."""

        def differs() -> bool:
            return (epoch, since) != (self.epoch, self._table.version)

        self._publish_soon.flush()
        news = await self._tables.until(differs, timeout)
        self._publish_soon.flush()
        return {"table": self._table_bytes if news else None}

    async def serve_status(self) -> dict[str, Any]:
        """Return the status."""
        return {"status": encode_status(self.present_status())}

    async def serve_watch(self, since: int = 0, timeout: float = 30.0) -> dict[str, Any]:
        """Return the status as soon as it is newer than ``since``, or after ``timeout`` seconds."""
        self._publish_soon.flush()
        await self._statuses.until(lambda: self._status.version > since, timeout)
        # More may have happened at the same moment.
        self._publish_soon.flush()
        return {"status": encode_status(self._with_workers())}

    async def serve_logs(self, known: dict[str, int]) -> dict[str, Any]:
        """Return the records of this process, and of the proxies, that the caller does not have."""
        return told_since(known)

    # -- operations: tunnels

    async def serve_tunnel(self, comm: Comm, process: str) -> Status:
        """Connect a caller to a worker process's door; the connection is a tunnel from then on."""
        return await self.tunnels.serve(comm, process)

    # -- operations: promises

    async def serve_promise(self, promise: str, client: str) -> dict[str, Any]:
        """Open a promise that ``client`` is to settle."""
        self.promises.open(promise, client)
        return {}

    async def serve_settle(self, promise: str, outcome: Any) -> dict[str, Any]:
        """Settle a promise with what is opaque here."""
        self.promises.settle(promise, outcome)
        return {}

    async def serve_outcome(self, promise: str, timeout: float = 30.0) -> dict[str, Any]:
        """Return the outcome of a promise, or None after ``timeout`` seconds."""
        return {"outcome": await self.promises.outcome(promise, timeout)}

    # -- operations: proxies

    async def serve_routed(self, timeout: float = 2.0) -> dict[str, Any]:
        """Answer when all proxies route by the present table, or after ``timeout`` seconds; and which table that is."""
        self._publish_soon.flush()
        version = self._table.version
        routed = await self.front.until_applied(timeout)
        return {"routed": routed, "epoch": self.epoch, "version": version}

    async def serve_proxy(
        self, epoch: str = "", since: int = 0, timeout: float = 2.0, node: str = "", proxies: Any = ()
    ) -> dict[str, Any]:
        """Return what proxies on another node need: options, and the table once it differs from the caller's."""
        if node:
            self.front.elsewhere.heard(node, msgspec.convert(list(proxies), list[ProxyStatus]))
        answer = await self.serve_table(epoch, since, timeout)
        return {**answer, "options": msgspec.msgpack.encode(self.front.options)}

    @operation
    async def serve_start(
        self, options: bytes = b"", explicit: list[str] | None = None, preferred: list[str] | None = None
    ) -> dict[str, Any]:
        """Start the proxies, or change what can be changed; answer when they accept requests.

        ``preferred`` are options that the caller's configuration has: they go before this process's own.
        """
        given = msgspec.msgpack.decode(options, type=HTTPOptions) if options else HTTPOptions()
        given = overlaid(given, [*(explicit or ()), *(preferred or ())])
        return {"url": await self.front.start(given, set(explicit or ()))}

    # -- inside

    def publish(self, *_: Any) -> None:
        """Make table and status anew, and tell those who wait when they changed."""
        self.editor.flush()
        registry = self.registry
        self._note_statuses()
        table = Table(
            epoch=self.epoch,
            version=self._table.version,
            secret=self.secret,
            deployments=self.views.deployments(),
            routes=self.views.routes(),
            applications=self.views.applications(),
            url=self.front.url,
            cluster=self.scheduler.id,
            silent=self.views.silent(),
            given_up=registry.given_up,
        )
        if table != self._table or not table.version:
            self._table = msgspec.structs.replace(table, version=self._table.version + 1)
            self._table_bytes = encode_table(self._table)
            self.front.publish(self._table_bytes)
            self._tables.happened()
        boot = "" if self.boot is None else self.boot.message
        status = ServeStatus(
            version=self._status.version,
            applications=self.views.statuses(),
            proxies=self.front.describe(),
            url=self.front.url,
            message="\n".join(text for text in (self.over, self.front.message, *self.editor.trouble, boot) if text),
            events=self.events.latest(),
        )
        if status != self._status or not status.version:
            self._status = msgspec.structs.replace(status, version=self._status.version + 1)
            self._statuses.happened()
        if registry.applications and not self._not_idle.is_running():
            self._not_idle.start()
        elif not registry.applications and self._not_idle.is_running():
            self._not_idle.stop()
        self.scaling.look()

    def _note_statuses(self) -> None:
        """Tell of applications that have become something else, and why."""
        before, after = self._status.applications, self.views.statuses()
        if after is before:
            return
        for name, application in after.items():
            was = before[name].status if name in before else "new"
            # One that was deployed again before anybody looked is no news.
            if application.status != was:
                why = f": {brief(application.message)}" if application.message else ""
                self.events.add("status", name, f"{was} → {application.status}{why}")

    def present_status(self) -> ServeStatus:
        """Return the status, with all that has happened."""
        self._publish_soon.flush()
        return self._with_workers()

    def _with_workers(self) -> ServeStatus:
        loads, waiting = self.scaling.loads(), self.front.queued()
        return filled_in(self._status, self.scheduler.workers, loads, self.errors.of, waiting)

    def _keep_awake(self) -> None:
        # Dask counts tasks; it sees neither actors nor the requests that they serve.
        self.scheduler.idle_since = None

    @property
    def saves_for_crashes(self) -> bool:
        """The state file is gone once the scheduler ends in order."""
        return self._state is not None and self._state.for_crashes

    def _adaptive_target(self, target_duration: float | None = None) -> int:
        self.leaving.asked_at = asyncio.get_running_loop().time()
        return max(int(self._adaptive_before(target_duration)), self.reconciler.places.wanted_workers())
