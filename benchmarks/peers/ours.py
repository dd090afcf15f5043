"""dask_serve as one of the systems: two workers, a scheduler, a driver."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from distributed import Client

import dask_serve as serve

from ..processes import DEADLINE, Cluster, cluster
from .interface import answer

LIMIT = 1000


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
        """Keep that many calls going, each from a coroutine that calls again when it is answered."""
        begun = time.perf_counter()

        async def caller() -> int:
            count = 0
            while time.perf_counter() - begun < seconds:
                await self.echo.remote(count)
                count += 1
            return count

        count = sum(await asyncio.gather(*[caller() for _ in range(in_flight)]))
        return count, time.perf_counter() - begun


class DaskServe:
    """The running service."""

    def __init__(self, running: Cluster, client: Client) -> None:
        self.cluster = running
        self.caller = serve.run(Caller.bind(Callee.bind()), name="peers", route_prefix="/peers", client=client)
        self.callee = serve.get_deployment_handle("Callee", "peers", client=client)

    def describe(self) -> str:
        """Tell what runs where."""
        return (
            f"dask_serve {serve.__version__} on distributed {version('distributed')}, caller and callee in two worker "
            f"processes, max_ongoing_requests={LIMIT}"
        )

    def processes(self) -> dict[str, int]:
        """Return the driver and the workers."""
        caller, callee = self.cluster.workers
        return {"driver": os.getpid(), "caller": caller.pid, "callee": callee.pid}

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Let the caller's replica call."""
        count, took = self.caller.run.remote(in_flight, seconds).result()
        return count, took

    def burst(self, count: int) -> float:
        """Call from this thread."""
        begun = time.perf_counter()
        refs = [self.callee.echo.remote(number) for number in range(count)]
        values = serve.gather(refs)
        took = time.perf_counter() - begun
        assert values == list(range(count))
        return took


@contextmanager
def opened() -> Iterator[DaskServe]:
    """Start a cluster of its own."""
    with cluster(workers=2) as running, Client(running.address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=DEADLINE)
        yield DaskServe(running, client)


if __name__ == "__main__":
    answer(opened)
