"""The embedded cluster, seen from the session: scheduler, controller and workers in processes of their own."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from msgspec import UNSET, UnsetType

from .defaults import EmbeddedSettings, checked
from .exceptions import ConfigError, ServeError, StartTimeoutError
from .launcher import python_command

__all__ = ["EmbeddedCluster"]

#: Workers to begin with, on machines that have as many cores.
DEFAULT_WORKERS = 4
#: Workers there may be at most on any machine, unless it has more than half as many cores.
MOST_WORKERS = 16
#: Seconds that the host gets over its time-out before it is killed.
HOST_MARGIN = 5.0

logger = logging.getLogger("dask_serve")


class EmbeddedCluster:
    """A scheduler with the controller, and workers, on this machine and for this session.

    Use `EmbeddedCluster.start`. The processes live in a session (``setsid``) of their own, so that Ctrl-C and
    Jupyter's "interrupt" do not reach them. They end with this process, however it ends; at a regular exit they
    are drained first.

    Attributes
    ----------
    scheduler_address : str
        Where a `distributed.Client` connects to.
    dashboard_link : str or None
        Address of the Dask dashboard.
    pid : int
        Process id of the host, which is also the id of the workers' process group.
    """

    #: Module that puts the controller into the scheduler; tests of the processes alone replace it.
    _preload = "dask_serve.preload"

    def __init__(self, process: subprocess.Popen[bytes], lifeline: socket.socket, progress: Progress | None) -> None:
        self.scheduler_address = ""
        self.dashboard_link: str | None = None
        self.pid = process.pid
        self._process = process
        self._lifeline = lifeline
        self._progress = progress
        self._owner = os.getpid()
        self._directory: str | None = None
        self._error: dict[str, str] | None = None
        self._workers: set[str] = set()
        #: Worker processes that it begins with.
        self.n_workers = 1
        self._started = threading.Event()
        self._drained = threading.Event()
        self._gone = threading.Event()
        self._lock = threading.Lock()
        self._closing = False
        _clusters.add(self)
        threading.Thread(target=self._listen, name="dask-serve-embedded", daemon=True).start()

    @classmethod
    def start(
        cls,
        n_workers: int | None = None,
        nthreads: int | None = None,
        dashboard_address: str | UnsetType | None = UNSET,
        progress: Progress | None = None,
        timeout: float = 60.0,
    ) -> EmbeddedCluster:
        """Start a cluster and return once its scheduler accepts clients; workers register soon after.

        Parameters
        ----------
        n_workers : int, optional
            Worker processes to begin with; by default as ``serve.embedded`` of Dask's configuration says, which is the
            number of cores, at most 4. More are started when replicas find no place.
        nthreads : int, optional
            Threads of each worker; by default as configured, which is that the cores are shared out.
        dashboard_address : str or None, optional
            ``host:port`` of the Dask dashboard, by default as configured; another port is taken when this one is busy.
            None: no dashboard.
        progress : callable, optional
            Called with a line of text for each thing that happens, from other threads too.
        timeout : float
            Seconds until `StartTimeoutError`.
        """
        configured = checked(EmbeddedSettings, "embedded")
        n_workers = configured.workers if n_workers is None else n_workers
        nthreads = configured.threads if nthreads is None else nthreads
        if isinstance(dashboard_address, UnsetType):
            dashboard_address = configured.dashboard_address
        cores = os.cpu_count() or 1
        n_workers = max(1, min(cores, DEFAULT_WORKERS) if n_workers is None else n_workers)
        options = {
            "n_workers": n_workers,
            "nthreads": max(1, cores // n_workers) if nthreads is None else nthreads,
            "max_workers": max(n_workers, 2 * cores, MOST_WORKERS),
            "dashboard_address": dashboard_address,
            "preload": cls._preload,
        }
        deadline = time.monotonic() + timeout
        if progress is not None:
            progress(f"starting a scheduler and {n_workers} worker{'s' if n_workers > 1 else ''}")
        cluster = cls(*_spawn(options), progress)
        cluster.n_workers = n_workers
        try:
            # Needed anyway, while the host imports the same; and what Dask does at exit is then registered before
            # our own hook, which therefore runs first, while clients still are connected.
            import distributed  # noqa: F401

            atexit.register(cluster.close)
            cluster._wait_started(deadline, timeout)
        except BaseException:
            cluster.kill()
            raise
        return cluster

    def _wait_started(self, deadline: float, timeout: float) -> None:
        self._started.wait(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            _refuse_tls()
            raise ServeError(f"the embedded cluster could not start: {self._error['text']}\n{self._error['traceback']}")
        if self._gone.is_set():
            code = self._process.wait()
            raise ServeError(f"the embedded cluster could not start: its process ended with exit code {code}")
        if not self.scheduler_address:
            raise StartTimeoutError(f"the embedded cluster was not up after {timeout:g} seconds")

    @property
    def alive(self) -> bool:
        """Whether the host process runs, as far as this process knows."""
        return not self._gone.is_set()

    def close(self, timeout: float = 30.0) -> None:
        """Drain the service, then end workers and scheduler, and leave nothing behind.

        Parameters
        ----------
        timeout : float
            Seconds for all of it; what still runs then is killed. A second Ctrl-C kills at once.
        """
        with self._lock:
            # A process forked from the session must not end the session's cluster when it exits.
            if self._closing or os.getpid() != self._owner:
                return
            self._closing = True
        began = time.monotonic()
        try:
            self._send(drain=timeout)
            self._drained.wait(timeout)
            self._close_clients()
            self._send(close=True)
            self._gone.wait(max(0.0, began + timeout + HOST_MARGIN - time.monotonic()))
        finally:
            self.kill()

    def kill(self) -> None:
        """End all processes at once, without draining."""
        self._closing = True
        self._sweep(0.0 if not self._gone.is_set() else HOST_MARGIN)
        atexit.unregister(self.close)

    def __enter__(self) -> EmbeddedCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self._workers)} workers" if self.alive else "closed"
        return f"<EmbeddedCluster {self.scheduler_address}, {state}>"

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self._lifeline.sendall(json.dumps(message).encode() + b"\n")

    def _close_clients(self) -> None:
        """Close this session's clients of the cluster, which would try to reconnect for half a minute."""
        from distributed import Client

        for client in list(Client._instances):
            scheduler = getattr(client, "scheduler", None)
            if scheduler is not None and scheduler.address == self.scheduler_address and not client.asynchronous:
                with contextlib.suppress(Exception):
                    client.close(timeout=2)

    def _listen(self) -> None:
        """Take the host's events until it is gone (runs in a thread)."""
        with contextlib.suppress(OSError), self._lifeline.makefile("rb") as lines:
            for line in lines:
                self._handle(json.loads(line))
        self._gone.set()
        self._started.set()
        self._drained.set()
        if not self._closing and self.scheduler_address:
            self._sweep(HOST_MARGIN)
            code = self._process.returncode
            if code != 0:  # it ends with 0 after a client's shutdown()
                logger.error("the embedded cluster at %s ended, with exit code %s", self.scheduler_address, code)

    def _handle(self, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "directory":
            self._directory = message["directory"]
        elif event == "drained":
            self._drained.set()
        elif event == "error":
            self._error = message
            self._started.set()
        elif event == "scheduler":
            self.scheduler_address = message["address"]
            self.dashboard_link = message["dashboard"]
            dashboard = f", dashboard at {self.dashboard_link}" if self.dashboard_link else ""
            self._tell(f"scheduler at {self.scheduler_address}{dashboard}")
            self._started.set()
        elif event == "worker":
            self._workers.add(message["worker"])
            self._tell(f"{message['worker']} is up")
        elif event == "worker-ended":
            self._workers.discard(message["worker"])
            self._tell(f"{message['worker']} ended ({_describe(message['code'])}) and is started again")

    def _tell(self, text: str) -> None:
        if self._progress is not None:
            with contextlib.suppress(Exception):
                self._progress(text)

    def _sweep(self, patience: float) -> None:
        """Wait for the host, then remove what it left: it may have been killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_RDWR)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        _clusters.discard(self)


Progress = Callable[[str], None]

_clusters: weakref.WeakSet[EmbeddedCluster] = weakref.WeakSet()


def _spawn(options: dict[str, Any]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            python_command("dask_serve.launcher.host", str(theirs.fileno()), json.dumps(options)),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env=_environment(),
        )
    return process, ours


def _refuse_tls() -> None:
    """Say so where Dask's configuration asks for what the embedded cluster does not have."""
    import dask

    for name, wanted in (("distributed.comm.require-encryption", True), ("distributed.comm.default-scheme", "tls")):
        if dask.config.get(name, None) == wanted:
            raise ConfigError(
                f"the embedded cluster has no TLS, and Dask's configuration asks for it ({name}): name the scheduler "
                "of your cluster (scheduler-address, or --scheduler), or make a client of "
                "LocalCluster(protocol='tls://', security=Security.temporary()) first"
            )


def _environment() -> dict[str, str]:
    """Return the host's environment: this one, with Dask's configuration of this session, and quieter logs."""
    environment = dict(os.environ)
    if "dask" not in sys.modules:
        # Nothing can have been configured in this process; importing Dask would only delay the host.
        environment.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
        return environment
    import dask

    config = {key: value for key, value in dask.config.global_config.items() if key != "scheduler-address"}
    levels = config.get("logging", {})
    if "version" not in levels and "logging-file-config" not in config:
        config["logging"] = {**levels, "distributed": "warning"}
    environment["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize(config)
    return environment


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _after_fork() -> None:
    """Let go of the lifelines in a forked child, so that they break when the session alone dies."""
    for cluster in list(_clusters):
        with contextlib.suppress(OSError):
            # Not close(), which waits for the file object of the listening thread (that does not exist here).
            os.close(cluster._lifeline.detach())


os.register_at_fork(after_in_child=_after_fork)
