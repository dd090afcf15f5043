"""The controller: a scheduler plugin that answers for what runs where."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from distributed import Client
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from ..config import HTTPOptions
from ..exceptions import ConfigError, DeploymentUnavailableError, ServeError
from ..logs import join_dask
from ..policy.desired import ApplicationSpec
from ..routing.table import Table, encode_table
from .changes import Changes
from .events import Events
from .promises import Promises
from .reconciler import Reconciler
from .registry import Registry
from .scaling import Scaling
from .status import ServeStatus, WorkerStatus, encode_status
from .tunnel import Tunnels

if TYPE_CHECKING:
    from distributed.comm import Comm
    from distributed.scheduler import Scheduler, WorkerState

__all__ = ["Controller"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two reminders to the scheduler that it is not idle; it looks every 0.25 s.
NOT_IDLE = 0.1
#: Seconds that a closing scheduler waits for its proxies; what is still in flight then, they finish as orphans.
CLOSE_DRAIN = 2.0
#: Seconds that proxies wait for a port at the start of a scheduler.
REBIND = 10.0

Op = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


def _op(method: Op) -> Op:
    """Return errors that callers can mend as data: the scheduler would log and pickle them."""

    @functools.wraps(method)
    async def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await method(*args, **kwargs)
        except ServeError as error:
            return {"error": [type(error).__name__, str(error)]}

    return answer


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
    """

    name = "dask-serve"
    idempotent = True

    def __init__(self, http: HTTPOptions | None = None, explicit: list[str] | None = None) -> None:
        self._http_at_start = http
        self._explicit = list(explicit or ())

    async def start(self, scheduler: Scheduler) -> None:
        """Install the operations. Never waits, so that two registrations cannot overlap."""
        join_dask()
        self.scheduler = scheduler
        self.epoch = uuid.uuid4().hex
        self.secret = secrets.token_bytes(32)
        self.registry = Registry()
        self.reconciler = Reconciler(scheduler, self.registry, self._publish)
        self.events = Events(scheduler)
        self.scaling = Scaling(self.registry, self.events, self.reconciler.wake)
        self.promises = Promises()
        self.tunnels = Tunnels(scheduler.security.get_connection_args("scheduler").get("ssl_context"))
        self.url = ""
        self._message = ""
        self._proxies: Any = None
        self._starting_proxies = asyncio.Lock()
        self._table = Table(epoch=self.epoch, version=0, secret=self.secret, deployments={}, routes=[])
        self._table_bytes = encode_table(self._table)
        self._tables = Changes()
        self._status = ServeStatus()
        self._statuses = Changes()
        self._client: Client | None = None
        self._not_idle = PeriodicCallback(self._keep_awake, NOT_IDLE * 1000)
        for name in OPERATIONS:
            scheduler.handlers[name] = getattr(self, name)
        scheduler.stream_handlers["serve-load"] = self._on_load
        self._adaptive_before = scheduler.adaptive_target
        # Both names are used: Dask's own Adaptive asks over the wire, dashboards and gateways call the method.
        scheduler.adaptive_target = scheduler.handlers["adaptive_target"] = self._adaptive_target
        self._publish()
        self._main = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        # A connection to this scheduler before it runs would wait for itself.
        await self.scheduler
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
                await self._proxies_at_start(self._http_at_start)
            await self.reconciler.run(self._client)
        except Exception:
            logger.exception("the controller of dask_serve ended")
            raise

    async def before_close(self) -> None:
        """End with the scheduler."""
        self._not_idle.stop()
        self._main.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._main
        self._tables.close()
        self._statuses.close()
        self.promises.close()
        await self.tunnels.close()
        self.scaling.close()
        await self.reconciler.close()
        if self._proxies is not None:
            await self._proxies.stop(CLOSE_DRAIN)
        if self._client is not None:
            await self._client.close()

    # -- hooks of the scheduler

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """There is room for replicas that wait."""
        self.reconciler.wake()

    def remove_worker(self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **kwargs: Any) -> None:
        """Its replicas leave the table at once, and are replaced."""
        self.tunnels.forget(worker)
        self.scaling.lost(worker)
        self.reconciler.lost_worker(worker)

    def restart(self, scheduler: Scheduler) -> None:
        """All replicas are lost."""
        self.reconciler.restarted()

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Nobody will settle the promises of this client any more."""
        self.promises.remove_client(client)
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

        return {"table": self._table_bytes if await self._tables.until(differs, timeout) else None}

    async def serve_status(self) -> dict[str, Any]:
        """Return the status."""
        return {"status": encode_status(self._with_workers())}

    async def serve_watch(self, since: int = 0, timeout: float = 30.0) -> dict[str, Any]:
        """Return the status as soon as it is newer than ``since``, or after ``timeout`` seconds."""
        await self._statuses.until(lambda: self._status.version > since, timeout)
        return {"status": encode_status(self._with_workers())}

    # -- operations: applications

    async def serve_missing(self, revisions: list[str]) -> dict[str, Any]:
        """Return those revisions whose code is not here."""
        return {"missing": [revision for revision in revisions if revision not in self.registry.code]}

    @_op
    async def serve_deploy(self, application: bytes, code: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make an application run as it is given."""
        try:
            spec = msgspec.msgpack.decode(application, type=ApplicationSpec)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the scheduler's dask_serve does not understand this application: {error}") from None
        await self.scaling.check(spec)
        self.registry.deploy(spec, code or {})
        self.reconciler.wake()
        if spec.route_prefix is not None and not self.url:
            await self._start_proxies(HTTPOptions(), set())
        return {"known": sorted(self.registry.code)}

    @_op
    async def serve_code(self, revision: str) -> dict[str, Any]:
        """Return a revision's code, as it came, and the cluster's secret."""
        if revision not in self.registry.code:
            raise DeploymentUnavailableError(f"revision {revision} is not deployed any more")
        return {"code": self.registry.code[revision], "secret": self.secret}

    @_op
    async def serve_delete(self, app: str) -> dict[str, Any]:
        """Take an application away; answer when its replicas have ended."""
        await self._delete(app)
        return {"deleted": True}

    @_op
    async def serve_shutdown(self) -> dict[str, Any]:
        """Take everything away; the controller stays and can be used again."""
        names = [name for name, app in self.registry.applications.items() if not app.deleting]
        await asyncio.gather(*(self._delete(name) for name in names))
        async with self._starting_proxies:
            self.url = self._message = ""
            self._publish()
            if self._proxies is not None:
                await self._proxies.stop()
                self._proxies = None
        self._publish()
        return {}

    async def _delete(self, app: str) -> None:
        replicas = self.registry.delete(app)
        self.reconciler.wake()
        await asyncio.gather(*(replica.ended.wait() for replica in replicas))

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

    def _on_load(self, running: dict[str, float], worker: str, **_: Any) -> None:
        """Hear how many requests run at a worker's replicas."""
        self.scaling.runs(worker, running)

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
        """Answer when all proxies route by the present table, or after ``timeout`` seconds."""
        return {"routed": self._proxies is None or await self._proxies.until_applied(timeout)}

    async def serve_proxy(self, epoch: str = "", since: int = 0, timeout: float = 2.0) -> dict[str, Any]:
        """Return what a proxy on another node needs: options, and the table once it differs from the caller's."""
        answer = await self.serve_table(epoch, since, timeout)
        options = HTTPOptions() if self._proxies is None else self._proxies.options
        return {**answer, "options": msgspec.msgpack.encode(options)}

    @_op
    async def serve_start(self, options: bytes = b"", explicit: list[str] | None = None) -> dict[str, Any]:
        """Start the proxies, or change what can be changed; answer when they accept requests."""
        given = msgspec.msgpack.decode(options, type=HTTPOptions) if options else HTTPOptions()
        return {"url": await self._start_proxies(given, set(explicit or ()))}

    async def _start_proxies(self, options: HTTPOptions, explicit: set[str], retry: float = 0.0) -> str:
        async with self._starting_proxies:
            if self._proxies is None:
                from .proxies import Proxies

                self._proxies = Proxies(self._on_proxy, security=self.scheduler.security)
                # They accept nothing before they have a table.
                self._proxies.publish(self._table_bytes)
            self._message = ""
            try:
                await self._proxies.start(options, explicit, retry=retry)
            except Exception as error:
                self._message = f"the proxies could not be started: {error}"
                raise
            finally:
                self.url = self._proxies.url
                self._publish()
            return self.url

    async def _proxies_at_start(self, options: HTTPOptions) -> None:
        try:
            # The proxies of a scheduler that died may hold the port while they drain.
            await self._start_proxies(options, set(self._explicit), retry=REBIND if options.port else 0.0)
        except Exception:
            # Told by the status too; the first application that needs them tries again.
            logger.exception("the proxies could not be started")

    def _on_proxy(self, slot: int, event: str, details: dict[str, Any]) -> None:
        if event == "backlogs":
            self.scaling.waits(**details)
        elif event != "stats":
            self._publish()

    # -- inside

    def _publish(self, *_: Any) -> None:
        """Make table and status anew, and tell those who wait when they changed."""
        registry = self.registry
        table = Table(
            epoch=self.epoch,
            version=self._table.version,
            secret=self.secret,
            deployments=registry.table_deployments(),
            routes=registry.table_routes(),
            applications=registry.table_applications(),
            url=self.url,
            cluster=self.scheduler.id,
        )
        if table != self._table or not table.version:
            self._table = msgspec.structs.replace(table, version=self._table.version + 1)
            self._table_bytes = encode_table(self._table)
            if self._proxies is not None:
                self._proxies.publish(self._table_bytes)
            self._tables.happened()
        status = ServeStatus(
            version=self._status.version,
            applications=registry.statuses(),
            proxies=self._describe_proxies(),
            url=self.url,
            message=self._message,
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

    def _with_workers(self) -> ServeStatus:
        # Each heartbeat changes it, which is no news to those who watch the status.
        workers = [
            WorkerStatus(address=worker.address, **worker.metrics["serve"])
            for worker in self.scheduler.workers.values()
            if worker.metrics.get("serve")
        ]
        return msgspec.structs.replace(self._status, workers=workers, loads=self.scaling.loads())

    def _describe_proxies(self) -> list[dict[str, Any]]:
        rows = [] if self._proxies is None else self._proxies.describe()
        # Statistics change all the time, and would wake everyone who watches the status.
        return [{name: value for name, value in row.items() if name != "stats"} for row in rows]

    def _keep_awake(self) -> None:
        # Dask counts tasks; it sees neither actors nor the requests that they serve.
        self.scheduler.idle_since = None

    def _adaptive_target(self, target_duration: float | None = None) -> int:
        return max(int(self._adaptive_before(target_duration)), self.reconciler.wanted_workers())


#: The operations that the controller adds to the scheduler's handlers.
OPERATIONS = tuple(sorted(name for name in vars(Controller) if name.startswith("serve_")))
