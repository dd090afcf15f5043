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
from ..exceptions import (
    ApplicationNotFoundError,
    ConfigError,
    DeploymentUnavailableError,
    ServeError,
)
from ..logs import join_dask
from ..measures.sources import add_source, drop_source
from ..policy.desired import ApplicationSpec
from ..policy.history import By
from ..records import keep_records, told_since
from ..routing.table import Table, encode_table
from ..wire.tls import for_callers, lend_to_client
from .boot import Boot, BootDocument
from .changes import Changes, Throttle
from .checkup import CHECKUP_OPERATIONS, Checkup
from .child import Deployer
from .desired import DESIRED_OPERATIONS, Desired
from .editor import Editor
from .errors import Errors
from .events import Events, brief
from .front import Front, first_options
from .history import History, encode_history
from .leaving import Leaving
from .live import filled_in
from .measures import Measures
from .metrics import controller_families
from .notes import Notes
from .operations import operation
from .pieces import Uploads, parts_of
from .promises import Promises
from .pulse import Pulse
from .reconciler import Reconciler
from .registry import Registry
from .rest import Rest
from .scaling import Scaling
from .service_file import ServiceFile
from .shown import Shown
from .state_file import StateFile, configured, history_length
from .status import ServeStatus, encode_status
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
        self._publish_soon = Throttle(self._publish)
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
            scheduler.security, self.editor, self._publish, self.scaling.waits, self.measures, note=self.events.add
        )
        add_source(
            "dask-serve-controller", lambda: controller_families(lambda: self._status, self.measures, self.events)
        )
        self.desired = Desired(self)
        self.deployer = Deployer(scheduler)
        self.boot = None if self._document is None else Boot(self._document, self.deployer, self._publish)
        self._booting: asyncio.Task[None] | None = None
        Rest(self).install()
        self._shown = Shown(
            scheduler, status=self._with_workers, queued=self._queued, measures=self.measures, events=self.events
        )
        self.dashboard = Dashboard(scheduler, self._shown)
        self.measures.on_proxy, self.measures.on_worker = self.dashboard.proxy_told, self.dashboard.replicas_told
        self._table = Table(epoch=self.epoch, version=0, secret=self.secret, deployments={}, routes=[])
        self._table_bytes = encode_table(self._table)
        self._tables = Changes()
        self._status = ServeStatus()
        self._statuses = Changes()
        self._client: Client | None = None
        #: Why nothing is started any more, if so.
        self._ended = ""
        self._not_idle = PeriodicCallback(self._keep_awake, NOT_IDLE * 1000)
        for name in OPERATIONS:
            scheduler.handlers[name] = getattr(self, name)
        for name in DESIRED_OPERATIONS:
            scheduler.handlers[name] = getattr(self.desired, name)
        checkup = Checkup(self)
        for name in CHECKUP_OPERATIONS:
            scheduler.handlers[name] = getattr(checkup, name)
        scheduler.stream_handlers["serve-load"] = self._on_load
        self._adaptive_before = scheduler.adaptive_target
        # Both names are used: Dask's own Adaptive asks over the wire, dashboards and gateways call the method.
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self._adaptive_target
        # Before anybody is answered: nobody may see the service empty, and take that for its state.
        self._state = self._state or configured()
        http = self.editor.open(Store(self._state.path)) if self._state.path is not None else None
        if self._http_at_start is not None:
            self.front.standing = {name: getattr(self._http_at_start, name) for name in self._explicit}
        self._http_at_start, self._explicit = first_options(self._http_at_start, self._explicit, http)
        self._publish()
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
            self._ended = f"the controller of dask_serve ended, see the scheduler's log: {error!r}"
            self._publish()
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

    # -- operations: applications

    async def serve_missing(self, revisions: list[str]) -> dict[str, Any]:
        """Return those revisions whose code is not here."""
        return {"missing": self.editor.lacks(revisions)}

    async def serve_upload(self, upload: str, number: int, part: Any, client: str) -> dict[str, Any]:
        """Take a part of large code, which `serve_deploy` and `serve_apply` name then."""
        self.uploads.put(upload, number, part, client)
        return {}

    @operation
    async def serve_deploy(
        self, application: bytes, code: dict[str, Any] | None = None, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Make an application run as it is given; answer once that is saved, with the number of its version.

        ``code`` is by revision: the code, or the name of its upload and the number of its parts.
        """
        code = self.uploads.take(code or {})
        try:
            spec = msgspec.msgpack.decode(application, type=ApplicationSpec)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the scheduler's dask_serve does not understand this application: {error}") from None
        if self._ended:
            raise ServeError(self._ended)
        await self.scaling.check(spec)
        missing = self.editor.lacks([name for deployment in spec.deployments for name in deployment.needs], code)
        if missing:
            # Another session deleted meanwhile what had the same code.
            return {"missing": missing}
        version = await self.editor.deploy(spec, code, By(owner, client))
        if spec.route_prefix is not None and not self.front.url:
            await self.front.start(overlaid(HTTPOptions(), ()), set())
        return {"version": version}

    @operation
    async def serve_rollback(
        self, app: str, version: int | None = None, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Make an application again what it was; answer with the number of the version that this is."""
        by = By(owner, client)
        return {"version": await self.editor.rollback(app, version, by, self.scheduler.tasks.__contains__)}

    @operation
    async def serve_scale(
        self, app: str, deployment: str, number: int, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Change how many replicas a deployment has; answer with the number of the version that this is."""
        return {"version": await self.editor.scale(app, deployment, number, By(owner, client))}

    @operation
    async def serve_history(self, app: str) -> dict[str, Any]:
        """Return what an application was, and what became of it."""
        return {"history": encode_history(self.registry.history.answer(app)), "told": self.editor.not_found(app)}

    @operation
    async def serve_code(self, revision: str, part: int = 0) -> dict[str, Any]:
        """Return a part of a revision's code, as it came, how many there are, and the cluster's secret."""
        code = await self.editor.code(revision)
        if code is None:
            raise DeploymentUnavailableError(f"revision {revision} is not deployed any more")
        parts = parts_of(code)
        return {"code": parts[part], "parts": len(parts), "secret": self.secret}

    @operation
    async def serve_delete(self, app: str, owner: str = "", client: str = "", own: bool = False) -> dict[str, Any]:
        """Take an application away (``own``: if this client deployed it); answer when its replicas have ended."""
        return {"deleted": await self.editor.delete(app, By(owner, client), own=own)}

    @operation
    async def serve_shutdown(self, owner: str = "", client: str = "") -> dict[str, Any]:
        """Take everything away; the controller stays and can be used again."""
        # HTTP drains first: a proxy that is still open would answer 404 for what is gone.
        await self.front.stop()
        names = [name for name, app in self.registry.applications.items() if not app.deleting]
        by = By(owner, client)
        deleting = (self.editor.delete(name, by) for name in names)
        errors = await asyncio.gather(*deleting, return_exceptions=True)
        self._publish()
        for error in errors:
            # Another session may have been faster.
            if isinstance(error, BaseException) and not isinstance(error, ApplicationNotFoundError):
                raise error
        return {}

    # -- operations: replicas

    async def serve_report(self, replica: str, event: str, **info: Any) -> dict[str, Any]:
        """Hear from a replica."""
        known = self.registry.replicas.get(replica)
        if known is None:
            logger.debug("replica %s, which is not known (any more), reports %s", replica, event)
        elif event == "ready":
            self.tunnels.learn(info["process"], info["door"], known.worker)
            self.reconciler.reported_ready(known, info["door"], info["process"])
        elif event == "failed":
            self.reconciler.reported_failed(known, info["error"])
        elif event == "unhealthy":
            self.reconciler.reported_unhealthy(known, info["message"])
        elif event == "health":
            self.reconciler.reported_health(known, info["message"])
        elif event == "draining":
            self.reconciler.reported_draining(known)
        elif event == "stopped":
            self.reconciler.ended(known)
        else:
            logger.warning("replica %s reports %r, which this version does not know", replica, event)
        return {}

    # -- the load

    async def serve_backlogs(
        self, source: str, number: int, queued: dict[str, float], owner: str = ""
    ) -> dict[str, Any]:
        """Hear how many requests wait at a process's routers."""
        self.scaling.waits(source, number, queued, owner)
        return {}

    async def serve_counts(
        self, source: str, counts: dict[str, Any], worker: str = "", epoch: str = "", ended: bool = False
    ) -> dict[str, Any]:
        """Hear what a worker that leaves, or a proxy elsewhere, has counted; the answer has this controller's epoch.

        What a proxy counted is taken only from those who know that epoch: the rest was told to the controller before.
        """
        if worker:
            self.measures.worker_told(source, counts)
        elif epoch == self.epoch:
            self.measures.proxy_told(source, counts)
            if ended:
                self.measures.proxy_ended(source)
        return {"epoch": self.epoch}

    def _on_load(self, running: dict[str, float], worker: str, **_: Any) -> None:
        """Hear how many requests run at a worker's replicas."""
        self.scaling.runs(worker, running)

    async def serve_error(self, **report: Any) -> None:
        """Hear what user code raised."""
        self.errors.add(**report)

    # -- operations: workers that leave

    async def serve_leaving(self, worker: str, patience: float) -> dict[str, Any]:
        """Hear that a worker is closing; answer when its replicas have replacements, or after ``patience`` seconds."""
        await self.leaving.replace([worker], patience, no_place=0.2)
        return {}

    @operation
    async def serve_drain(self, worker: str, stay: bool = False) -> dict[str, Any]:
        """Bring a worker, by address or name, to hold no replicas, and keep it so; ``stay`` takes it back."""
        there = self.scheduler.workers
        address = next((one for one, state in there.items() if worker in (one, str(state.name))), None)
        if address is None:
            known = ", ".join(sorted(self.scheduler.workers)) or "none"
            raise ConfigError(f"there is no worker {worker!r}; workers: {known}")
        if stay:
            self.leaving.stay([address])
            return {"worker": address, "left": []}
        return {"worker": address, "left": [replica.id for replica in await self.leaving.empty([address])]}

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
            self.front.elsewhere.heard(node, [dict(row) for row in proxies])
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

    def _publish(self, *_: Any) -> None:
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
            message="\n".join(text for text in (self._ended, self.front.message, *self.editor.trouble, boot) if text),
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
        return filled_in(self._status, self.scheduler.workers, self.scaling.loads(), self.errors.of)

    def _queued(self) -> dict[str, float]:
        # Of deployments that follow their load, handles tell too.
        return {**self.front.queued(), **self.scaling.queued()}

    def _keep_awake(self) -> None:
        # Dask counts tasks; it sees neither actors nor the requests that they serve.
        self.scheduler.idle_since = None

    @property
    def saves_for_crashes(self) -> bool:
        """The state file is gone once the scheduler ends in order."""
        return self._state is not None and self._state.for_crashes

    def _adaptive_target(self, target_duration: float | None = None) -> int:
        self.leaving.asked_at = asyncio.get_running_loop().time()
        return max(int(self._adaptive_before(target_duration)), self.reconciler.wanted_workers())


#: The operations that the controller adds to the scheduler's handlers.
OPERATIONS = tuple(sorted(name for name in vars(Controller) if name.startswith("serve_")))
