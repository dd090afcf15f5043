"""What runs and how it fares, as `serve.status()` returns it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from dask.utils import format_bytes
from msgspec import Struct

__all__ = [
    "ApplicationStatus",
    "DeploymentStatus",
    "ReplicaStatus",
    "ServeStatus",
    "WorkerStatus",
    "decode_status",
    "encode_status",
]

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
        What it waits for, if anything.
    """

    id: str
    state: str
    worker: str
    revision: str
    message: str = ""


class DeploymentStatus(Struct, frozen=True, kw_only=True):
    """One deployment: how many replicas it should have, and those it has.

    Attributes
    ----------
    status : str
        ``deploying``, ``running``, ``unhealthy`` (it ran, and has fewer replicas than it should), ``failed`` or
        ``deleting``.
    message : str
        Why it is not running; of a failed deployment the traceback.
    target : int
        How many replicas it should have.
    counts : dict
        Replicas by state.
    replicas : list of ReplicaStatus
        The replicas, the oldest first.
    """

    status: Health
    message: str
    target: int
    counts: dict[str, int]
    replicas: list[ReplicaStatus]

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {state}" for state, number in self.counts.items()) or "no replicas"
        lines = [f"{self.status}, {counts} of {self.target} wanted", *_indented(self.message)]
        for replica in self.replicas:
            note = f": {replica.message}" if replica.message else ""
            lines.append(f"  {replica.id} is {replica.state} on {replica.worker}{note}")
        return "\n".join(lines)


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
    """

    status: Health
    message: str
    route_prefix: str | None
    ingress: str
    deployments: dict[str, DeploymentStatus]

    def __str__(self) -> str:
        route = f" at {self.route_prefix}" if self.route_prefix else ""
        lines = [f"{self.status}{route}"]
        for name, deployment in self.deployments.items():
            first, *rest = str(deployment).splitlines()
            lines += [f"  {name}: {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """What the process of a worker with replicas keeps, as its last heartbeat told.

    Attributes
    ----------
    address : str
        Dask address of the worker.
    process : str
        Incarnation of the process.
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


class ServeStatus(Struct, frozen=True, kw_only=True):
    """All of dask_serve on one cluster.

    Attributes
    ----------
    version : int
        Grows with each change.
    applications : dict
        `ApplicationStatus` by name.
    proxies : list of dict
        The proxy processes: pid, slot and state.
    workers : list of WorkerStatus
        The workers that have or had replicas, and the results that they hold.
    url : str
        Where HTTP is served; empty when it is not.
    message : str
        What is wrong with the service as a whole, such as proxies that cannot be started.
    """

    version: int = 0
    applications: dict[str, ApplicationStatus] = {}
    proxies: list[dict[str, Any]] = []
    workers: list[WorkerStatus] = []
    url: str = ""
    message: str = ""

    def __str__(self) -> str:
        lines = [f"HTTP at {self.url}" if self.url else "HTTP is not served"]
        lines += _indented(self.message)
        for proxy in self.proxies:
            lines.append("  proxy " + ", ".join(f"{name} {value}" for name, value in proxy.items()))
        for worker in self.workers:
            first, *rest = str(worker).splitlines()
            lines += [f"  worker {first}", *_indented("\n".join(rest))]
        if not self.applications:
            lines.append("no applications")
        lines += [f"application {name}: {application}" for name, application in self.applications.items()]
        return "\n".join(lines)


def worst(statuses: list[Health]) -> Health:
    """Return the status of an application whose deployments have ``statuses``."""
    return min(statuses, key=SEVERITY.index, default="running")


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


encode_status = msgspec.msgpack.Encoder().encode
decode_status = msgspec.msgpack.Decoder(ServeStatus).decode
