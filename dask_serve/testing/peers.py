"""What stands for a cluster: a table of replicas, and two owners of sessions, one outside of replicas and one inside.

They have what sessions, handles and replicas ask for, and no more. Whatever else is asked of them is told what is
missing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from distributed.security import Security
from distributed.utils import sync as run_on_loop
from tornado.ioloop import IOLoop
from tornado.platform import asyncio as _platform  # noqa: F401 - else the first start would wait for it

from ..exceptions import NotRunningError, ServeError
from ..routing.engine import Engine
from ..routing.table import DeploymentEntry, ReplicaEntry, RouteEntry, Table, encode_table

__all__ = ["Caller", "Cluster", "Host", "NoClusterError"]


class NoClusterError(NotRunningError, AttributeError):
    """Something needs Dask, and the application runs without a cluster."""


def _refuse(what: str) -> NoReturn:
    raise NoClusterError(
        f"{what} needs a Dask cluster, and under serve.testing.run there is none: give the code under test values or "
        "a stand-in instead of what Dask computes, or test this part with serve.run(app) on a cluster"
    )


class Cluster:
    """The scheduler's part: who answers for what.

    Attributes
    ----------
    address : str
        By which handles know where they belong.
    ended : dict
        By replica: done once it is ready, or has failed.
    """

    def __init__(self, routes: list[RouteEntry], applications: dict[str, str], entries: list[DeploymentEntry]) -> None:
        self.id = uuid.uuid4().hex
        self.address = f"testing://{self.id[:12]}"
        self.engine = Engine.acquire()
        self.loop: Any = asyncio.run_coroutine_threadsafe(_ioloop(), self.engine.loop).result()
        self.secret = uuid.uuid4().bytes
        self.closed = False
        self.ended: dict[str, concurrent.futures.Future[str]] = {}
        self._routes = routes
        self._applications = applications
        self._entries = {entry.id: entry for entry in entries}
        self._version = 1
        self._news = asyncio.Event()

    # -- what sessions and replicas ask, on the engine's loop

    async def serve_table(self, epoch: str, since: int, timeout: float) -> dict[str, Any]:
        """Return the table once it is newer."""
        while since >= self._version and epoch == self.id and not self.closed:
            await self._news.wait()
        if self.closed:
            raise ServeError("the application under test has ended")
        table = Table(
            epoch=self.id,
            version=self._version,
            secret=self.secret,
            deployments=dict(self._entries),
            routes=self._routes,
            applications=self._applications,
            cluster=self.id,
        )
        return {"table": encode_table(table)}

    async def serve_report(self, replica: str, event: str, **info: str) -> None:
        """A replica is ready, has failed, or is not well."""
        if event == "ready":
            self._change(replica, [ReplicaEntry(replica, info["process"], info["door"], self.address)])
        elif event == "unhealthy":
            self._change(replica, [])
        if event in {"ready", "failed"} and not self.ended[replica].done():
            self.ended[replica].set_result(info.get("error", ""))

    def _change(self, replica: str, now: list[ReplicaEntry]) -> None:
        id = replica.rpartition("/")[0]
        entry = self._entries[id]
        others = [other for other in entry.replicas if other.id != replica]
        values = {name: getattr(entry, name) for name in entry.__struct_fields__}
        self._entries[id] = DeploymentEntry(**{**values, "replicas": others + now})
        self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """No more tables: sessions end. From any thread but the engine's."""

        async def end() -> None:
            self.closed = True
            self._tell()

        asyncio.run_coroutine_threadsafe(end(), self.engine.loop).result()
        self.engine.release()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f"the scheduler's operation {name!r}")


async def _ioloop() -> IOLoop:
    """Return what Tornado, and so Dask, calls the running loop."""
    return IOLoop.current()


class _Owner:
    """What sessions want of the client or worker that they belong to."""

    def __init__(self, cluster: Cluster) -> None:
        self.scheduler = cluster
        self.loop = cluster.loop
        self.security = Security()

    @property
    def status(self) -> str:
        return "closed" if self.scheduler.closed else "running"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dask_serve_session":
            raise AttributeError(name)
        _refuse(f"what the code asks Dask for ({name!r} of a client or worker)")


class Caller(_Owner):
    """Stands for the Dask client of a session."""

    def __init__(self, cluster: Cluster, asynchronous: bool) -> None:
        super().__init__(cluster)
        self.asynchronous = asynchronous
        self.id = f"testing-{cluster.id}"
        self._get_client = _no_key

    def sync(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine function on the loop; an awaitable where the application was entered with ``async with``."""
        if self.asynchronous:
            return _elsewhere(function, self.scheduler.engine.loop)
        return run_on_loop(self.loop, function)


class Host(_Owner):
    """Stands for the Dask worker of all replicas."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.address = cluster.address
        self.name = "testing"
        self._get_client = _no_client

    def batched_send(self, message: dict[str, Any]) -> None:
        """Nobody listens."""


def _no_client(timeout: float | None = None) -> NoReturn:
    _refuse("distributed.get_client()")


def _no_key(timeout: float | None = None) -> NoReturn:
    _refuse("the Dask key, or the client, of a ref")


async def _elsewhere(function: Callable[[], Awaitable[Any]], loop: asyncio.AbstractEventLoop) -> Any:
    async def run() -> Any:
        return await function()

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), loop))
