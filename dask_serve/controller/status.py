"""What runs and how it fares, as `serve.status()` returns it."""

from __future__ import annotations

from time import localtime, strftime
from typing import Literal

import msgspec
from dask.utils import format_bytes
from msgspec import Struct

from ..exceptions import ConfigError
from .events import Event
from .history import signed

__all__ = [
    "ApplicationStatus",
    "AutoscalingStatus",
    "DeploymentStatus",
    "ErrorStatus",
    "LoadStatus",
    "ProxyStatus",
    "ReplicaStatus",
    "ServeStatus",
    "WorkerStatus",
    "decode_status",
    "encode_status",
    "only_deployment",
]

#: How many events `print(serve.status())` shows.
EVENTS_SHOWN = 5

Health = Literal["deploying", "running", "unhealthy", "failed", "deleting"]

#: The worst comes first: what an application is, made from its deployments.
SEVERITY: tuple[Health, ...] = ("deleting", "failed", "unhealthy", "deploying", "running")


class ReplicaStatus(Struct, frozen=True, kw_only=True):
    """One replica.

    Attributes
    ----------
    id : str
        Unique for ever: ``application/deployment/suffix``.
    state : str
        ``starting``, ``ready`` or ``draining``.
    worker : str
        Dask address of its worker.
    revision : str
        The revision of the deployment that it runs.
    message : str
        What it waits for, or why it answers nothing: ``busy since ...`` where its threads or its event loop compute for
        long, ``stuck since ...`` where they wait.
    devices : list of str
        The devices that it has, as its host names them.
    since : float
        Since when it is in that state, in seconds since 1970.
    in_flight, queued : int
        Requests that it runs, and that it has taken and not begun, as the last heartbeat of its worker told.
    memory : int
        Bytes that the process of its worker uses, which its replicas share.
    models : list of str
        Multiplexed models that it has loaded.
    environment : str
        Name of its ``runtime_env``, which it shares with all replicas of its process; empty: it has none.
    """

    id: str
    state: str
    worker: str
    revision: str
    message: str = ""
    devices: list[str] = []
    since: float = 0.0
    in_flight: int = 0
    queued: int = 0
    memory: int = 0
    models: list[str] = []
    environment: str = ""

    def __str__(self) -> str:
        told = [f"{self.id} is {self.state} on {self.worker}"]
        if self.since:
            told.append(f"since {clock(self.since)}")
        if self.in_flight or self.queued:
            told.append(f"{self.in_flight} in flight, {self.queued} queued")
        if self.memory:
            told.append(format_bytes(self.memory))
        if self.models:
            told.append(f"models {', '.join(self.models)}")
        if self.environment:
            told.append(f"environment {self.environment}")
        return ", ".join(told) + (f": {self.message}" if self.message else "")

    def __repr__(self) -> str:
        return f"<ReplicaStatus: {self}>"


class ErrorStatus(Struct, frozen=True, kw_only=True):
    """Something that user code raised.

    Attributes
    ----------
    time : float
        When, in seconds since 1970.
    replica : str
        Where.
    request_id : str
        Of the request that failed by it.
    traceback : str
        The whole text; the middle of a very long one is left out.
    count : int
        How many requests failed in that replica since it told the error before: it tells one in a second.
    """

    time: float
    replica: str
    request_id: str
    traceback: str
    count: int = 1

    @property
    def summary(self) -> str:
        """The last line of the traceback: the class of the exception, and its message."""
        lines = self.traceback.strip().splitlines()
        return lines[-1] if lines else ""

    def __str__(self) -> str:
        more = f" ({self.count} requests)" if self.count > 1 else ""
        return f"{clock(self.time)} request {self.request_id} in {self.replica}: {self.summary}{more}"

    def __repr__(self) -> str:
        return f"<ErrorStatus: {self}>"


class AutoscalingStatus(Struct, frozen=True, kw_only=True):
    """How a deployment follows its load.

    Attributes
    ----------
    min_replicas, max_replicas : int
        The bounds.
    why : str
        Why it should have as many replicas as its ``target`` says.
    """

    min_replicas: int
    max_replicas: int
    why: str


class LoadStatus(Struct, frozen=True, kw_only=True):
    """The load of a deployment that follows it, at this moment.

    Attributes
    ----------
    running, queued : float
        Requests that run at replicas, and that wait at routers.
    needed : int
        How many replicas that needs, within the bounds.
    due_in : float or None
        Seconds until the target changes if the load stays as it is; None: it will not.
    policy_error : str
        Why the policy of the user's cannot be asked; the load decides then.
    """

    running: float
    queued: float
    needed: int
    due_in: float | None = None
    policy_error: str = ""

    def __str__(self) -> str:
        text = f"{self.running:.3g} requests run, {self.queued:.3g} wait, {self.needed} replicas needed"
        if self.due_in is not None:
            text += f"; the target changes in {self.due_in:.0f} s if it stays so"
        return text + (f"; its policy failed: {self.policy_error}" if self.policy_error else "")


class DeploymentStatus(Struct, frozen=True, kw_only=True):
    """One deployment: how many replicas it should have, and those it has.

    Attributes
    ----------
    status : str
        ``deploying``, ``running``, ``unhealthy`` (it ran, and has fewer replicas than it should), ``failed`` or
        ``deleting``.
    message : str
        Why it is not running; of a failed deployment the traceback.
    setback : str
        Why a replica of the present revision had to be replaced the last time: it was not healthy, or its worker was
        killed for memory. Empty: none was.
    target : int
        How many replicas it should have.
    counts : dict
        Replicas by state.
    replicas : list of ReplicaStatus
        The replicas, the oldest first.
    autoscaling : AutoscalingStatus or None
        Why that many, where the number follows the load.
    revision : str
        The revision that is wanted.
    decision : str
        What is being done about it, and why; empty while nothing is.
    in_flight, queued : int
        Requests that its replicas run, and that wait for one, here and at routers, as the last heartbeats told.
    errors : list of ErrorStatus
        What its code raised lately, with tracebacks, the oldest first.
    """

    status: Health
    message: str
    target: int
    counts: dict[str, int]
    replicas: list[ReplicaStatus]
    setback: str = ""
    autoscaling: AutoscalingStatus | None = None
    revision: str = ""
    decision: str = ""
    in_flight: int = 0
    queued: int = 0
    errors: list[ErrorStatus] = []

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {state}" for state, number in self.counts.items()) or "no replicas"
        load = f", {self.in_flight} in flight, {self.queued} queued" if self.in_flight or self.queued else ""
        lines = [f"{self.status}, {counts} of {self.target} wanted{load}", *_indented(self.message)]
        if self.decision:
            lines += _indented(self.decision)
        if self.setback and self.setback not in self.message:
            lines += _indented(self.setback)
        if (scaling := self.autoscaling) is not None:
            lines.append(f"  {self.target} of {scaling.min_replicas} to {scaling.max_replicas}, {scaling.why}")
        lines += [f"  {replica}" for replica in self.replicas]
        lines += [f"  last error {error}" for error in self.errors[-1:]]
        return "\n".join(lines)

    def __repr__(self) -> str:
        ready = self.counts.get("ready", 0)
        return f"<DeploymentStatus: {self.status}, {ready} of {self.target} replicas ready>"

    def _repr_html_(self) -> str:
        from .html import of_deployment

        return of_deployment("", self)


class ApplicationStatus(Struct, frozen=True, kw_only=True):
    """One application.

    Attributes
    ----------
    status : str
        As of a deployment; the worst of its deployments counts.
    message : str
        The messages of those deployments.
    route_prefix : str or None
        Where HTTP finds it.
    ingress : str
        Name of the deployment that handles and HTTP requests reach.
    deployments : dict
        `DeploymentStatus` by name.
    version : int
        Number of the present version; `serve.history` tells of those before.
    owner, client : str
        Who made it so: ``user@host`` (``dask_serve`` for the controller itself), and the id of their Dask client.
    deployed_at : float
        When, in seconds since 1970.
    reason : str
        ``deployed``, ``rolled back to 3``, or why the controller did it.
    """

    status: Health
    message: str
    route_prefix: str | None
    ingress: str
    deployments: dict[str, DeploymentStatus]
    version: int = 0
    owner: str = ""
    client: str = ""
    deployed_at: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        route = f" at {self.route_prefix}" if self.route_prefix else ""
        lines = [f"{self.status}{route}"]
        if self.version:
            lines.append(f"  version {self.version}, {signed(self.reason, self.owner, self.deployed_at)}")
        for name, deployment in self.deployments.items():
            first, *rest = str(deployment).splitlines()
            lines += [f"  {name}: {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<ApplicationStatus: {self.status}, version {self.version}, deployments {', '.join(self.deployments)}>"

    def _repr_html_(self) -> str:
        from .html import of_application

        return of_application("", self)


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """What the process of a worker with replicas keeps, as its last heartbeat told.

    Attributes
    ----------
    address : str
        Dask address of the worker.
    process : str
        Incarnation of the process.
    shut : float
        Seconds for which its door has not answered; infinite when the door is closed.
    results : int
        Large results of calls from Python that it holds: not yet fetched and dropped by their callers.
    result_bytes : int
        Their bytes.
    limit : int or None
        Bytes from which on calls from Python wait (``serve.results-limit``); None: no limit.
    promoted : int
        Results that Dask has taken over in this process, since it began.
    replicas : dict
        Counts of its replicas, by their id: ``running``, ``answered``, ``failed``, ``dropped`` (cancelled while they
        ran), and ``seconds_wasted`` on those.
    batches : dict
        What batched methods did, by replica and method: how many ``batches`` and ``calls``, ``mean_size`` and the
        ``largest``, ``mean_wait_s`` of a call, ``mean_run_s`` of a batch, ``reruns`` after failures, calls that
        ``failed``, were refused because they would have been ``late``, or are ``waiting``.
    models : dict
        Multiplexed models that are loaded, by replica.
    """

    address: str
    process: str
    results: int
    result_bytes: int
    limit: int | None
    promoted: int = 0
    shut: float = 0.0
    replicas: dict[str, dict[str, float]] = {}
    batches: dict[str, dict[str, dict[str, float]]] = {}
    models: dict[str, list[str]] = {}

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        lines = [
            (
                f"{self.address} holds {self.results} results, {format_bytes(self.result_bytes)}{limit}; "
                f"{self.promoted} became Dask's"
            )
        ]
        for replica, methods in self.batches.items():
            for method, counts in methods.items():
                lines.append(
                    f"  {replica} batches {method}: {counts['calls']:.0f} calls in {counts['batches']:.0f} batches, "
                    f"{counts['waiting']:.0f} wait"
                )
        lines += [f"  {replica} has models {', '.join(names)}" for replica, names in self.models.items()]
        return "\n".join(lines)


class ProxyStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process that serves HTTP.

    Attributes
    ----------
    slot : int
        Its number on its node, from 0; the one that takes its place gets the same.
    state : str
        ``starting``, ``ready``, ``draining``, or ``restarting`` where there is no process at the moment.
    pid : int or None
    restarts : int
        How often one in this slot was started again.
    admin : str
        URL of its admin port; empty: it has none.
    node, url, version : str
        Of those that ``dask serve proxy`` runs elsewhere: where they are, where they serve HTTP, and which dask_serve
        they have. Empty: the scheduler's node.
    """

    slot: int = 0
    state: str = ""
    pid: int | None = None
    restarts: int = 0
    admin: str = ""
    node: str = ""
    url: str = ""
    version: str = ""

    def __str__(self) -> str:
        told = [f"node {self.node}"] if self.node else []
        told += [f"slot {self.slot}", f"pid {self.pid}", f"state {self.state}", f"restarts {self.restarts}"]
        told += [f"{name} {value}" for name in ("url", "admin", "version") if (value := getattr(self, name))]
        return ", ".join(told)

    def __repr__(self) -> str:
        return f"<ProxyStatus: {self}>"


class ServeStatus(Struct, frozen=True, kw_only=True):
    """All of dask_serve on one cluster.

    Attributes
    ----------
    version : int
        Grows with each change.
    applications : dict
        `ApplicationStatus` by name.
    proxies : list of ProxyStatus
        The processes that serve HTTP, on all nodes.
    workers : list of WorkerStatus
        The workers that have or had replicas, and the results that they hold.
    url : str
        Where HTTP is served; empty when it is not.
    message : str
        What is wrong with the service as a whole, such as proxies that cannot be started.
    loads : dict
        `LoadStatus` by ``application/deployment``, of the deployments that follow their load.
    events : list of Event
        The last decisions of the controller, the oldest first.
    """

    version: int = 0
    applications: dict[str, ApplicationStatus] = {}
    proxies: list[ProxyStatus] = []
    workers: list[WorkerStatus] = []
    url: str = ""
    message: str = ""
    loads: dict[str, LoadStatus] = {}
    events: list[Event] = []

    def __str__(self) -> str:
        lines = [f"HTTP at {self.url}" if self.url else "HTTP is not served"]
        lines += _indented(self.message)
        lines += [f"  proxy {proxy}" for proxy in self.proxies]
        for worker in self.workers:
            first, *rest = str(worker).splitlines()
            lines += [f"  worker {first}", *_indented("\n".join(rest))]
        if not self.applications:
            lines.append("no applications")
        lines += [f"application {name}: {application}" for name, application in self.applications.items()]
        lines += [f"load of {id}: {load}" for id, load in self.loads.items()]
        lines += [str(event) for event in self.events[-EVENTS_SHOWN:]]
        return "\n".join(lines)

    def __repr__(self) -> str:
        # What somebody wants to see who types serve.status().
        return str(self)

    def _repr_html_(self) -> str:
        from .html import of_service

        return of_service(self)


def worst(statuses: list[Health]) -> Health:
    """Return the status of an application whose deployments have ``statuses``."""
    return min(statuses, key=SEVERITY.index, default="running")


def only_deployment(status: ServeStatus, app: str) -> str:
    """Return the name of the only deployment of an application; empty where there is no such application.

    Raises
    ------
    ConfigError
        It has several.
    """
    application = status.applications.get(app)
    names = [] if application is None else list(application.deployments)
    if len(names) > 1:
        raise ConfigError(
            f"application {app!r} has several deployments: {', '.join(names)}; write {app}/{names[0]} for one of them"
        )
    return names[0] if names else ""


def clock(time: float) -> str:
    """Return a time of day, with its date where that is another one."""
    then, now = localtime(time), localtime()
    return strftime("%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", then)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


encode_status = msgspec.msgpack.Encoder().encode
decode_status = msgspec.msgpack.Decoder(ServeStatus).decode
