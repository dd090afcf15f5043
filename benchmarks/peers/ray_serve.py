"""Ray Serve as one of the systems; runs in ``.venv-peers/ray_serve``."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers.interface import Case, Peer, answer

LIMIT = 1000
#: Read by this module: no line in the log for each request; which serialisation calls over gRPC use.
QUIET, PICKLE = "BENCHMARK_QUIET", "BENCHMARK_PICKLE"
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
FEWER_METRICS = {
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
}

PEER = Peer(
    title="Ray Serve",
    modes={
        "default": {},
        "throughput mode": THROUGHPUT,
        "throughput mode, no access log": {**THROUGHPUT, QUIET: "1"},
        "throughput mode, all else that helps": {**THROUGHPUT, **FEWER_METRICS, QUIET: "1", PICKLE: "1"},
    },
    cases={
        "concurrent": Case(
            (
                "default",
                "throughput mode",
                "throughput mode, no access log",
                "throughput mode, all else that helps",
            ),
            least=15.0,
        ),
        "burst": Case(("default",), least=40.0),
    },
)


class Callee:
    """Returns its argument."""

    async def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value

    async def pid(self) -> int:
        """Tell which process this is."""
        return os.getpid()


class Caller:
    """Calls the other deployment from its event loop."""

    def __init__(self, callee: Any, serialization: str | None) -> None:
        if serialization is not None:
            callee = callee.options(request_serialization=serialization, response_serialization=serialization)
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

    async def pid(self) -> int:
        """Tell which process this is."""
        return os.getpid()


class RayServe:
    """The running service; the driver is this process."""

    def __init__(self) -> None:
        from ray import serve

        quiet, pickle = QUIET in os.environ, PICKLE in os.environ
        options: dict[str, Any] = {"max_ongoing_requests": LIMIT}
        if quiet:
            options["logging_config"] = {"enable_access_log": False}
        declare = serve.deployment(**options)
        app = declare(Caller).bind(declare(Callee).bind(), "pickle" if pickle else None)
        self.caller = in_thread(serve.run(app, name="peers", route_prefix="/peers"))
        self.callee = in_thread(serve.get_deployment_handle("Callee", "peers"))
        self.gather = self.quickest()

    def describe(self) -> str:
        """Tell version and settings."""
        import ray

        variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("RAY_SERVE_")]
        settings = [f"max_ongoing_requests={LIMIT}", *variables]
        settings += ["enable_access_log=False"] if QUIET in os.environ else []
        settings += ['request_serialization=response_serialization="pickle"'] if PICKLE in os.environ else []
        how = "`[r.result() for r in responses]`" if self.gather is results else "`ray.get` of the object refs"
        return f"Ray {ray.__version__}, {', '.join(settings)}, no dashboard and no proxy; a burst is gathered by {how}"

    def processes(self) -> dict[str, int]:
        """Return the driver and the replicas."""
        caller, callee = self.caller.pid.remote().result(), self.callee.pid.remote().result()
        return {"driver": os.getpid(), "caller": caller, "callee": callee}

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Let the caller's replica call."""
        count, took = self.caller.run.remote(in_flight, seconds).result()
        return count, took

    def burst(self, count: int) -> float:
        """Call from this thread."""
        return self.timed(self.gather, count)

    def timed(self, gather: Callable[[list[Any]], list[Any]], count: int) -> float:
        """Return how long a burst takes."""
        begun = time.perf_counter()
        values = gather([self.callee.echo.remote(number) for number in range(count)])
        took = time.perf_counter() - begun
        assert values == list(range(count))
        return took

    def quickest(self) -> Callable[[list[Any]], list[Any]]:
        """Try the ways to gather a burst."""
        if any(name in os.environ for name in THROUGHPUT):
            # Responses by gRPC have no object refs.
            return results
        return min((results, objects), key=lambda gather: min(self.timed(gather, 200) for _ in range(3)))


def results(responses: list[Any]) -> list[Any]:
    """Wait for one after the other."""
    return [response.result() for response in responses]


def objects(responses: list[Any]) -> list[Any]:
    """Let Ray's core wait for all."""
    import ray

    values: list[Any] = ray.get([response._to_object_ref_sync() for response in responses])
    return values


def in_thread(handle: Any) -> Any:
    """Let a handle be used without an event loop in throughput mode too, as Ray's own benchmarks do."""
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


@contextmanager
def opened() -> Iterator[RayServe]:
    """Start Ray on this machine, and stop it."""
    # It tells its makers of every start otherwise.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    # Its sockets are in there, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200_000_000,
            _temp_dir=folder,
        )
        try:
            serve.start(proxy_location="Disabled")
            yield RayServe()
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    answer(opened)
