"""Ray Serve as one of the systems; runs in ``.venv-peers/ray_serve``."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from benchmarks.calling import keep_going
from benchmarks.peers.catalogue import HTTP, PICKLE, QUIET
from benchmarks.peers.interface import LIMIT, answer, timed
from benchmarks.peers.models import BATCHES, CASE, SLEEP, SleepingModel, seconds_of


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
        """Keep that many calls going."""
        return await keep_going(self.echo.remote, in_flight, seconds)

    async def pid(self) -> int:
        """Tell which process this is."""
        return os.getpid()


class NoOp:
    """Answers with a word."""

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Do nothing else."""
        return PlainTextResponse("hello")

    async def pid(self) -> int:
        """Tell which process this is."""
        return os.getpid()


class Batched(Callee):
    """Answers many at a time."""

    @serve.batch(max_batch_size=64)  # type: ignore[untyped-decorator]
    async def echo(self, values: list[Any]) -> list[Any]:
        """Return the arguments."""
        await asyncio.sleep(seconds_of(values))
        return values


class Sleeping(NoOp):
    """Takes its time."""

    def __init__(self) -> None:
        self.model = SleepingModel()

    async def __call__(self, request: Request) -> dict[str, Any]:  # type: ignore[override]
        """Answer with the model."""
        value = (await request.json())["input"]
        return {"output": await asyncio.to_thread(self.model.predict, value)}


class RayServe:
    """The running service; the driver is this process."""

    def __init__(self, port: int | None) -> None:
        quiet, pickle = QUIET in os.environ, PICKLE in os.environ
        options: dict[str, Any] = {"max_ongoing_requests": LIMIT}
        if quiet:
            options["logging_config"] = {"enable_access_log": False}
        declare = serve.deployment(**options)
        self.is_batched = os.environ.get(CASE) == BATCHES
        callee = declare(Batched if self.is_batched else Callee).options(name="Callee")
        app = declare(Caller).bind(callee.bind(), "pickle" if pickle else None)
        self.caller = in_thread(serve.run(app, name="peers", route_prefix="/peers"))
        self.callee = in_thread(serve.get_deployment_handle("Callee", "peers"))
        self.port = port
        if port is not None:
            self.web = in_thread(serve.run(declare(NoOp).bind(), name="noop", route_prefix="/noop"))
        self.gather = self.quickest()

    def describe(self) -> str:
        """Tell version and settings."""
        variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("RAY_SERVE_")]
        settings = [f"max_ongoing_requests={LIMIT}", *variables]
        settings += ["enable_access_log=False"] if QUIET in os.environ else []
        settings += ['request_serialization=response_serialization="pickle"'] if PICKLE in os.environ else []
        settings += ["no dashboard" if self.port else "no dashboard and no proxy"]
        if self.is_batched:
            return f"Ray {ray.__version__}, {', '.join(settings)}, max_batch_size=64"
        how = "`[r.result() for r in responses]`" if self.gather is results else "`ray.get` of the object refs"
        return f"Ray {ray.__version__}, {', '.join(settings)}; a burst is gathered by {how}"

    def processes(self) -> dict[str, int]:
        """Return the driver and the replicas."""
        replicas = {"caller": self.caller, "callee": self.callee}
        if self.port is not None:
            replicas["replica"] = self.web
        return {"driver": os.getpid(), **{name: handle.pid.remote().result() for name, handle in replicas.items()}}

    def concurrent(self, in_flight: int, seconds: float) -> tuple[int, float]:
        """Let the caller's replica call."""
        count, took = self.caller.run.remote(in_flight, seconds).result()
        return count, took

    #: The callee is one or the other.
    batched = concurrent

    def burst(self, count: int) -> float:
        """Call from this thread."""
        return timed(self.callee.echo.remote, self.gather, count)

    def noop(self) -> str:
        """Return where a word is answered."""
        return f"http://127.0.0.1:{self.port}/noop"

    def quickest(self) -> Callable[[list[Any]], list[Any]]:
        """Try the ways to gather a burst."""
        if self.is_batched or "RAY_SERVE_THROUGHPUT_OPTIMIZED" in os.environ:
            # Not asked; and responses by gRPC have no object refs.
            return results
        call = self.callee.echo.remote
        return min((results, objects), key=lambda gather: min(timed(call, gather, 200) for _ in range(3)))


class RaySleeping:
    """The running service of the model that takes its time, with all defaults."""

    def __init__(self, port: int | None) -> None:
        self.replica = in_thread(serve.run(serve.deployment(Sleeping).bind(), name="model", route_prefix="/model"))
        self.port = port

    def describe(self) -> str:
        """Tell version and settings."""
        return f"Ray Serve {ray.__version__}, one replica, no dashboard"

    def processes(self) -> dict[str, int]:
        """Return the driver and the replica."""
        return {"driver": os.getpid(), "replica": self.replica.pid.remote().result()}

    def model(self) -> str:
        """Return where it answers."""
        return f"http://127.0.0.1:{self.port}/model"


def results(responses: list[Any]) -> list[Any]:
    """Wait for one after the other."""
    return [response.result() for response in responses]


def objects(responses: list[Any]) -> list[Any]:
    """Let Ray's core wait for all."""
    values: list[Any] = ray.get([response._to_object_ref_sync() for response in responses])
    return values


def in_thread(handle: Any) -> Any:
    """Let a handle be used without an event loop in throughput mode too, as Ray's own benchmarks do."""
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


def free_port() -> int:
    """Return a port that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def opened() -> Iterator[RayServe | RaySleeping]:
    """Start Ray on this machine, and stop it."""
    # Its sockets are in there, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # It tells its makers of every start otherwise.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Only its end waits for this, half a minute.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
    made = RaySleeping if os.environ.get(CASE) == SLEEP else RayServe
    port = free_port() if HTTP in os.environ else None
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
            if port is None:
                serve.start(proxy_location="Disabled")
            else:
                # With HAProxy it listens on all interfaces whatever is said here.
                serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            yield made(port)
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    answer(opened)
