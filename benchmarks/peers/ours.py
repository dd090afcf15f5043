"""dask_serve as one of the systems: two workers, a scheduler with one proxy, a driver."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from distributed import Client
from starlette.requests import Request
from starlette.responses import PlainTextResponse

import dask_serve as serve

from ..calling import keep_going
from ..processes import DEADLINE, Cluster, cluster
from .interface import LIMIT, answer, timed
from .models import CASE, SLEEP, SleepingModel, seconds_of


@serve.deployment(max_ongoing_requests=LIMIT, workers=["two"])
class Callee:
    """Returns its argument."""

    async def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value


@serve.deployment(max_ongoing_requests=LIMIT, workers=["one"])
class Caller:
    """Calls the other deployment from its event loop."""

    def __init__(self, callee: serve.DeploymentHandle) -> None:
        self.echo = callee.echo

    async def run(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Keep that many calls going."""
        return await keep_going(self.echo.remote, in_flight, seconds)


@serve.deployment(max_ongoing_requests=LIMIT, workers=["one"])
class NoOp:
    """Answers with a word."""

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Do nothing else."""
        return PlainTextResponse("hello")


@serve.deployment(max_ongoing_requests=LIMIT, workers=["one"])
class Echo:
    """Answers JSON with JSON."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Parse, and answer."""
        return {"output": (await request.json())["input"]}


@serve.deployment
class Sleeping:
    """Takes its time."""

    def __init__(self) -> None:
        self.model = SleepingModel()

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer with the model."""
        value = (await request.json())["input"]
        return {"output": await asyncio.to_thread(self.model.predict, value)}


class Batches:
    """Answers many at a time."""

    @serve.batch(max_batch_size=64)
    def echo(self, values: list[Any]) -> list[Any]:
        """Return the arguments."""
        time.sleep(seconds_of(values))
        return values


@serve.deployment(max_ongoing_requests=LIMIT, workers=["two"])
class Batched(Batches):
    """They are asked for by handle."""


@serve.deployment(max_ongoing_requests=LIMIT, workers=["one"])
class BatchedJson(Batches):
    """The same over HTTP."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Parse, and answer."""
        return {"output": await self.echo((await request.json())["input"])}


class DaskServe:
    """The running service."""

    def __init__(self, running: Cluster, client: Client) -> None:
        self.cluster = running
        serve.start(port=0, client=client)
        self.caller = serve.run(Caller.bind(Callee.bind()), name="peers", route_prefix="/peers", client=client)
        self.callee = serve.get_deployment_handle("Callee", "peers", client=client)
        callers = Caller.options(name="BatchCaller").bind(Batched.bind())
        self.batch_caller = serve.run(callers, name="batched", route_prefix=None, client=client)
        for deployment, name in [(NoOp, "noop"), (Echo, "json"), (BatchedJson, "batches")]:
            serve.run(deployment.bind(), name=name, route_prefix=f"/{name}", client=client)
        self.url = serve.url(client=client)

    def describe(self) -> str:
        """Tell what runs where."""
        return (
            f"dask_serve {serve.__version__} on distributed {version('distributed')}, caller and callee in two worker "
            f"processes, one proxy, max_ongoing_requests={LIMIT}"
        )

    def processes(self) -> dict[str, int]:
        """Return the driver, the workers and the proxy."""
        caller, callee = self.cluster.workers
        [proxy] = self.cluster.proxies()
        return {"driver": os.getpid(), "caller": caller.pid, "callee": callee.pid, "proxy": proxy.pid}

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Let the caller's replica call."""
        count, took = self.caller.run.remote(in_flight, seconds).result()
        return count, took

    def batched(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Let the caller's replica call the batched method."""
        count, took = self.batch_caller.run.remote(in_flight, seconds).result()
        return count, took

    def burst(self, count: int) -> float:
        """Call from this thread."""
        return timed(self.callee.echo.remote, serve.gather, count)

    def noop(self) -> str:
        """Return where a word is answered."""
        return f"{self.url}/noop"

    def json(self) -> str:
        """Return where JSON is answered."""
        return f"{self.url}/json"

    def batches(self) -> str:
        """Return where batches are answered."""
        return f"{self.url}/batches"


class DaskServeSleeping:
    """The running service of the model that takes its time, with all defaults."""

    def __init__(self, running: Cluster, client: Client) -> None:
        self.cluster = running
        serve.start(port=0, client=client)
        serve.run(Sleeping.bind(), name="model", route_prefix="/model", client=client)
        self.url = serve.url(client=client)

    def describe(self) -> str:
        """Tell version and settings."""
        return f"dask_serve {serve.__version__} on distributed {version('distributed')}, one replica, one proxy"

    def processes(self) -> dict[str, int]:
        """Return the driver, the worker and the proxy."""
        [proxy] = self.cluster.proxies()
        return {"driver": os.getpid(), "worker": self.cluster.worker.pid, "proxy": proxy.pid}

    def model(self) -> str:
        """Return where it answers."""
        return f"{self.url}/model"


@contextmanager
def opened() -> Iterator[DaskServe | DaskServeSleeping]:
    """Start a cluster of its own."""
    made, workers = (DaskServeSleeping, 1) if os.environ.get(CASE) == SLEEP else (DaskServe, 2)
    with cluster(workers) as running, Client(running.address, set_as_default=False) as client:
        client.wait_for_workers(workers, timeout=DEADLINE)
        yield made(running, client)


if __name__ == "__main__":
    answer(opened)
