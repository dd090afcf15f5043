"""The routing table: who answers for which deployment, as the controller sees it."""

from __future__ import annotations

import msgspec
from msgspec import Struct

__all__ = ["DeploymentEntry", "ReplicaEntry", "RouteEntry", "Table", "decode_table", "encode_table"]


class ReplicaEntry(Struct, frozen=True, array_like=True):
    """One ready replica and the door that leads to it."""

    #: Unique for ever: ``app/deployment/suffix``.
    id: str
    #: Incarnation of the worker process; ports are reused, these never.
    process: str
    #: ``tcp://host:port`` or ``tls://host:port`` of the process's door.
    door: str
    #: Dask address of the worker.
    worker: str


class DeploymentEntry(Struct, frozen=True, array_like=True):
    """One deployment: its ready replicas and what routers need to know of its options."""

    id: str
    replicas: list[ReplicaEntry]
    max_ongoing_requests: int
    max_queued_requests: int | None
    request_timeout_s: float | None
    methods: list[str]
    #: Why nothing can answer, when the deployment failed; None while replicas run or may still come.
    failure: str | None = None
    #: Bytes the body of an HTTP request may have; None: as the proxies say.
    body_limit: int | None = None
    #: How often a request may be sent again where nobody says so; None: as usual.
    retries_on_loss: int | None = None
    #: Its replicas follow its load: routers tell the controller how many requests wait, and wait where there are none.
    scales: bool = False
    #: Methods whose calls bring rows, with the most that one should bring.
    rows: dict[str, int] = {}


class RouteEntry(Struct, frozen=True, array_like=True):
    """A route prefix and the ingress deployment behind it."""

    prefix: str
    deployment: str


class Table(Struct, frozen=True, array_like=True):
    """Everything a router knows, at one version of it."""

    #: Incarnation of the controller; versions count within it.
    epoch: str
    version: int
    #: The cluster's secret, proved by both sides of each connection to a door.
    secret: bytes
    deployments: dict[str, DeploymentEntry]
    routes: list[RouteEntry]
    #: Name of each application's ingress deployment id.
    applications: dict[str, str] = {}
    #: Where HTTP is served, e.g. ``http://127.0.0.1:8000``; empty before the proxies listen.
    url: str = ""
    #: The scheduler's id: it may be known by several addresses.
    cluster: str = ""
    #: Processes whose replicas are not listed because they do not answer at present.
    silent: list[str] = []
    #: Processes that have not answered for too long: what runs there is lost, though connections may stand.
    given_up: list[str] = []


encode_table = msgspec.msgpack.Encoder().encode
decode_table = msgspec.msgpack.Decoder(Table).decode
