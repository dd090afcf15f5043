"""What `dask serve run` starts, and has to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .connecting import Cluster
from .messages import Failure, told

if TYPE_CHECKING:
    from distributed import Client

    from ..deployment import Application
    from ..embedded import EmbeddedCluster
    from ..policy.desired import Source
    from .watching import Watch

__all__ = ["INTERRUPTED", "Serving", "Stop", "check_port"]

#: Exit code of a process that a signal ended before it could drain.
INTERRUPTED = 130


class Stop(BaseException):
    """The user asked for the end. Not an Exception: no handler of user code is meant to catch it."""


def check_port(http: dict[str, Any]) -> None:
    """Raise ConfigError where a port that was asked for is busy: before a cluster is started for nothing."""
    from ..defaults import configured_http

    options, names = configured_http()
    wanted = {**{name: getattr(options, name) for name in names}, **http}
    if not wanted.get("port") or wanted.get("unix_socket"):
        return
    import asyncio

    from ..controller.sockets import bind_slots

    for sock in asyncio.run(bind_slots(wanted.get("host", "127.0.0.1"), wanted["port"], 1)):
        sock.close()


class Serving:
    """A client, and the embedded cluster where no other is named.

    Parameters
    ----------
    elsewhere : Cluster or None
        The cluster to serve on; None: one that is started here.
    workers : int, optional
        Worker processes that one begins with.
    """

    def __init__(self, elsewhere: Cluster | None, workers: int | None) -> None:
        self.elsewhere = elsewhere
        self.workers = workers
        self.cluster: EmbeddedCluster | None = None
        self.client: Client | None = None
        self._deployed: str | None = None
        self._route_prefix = "/"
        self._source: Source | None = None
        self._signals = 0
        self._closing = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into `Stop`, and the second into the end of everything."""
        before = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._abort()
        # During the close that an error or the cluster's end began, the first signal need not begin another.
        if not self._closing:
            raise Stop

    def _abort(self) -> NoReturn:
        if self.cluster is not None:
            self.cluster.kill()
        os._exit(INTERRUPTED)

    def deploy(
        self, application: Application, name: str, route_prefix: str, http: dict[str, Any], source: Source
    ) -> None:
        """Deploy ``application``, which was loaded from ``source``, and print where it answers."""
        from .. import api

        client = self._connect()
        self._route_prefix = route_prefix
        self._source = source
        if self.cluster is None:
            click.echo(f"scheduler at {client.scheduler.address}, dashboard at {client.dashboard_link}")
        api.start(**http, client=client)
        self._deployed = name
        click.echo(f"deploying {name}")
        self._send(application, name)
        url = api.url(client=client)
        click.echo(f"{name} is ready at {url.rstrip('/')}{route_prefix}")
        click.echo("Ctrl-C ends it")

    def _connect(self) -> Client:
        if self.elsewhere is not None:
            self.client = self.elsewhere.connect()
            return self.client
        from distributed import Client

        from ..embedded import EmbeddedCluster

        self.cluster = EmbeddedCluster.start(n_workers=self.workers, progress=click.echo)
        self.client = Client(self.cluster.scheduler_address)
        return self.client

    def wait(self) -> NoReturn:
        """Wait for a signal, or for the cluster's end."""
        pause = threading.Event()
        while True:
            pause.wait(0.5)
            self.check()

    def follow(self, watch: Watch, load: Callable[[], Any]) -> NoReturn:
        """Deploy what ``load`` returns whenever source files have changed; where that fails the old code goes on."""
        while True:
            changed = watch.wait(0.5)
            self.check()
            if changed:
                click.echo(f"changed: {', '.join(sorted(changed))}")
                try:
                    self._deploy_again(load())
                except Exception as error:  # noqa: BLE001 - whatever it is, the next change may mend it
                    told(error).show()
                    click.echo("the old code goes on")

    def _deploy_again(self, application: Any) -> None:
        from .. import versions

        name = self._deployed
        assert name is not None
        before = versions.history(name, client=self.client)[-1].version
        self._send(application, name)
        after = versions.history(name, client=self.client)[-1].version
        click.echo(f"version {after} of {name} is ready" if after != before else f"nothing of {name} has changed")

    def _send(self, application: Application, name: str) -> None:
        """Deploy as `dask_serve.run` does, and say where the code is from: `dask serve config` tells."""
        from ..config import HTTPOptions
        from ..controller.deploy import deploy
        from ..controller.progress import Progress
        from ..shipping.graph import build

        assert self.client is not None
        built = build(application, name, self._route_prefix, source=self._source)
        proxies: tuple[HTTPOptions, list[str]] = (HTTPOptions(), [])
        self.client.sync(deploy, self.client, built, proxies, wait=True, timeout=None, say=Progress())

    def check(self) -> None:
        """Raise where the cluster has ended."""
        if self.cluster is not None and not self.cluster.alive:
            raise Failure("the embedded cluster ended by itself", "what it said before tells why; start it again")
        if self.client is not None and self.client.status == "closed":
            where = self.elsewhere.address if self.elsewhere is not None else "this node"
            raise Failure(f"the connection to the scheduler at {where} was lost", "is it still running?")

    def close(self) -> None:
        """Drain, and end what this command started."""
        self._closing = True
        if self.client is None and self.cluster is None:
            return
        with contextlib.suppress(OSError):  # nobody may be reading any more
            click.echo("draining (Ctrl-C again ends at once)" if self._signals else "closing")
        from .. import api

        if self.cluster is None and self._deployed is not None and self.client is not None:
            with contextlib.suppress(Exception):
                api.delete(self._deployed, client=self.client)
        # An embedded cluster drains by itself, and closes this client between the service and the scheduler.
        if self.cluster is not None:
            self.cluster.close()
        elif self.client is not None:
            self.client.close()
