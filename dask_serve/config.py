"""Every option: type, unit, default, range. One class declares, all else is derived from it."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

__all__ = [
    "AutoscalingConfig",
    "CallOptions",
    "DeploymentOptions",
    "HTTPOptions",
    "RuntimeEnv",
]

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Path = Annotated[str, Meta(min_length=1)]
Delay = Annotated[float, Meta(ge=0)]
#: A number of replicas, or a fraction of them.
Share = Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, le=1)]
#: A level of Python's logging.
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
_LEVEL = Meta(description='it is "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL"')
#: An import path, alone or with keyword arguments.
Middleware = str | tuple[str, dict[str, Any]]


class AutoscalingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``autoscaling_config`` of a deployment accepts, as this or as a dict. Changes of it restart nothing.

    The load is what runs at replicas and what waits at routers. A deployment needs as many replicas as
    ``target_ongoing_requests`` goes into its load.

    Parameters
    ----------
    min_replicas : int, default 1
        The fewest replicas. 0: the last one goes when nothing was asked for a while, and the next request waits until
        one is there again.
    max_replicas : int, default 100
        The most replicas. Those beyond ``min_replicas`` start only where a worker has threads that no replica uses.
    initial_replicas : int or None, default None
        How many to begin with. None: ``min_replicas``, and at least one, which proves that the code works.
    target_ongoing_requests : float, default 2.0
        Requests, running or waiting, that each replica should have.
    upscale_delay_s : float, default 0.0
        Seconds for which more replicas must have been needed before they are started. The first one starts at once.
    downscale_delay_s : float, default 60.0
        Seconds for which fewer replicas must have been enough before some are stopped.
    downscale_to_zero_delay_s : float or None, default None
        Seconds without any request before the last replica is stopped. None: ``downscale_delay_s``.
    upscaling_factor : float, default 1.0
        Share of the missing replicas that one step up starts; above 1 it starts more than the load needs.
    downscaling_factor : float, default 1.0
        Share of the surplus replicas that one step down stops, from 0 to 1.
    policy : str, [str, dict] or None, default None
        Import path of a function (``"module:function"``), alone or with keyword arguments that are JSON, that says how
        many replicas are needed. It is called in the scheduler's process, in a thread. None: by the load.
    """

    min_replicas: Annotated[int, Meta(ge=0)] = 1
    max_replicas: Count = 100
    initial_replicas: Annotated[int, Meta(ge=0)] | None = None
    target_ongoing_requests: Annotated[float, Meta(gt=0)] = 2.0
    upscale_delay_s: Delay = 0.0
    downscale_delay_s: Delay = 60.0
    downscale_to_zero_delay_s: Delay | None = None
    upscaling_factor: Annotated[float, Meta(gt=0)] = 1.0
    downscaling_factor: Annotated[float, Meta(gt=0, le=1)] = 1.0
    policy: Middleware | None = None

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={self.initial_replicas} is not between min_replicas={self.min_replicas} and "
                f"max_replicas={self.max_replicas}"
            )
        path = self.policy[0] if isinstance(self.policy, (tuple, list)) else self.policy
        if path is not None and not re.fullmatch(r"[\w.]+:[\w.]+", path):
            raise ValueError(f"policy={path!r} is no import path: write 'module:function'")

    @property
    def start_replicas(self) -> int:
        """How many to begin with."""
        return max(self.min_replicas, 1) if self.initial_replicas is None else self.initial_replicas

    def clip(self, replicas: int) -> int:
        """Return the nearest number within the bounds."""
        return min(max(replicas, self.min_replicas), self.max_replicas)


class RuntimeEnv(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``runtime_env`` of a deployment accepts, as this or as a dict. Changes of it restart the replicas.

    A worker's process has one environment at most, until it ends: Dask's tasks there see it too.

    Parameters
    ----------
    pip : list of str or str, default []
        What ``pip install`` is to bring: requirements and options such as ``--index-url URL``, as in a requirements
        file; or the path of such a file, which is read where the application is deployed. Only what the worker's own
        Python does not have already is installed.
    env_vars : dict of str to str, default {}
        Environment variables. They are set when the process runs already: what is read at its start, such as
        ``LD_LIBRARY_PATH``, does not change.
    working_dir : str or None, default None
        A directory, which is sent to the workers and is their current directory, and where modules are found.
    py_modules : list of str, default []
        Directories of packages, and files of modules, that are sent to the workers, where they can be imported.
    excludes : list of str, default []
        What to leave out of ``working_dir`` and ``py_modules``: patterns such as ``"*.csv"`` or ``"data/*"`` for paths
        within them. Version control, caches and virtual environments are left out in any case.
    """

    pip: list[str] | Path = []
    env_vars: dict[Annotated[str, Meta(pattern=r"^[^=\0]+\Z")], Annotated[str, Meta(pattern=r"^[^\0]*\Z")]] = {}
    working_dir: Path | None = None
    py_modules: list[Path] = []
    excludes: list[str] = []


class DeploymentOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``@serve.deployment(...)`` and ``Deployment.options(...)`` accept.

    Parameters
    ----------
    num_replicas : int or "auto", default 1
        How many replicas to keep ready. ``"auto"``: as many as the load needs, see ``autoscaling_config``.
    autoscaling_config : AutoscalingConfig, dict or None, default None
        How ``num_replicas="auto"``, which may be left out beside it, follows the load. See `AutoscalingConfig`.
    max_ongoing_requests : int, default 100
        How many requests one replica runs at the same time; more of them wait at the router.
    threads : int, default 1
        Size of the thread pool that runs a replica's ``def`` methods (``async def`` methods share one
        event loop). Counted softly against the worker's ``nthreads`` when replicas are placed. BLAS, OpenMP and torch
        use as many threads in the replica's calls.
    max_queued_requests : int or None, default None
        How many requests may wait, at all routers together, before more are refused with ``BackPressureError``. None:
        10,000 over HTTP, unbounded for handles.
    user_config : JSON-able, default None
        Handed to the replica's ``reconfigure(user_config)`` before it is ready.
    resources : dict of str to float, default {}
        Dask worker resources that one replica takes, e.g. ``{"GPU": 1}``. A hard limit for placement.
    gpus : float, default 0
        Devices that one replica takes: a whole number, or a fraction below 1, which shares one device with others. A
        hard limit for placement. ``get_replica_context().devices`` tells which; it is booked with Dask too, where the
        worker declares a resource ``GPU``.
    memory : int or str or None, default None
        Bytes of the worker's memory limit that one replica is counted with, or text such as ``"4 GiB"``. A hard limit
        for placement on workers that have a limit; it does not bound what the replica uses.
    workers : list of str, default []
        Names or addresses of the workers that may hold replicas; empty means all.
    max_replicas_per_worker : int or None, default None
        The most replicas of this deployment that one worker may hold.
    runtime_env : RuntimeEnv, dict or None, default None
        What the process of the replica is to have: packages, environment variables, directories. A hard limit for
        placement: a process has one environment. See `RuntimeEnv`.
    max_surge : int or float, default 0.25
        How many replicas a rolling update may run beyond ``num_replicas``: a number, or a fraction of them (up to
        1.0), rounded up.
    max_unavailable : int or float, default 0
        How many replicas may be missing during a rolling update: a number, or a fraction, rounded down. Old replicas
        are stopped before new ones are ready only where there is no room to surge.
    graceful_shutdown_timeout_s : float, default 20.0
        Seconds that a stopping replica may take to finish what it runs, and for its ``shutdown()`` or ``__del__``.
    health_check_period_s : float, default 5.0
        Seconds between two calls of the replica's ``check_health()``, if it has one. Three failures in a row replace
        the replica.
    health_check_timeout_s : float, default 10.0
        Seconds that one ``check_health()`` may take. A worker that hangs for so long, of which neither door nor
        heartbeat is heard, is given up, and its replicas are replaced.
    stuck_timeout_s : float or None, default None
        Seconds without any progress after which a replica is replaced although what it runs has not returned: its
        event loop is blocked, or all its threads are busy while requests wait. None: never; the status tells.
    request_timeout_s : float or None, default None
        Deadline of a request in seconds. None: 60 over HTTP, none for handles.
    retries_on_loss : int or None, default None
        How often a request may be sent again when its replica is lost while it runs, where the handle does not say so
        itself. Only for deployments all of whose requests may run twice, over HTTP those of any method. None: 0 for
        handles; over HTTP 1 for GET, HEAD and OPTIONS, and 0 for others.
    inline_result_bytes : int, default 65536
        Results of calls from Python with at least this many bytes (serialised) stay in the process of the replica until
        they are fetched, passed to another call, or needed by Dask; smaller ones travel in the answer.
    body_limit : int or None, default None
        Bytes the body of an HTTP request may have; over it 413. None: what ``serve.start`` says.
    datasets : list of str, default []
        Published data sets that requests may refer to, see `resolve`; empty: none.
    version : str or None, default None
        Replaces the code's part of the revision: replicas restart only when it changes.
    debug : bool, default False
        True: the answer to an HTTP request whose code raised has the traceback (``__call__`` only; applications under
        ``@serve.ingress`` have a setting of their own). It shows source code: not for the public.
    log_level : "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL" or None, default None
        From which level on the deployment's code logs: the loggers of its package, and ours where they tell of its
        replicas. None: as those loggers are set.
    tracing : bool, default False
        Whether replicas make OpenTelemetry spans of requests, batches and the calls that they make, exported as the
        environment variables ``OTEL_*`` of the workers say. Needs ``dask-serve[otel]`` there.
    """

    num_replicas: Annotated[
        Count | Literal["auto"], Meta(description='it is a number from 1 on, or "auto"; autoscaling_config may go to 0')
    ] = 1
    autoscaling_config: AutoscalingConfig | None = None
    max_ongoing_requests: Count = 100
    threads: Count = 1
    max_queued_requests: Count | None = None
    user_config: Any = None
    resources: dict[str, Annotated[float, Meta(ge=0)]] = {}
    gpus: Annotated[float, Meta(ge=0)] = 0.0
    memory: Count | None = None
    workers: list[str] = []
    max_replicas_per_worker: Count | None = None
    runtime_env: RuntimeEnv | None = None
    max_surge: Share = 0.25
    max_unavailable: Share = 0
    graceful_shutdown_timeout_s: Annotated[float, Meta(ge=0)] = 20.0
    health_check_period_s: Seconds = 5.0
    health_check_timeout_s: Seconds = 10.0
    stuck_timeout_s: Seconds | None = None
    request_timeout_s: Seconds | None = None
    retries_on_loss: Annotated[int, Meta(ge=0)] | None = None
    inline_result_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024
    body_limit: Annotated[int, Meta(ge=0)] | None = None
    datasets: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(description='it is a list of the names that data sets are published under: ["features"]'),
    ] = []
    version: str | None = None
    debug: bool = False
    log_level: Annotated[Level | None, _LEVEL] = None
    tracing: bool = False

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(
                f"option gpus = {self.gpus:g} is not valid: give a whole number of devices, or a fraction below 1"
            )
        if self.gpus and "GPU" in self.resources:
            raise ValueError(
                f"gpus = {self.gpus:g} and resources = {self.resources!r} ask for GPUs twice: gpus takes the worker's "
                "resource GPU too, leave that out of resources"
            )
        if (self.num_replicas == "auto") != (self.autoscaling_config is not None):
            raise ValueError('autoscaling_config goes with num_replicas="auto", and not with a number')
        if not self.max_surge and not self.max_unavailable:
            raise ValueError("max_surge=0 needs max_unavailable=1 or more: an update could not begin otherwise")


#: The options whose change restarts replicas, beside ``runtime_env``, of which the content counts; all others change
#: in place.
RESTARTING_OPTIONS = ("threads", "resources", "gpus", "memory", "workers", "max_replicas_per_worker", "version")


class HTTPOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``serve.start(...)`` accepts. All of it can change while the service runs; no request is lost by that.

    Files are read where the proxies run: on the scheduler's node, and wherever ``dask serve proxy`` runs. A proxy
    looks every second whether they have changed. Limits hold for each proxy process.

    Parameters
    ----------
    host : str, default "127.0.0.1"
        Interface the proxies listen on.
    port : int or None, default None
        Port the proxies listen on. None: 8000, or the next free one with a warning when it is busy. An
        explicit port that is busy is an error. 0: any free one.
    unix_socket : str or None, default None
        Path of a Unix socket to listen on instead of host and port, for the owner and the group of the scheduler's
        process (mode 0660).
    num_proxies : int, default 1
        Number of proxy processes on the scheduler's node.
    admin_port : int or None, default None
        Where ``/-/metrics`` and ``/-/routes`` are answered, and only there. Each proxy has one of its own: this port
        and those that follow it; 0: any free ones. None: on the public port, for clients on the loopback interface.
    admin_host : str, default "127.0.0.1"
        Interface of the admin ports.
    root_path : str, default ""
        The path that a reverse proxy in front strips from its requests, e.g. ``"/models"``; applications see it in
        front of their own in ``root_path``.
    trusted_proxies : list of str, default []
        Addresses and networks (``"10.0.0.0/8"``) whose ``X-Forwarded-For``, ``-Proto`` and ``-Host`` are believed;
        ``"unix"``: clients of the Unix socket.
    request_timeout_s : float, default 60.0
        Seconds until the first byte of an answer; over it 504.
    body_limit : int, default 104857600
        Bytes a request's body may have; over it 413. A deployment may say otherwise.
    head_limit : int, default 65536
        Bytes that a request line and its headers may have together, from 1024 to 1 MiB; over it 431.
    max_headers : int, default 128
        How many headers a request may have; over it 431.
    head_timeout_s : float, default 30.0
        Seconds within which a head must have come; over it 408.
    body_timeout_s : float, default 30.0
        Seconds within which another KiB of a request's body, or its end, must have come; over it 408.
    message_limit : int, default 16777216
        Bytes that a WebSocket's client may send as one message; a larger one closes it with 1009.
    keep_alive_timeout_s : float, default 75.0
        Seconds a connection may stay open between two requests.
    max_connections : int, default 10000
        Connections at the same time; one more is answered with 503 and closed.
    tls_certificate, tls_key : str or None, default None
        PEM files of the certificate (with its chain) and its key. Both or none: HTTP without TLS.
    tls_key_password_file : str or None, default None
        File that holds the password of the key.
    tls_client_ca : str or None, default None
        PEM file of the authorities one of which must have signed a client's certificate. None: clients need none.
    tokens_file : str or None, default None
        File of bearer tokens, one a line, that only its owner may read. Requests need one of them, but for
        ``/-/healthz`` and ``/-/readyz``. None: no token is needed.
    application_tokens : dict of str to (str or None), default {}
        Files of tokens for single applications, by name, instead of ``tokens_file``; None: it needs no token.
    middleware : list, default []
        Starlette or other ASGI middleware around all applications, the outermost first: import paths
        (``"starlette.middleware.gzip:GZipMiddleware"``), each alone or with its arguments
        (``["starlette.middleware.cors:CORSMiddleware", {"allow_origins": ["*"]}]``).
    drain_timeout_s : float, default 20.0
        Seconds a stopping proxy gives to requests in flight.
    access_log : bool, default False
        Whether each request is logged when it has been answered: method, path, status, time, deployment, request id.
        Never its query, headers or body.
    access_log_limit : int, default 100
        Requests that a proxy logs a second. Of more a sample is logged, errors first, and how many were left out.
    log_format : "text" or "json", default "text"
        How the proxies write their log to stderr: lines of text, or one JSON object a line.
    log_level : "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL", default "WARNING"
        From which level on the proxies write.
    server_timing : bool, default False
        Whether all answers have the header ``Server-Timing``. Without it those have it whose requests have a header
        ``X-Request-Server-Timing``.
    tracing : bool, default False
        Whether the proxies make OpenTelemetry spans, exported as the environment variables ``OTEL_*`` of the
        scheduler's process say. Needs ``dask-serve[otel]`` there. Deployments have an option of the same name.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    unix_socket: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    num_proxies: Count = 1
    admin_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    admin_host: str = "127.0.0.1"
    root_path: Annotated[
        Annotated[str, Meta(pattern=r"^(/[^/?#\s]+)*\Z")],
        Meta(description="it is a path like '/models', without a slash at its end, or ''"),
    ] = ""
    trusted_proxies: list[str] = []
    request_timeout_s: Seconds = 60.0
    body_limit: Annotated[int, Meta(ge=0)] = 100 * 2**20
    head_limit: Annotated[int, Meta(ge=1024, le=2**20)] = 64 * 1024
    max_headers: Annotated[int, Meta(ge=1, le=10_000)] = 128
    head_timeout_s: Seconds = 30.0
    body_timeout_s: Seconds = 30.0
    message_limit: Count = 16 * 2**20
    keep_alive_timeout_s: Seconds = 75.0
    max_connections: Count = 10_000
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password_file: Path | None = None
    tls_client_ca: Path | None = None
    tokens_file: Path | None = None
    application_tokens: dict[str, Path | None] = {}
    middleware: list[Middleware] = []
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 20.0
    access_log: bool = False
    access_log_limit: Count = 100
    log_format: Literal["text", "json"] = "text"
    log_level: Annotated[Level, _LEVEL] = "WARNING"
    server_timing: bool = False
    tracing: bool = False

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both of them, or none")
        for name in ("tls_key_password_file", "tls_client_ca"):
            if self.tls_certificate is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs tls_certificate and tls_key")
        for address in self.trusted_proxies:
            if address != "unix":
                try:
                    ipaddress.ip_network(address)
                except ValueError as error:
                    raise ValueError(
                        f"trusted_proxies holds {address!r}: {error}; give addresses like '10.0.0.1', networks like "
                        "'10.0.0.0/8', or 'unix'"
                    ) from None
        for entry in self.middleware:
            path = entry if isinstance(entry, str) else entry[0]
            if not re.fullmatch(r"[\w.]+:[\w.]+", path):
                raise ValueError(
                    f"middleware holds {path!r}: write module:Class, e.g. 'starlette.middleware.gzip:GZipMiddleware'"
                )


class CallOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``handle.options(...)`` accepts. A handle is its target and these.

    Parameters
    ----------
    method_name : str, default "__call__"
        What ``remote`` calls; ``handle.method`` is short for ``handle.options(method_name="method")``.
    sync : bool, default True
        False: ``await handle.remote()`` is the ref; for use in a running event loop, which then carries the requests
        itself.
    request_timeout_s : float or None, default None
        Deadline of each request in seconds; passed on to the calls that the request makes in turn. None: the
        deployment's, if it has one. Never later than that of the request that makes the call.
    retries_on_loss : int or None, default None
        How often a request may be sent again when its replica is lost while it runs. Only for calls that may run twice.
        None: as the deployment says, else 0.
    multiplexed_model_id : str, default ""
        The model that the call is for: `get_multiplexed_model_id` returns it in the replica. Not passed on to the calls
        that the request makes in turn.
    request_class : "online", "background" or None, default None
        Background requests take what online ones leave (and one of ten in any case). None: as the request that makes
        the call, else online.
    stream : bool, default False
        True: the method is a generator, and ``remote`` returns a stream of what it yields, a
        `DeploymentResponseGenerator`.
    request_id : str or None, default None
        Stands in logs and errors. None: that of the request that makes the call, else a new one.
    """

    method_name: Annotated[str, Meta(min_length=1)] = "__call__"
    sync: bool = True
    request_timeout_s: Seconds | None = None
    retries_on_loss: Annotated[int, Meta(ge=0)] | None = None
    multiplexed_model_id: Annotated[str, Meta(max_length=1024)] = ""
    request_class: Annotated[
        Literal["online", "background"] | None, Meta(description='it is "online", "background" or None')
    ] = None
    stream: bool = False
    request_id: Annotated[
        Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")] | None,
        Meta(description="it is a str of 1 to 128 printable ASCII characters without blanks, or None"),
    ] = None
