"""What a session does: run, look at and end applications, from every kind of session."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import httpx
import pytest
from distributed import Client, Worker
from distributed.utils_test import cluster, gen_cluster

import dask_serve as serve
from dask_serve.controller.status import ServeStatus
from dask_serve.exceptions import (
    ApplicationNotFoundError,
    ConfigError,
    DeploymentFailedError,
    NotRunningError,
    ServeError,
    StartTimeoutError,
)
from dask_serve.handle import DeploymentHandle
from dask_serve.session.peers import current_client


@serve.deployment
class Model:
    def __call__(self, x):
        return x


@serve.deployment
class Parent:
    def __init__(self, child: DeploymentHandle) -> None:
        self.child = child

    async def __call__(self, x):
        return "from the child", await self.child.remote(x)


@serve.deployment
class Broken:
    def __init__(self) -> None:
        self.share = 1 / 0


@serve.deployment
class Web:
    async def __call__(self, request):
        return str(len(await request.body()))


class Inside:
    """Looks around from within a replica."""

    def look(self):
        with pytest.raises(ServeError, match="does not work inside a replica or a Dask task"):
            serve.run(Model.bind())
        return serve.get_app_handle("one"), serve.get_deployment_handle("Model")


async def until(condition: Callable[[ServeStatus], bool], timeout: float = 10.0) -> None:
    """Wait until the status meets a condition."""
    deadline = time.monotonic() + timeout
    while not condition(status := await serve.status()):
        assert time.monotonic() < deadline, f"still\n{status}"
        await asyncio.sleep(0.01)


async def post(url: str, body: str = "") -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.post(url, content=body, timeout=10)


# -- without a cluster -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Model, Model.func_or_class, print, 3])
def test_not_bound(target):
    with pytest.raises(ConfigError, match=r"\.bind\("):
        serve.run(target)


def test_wrong_options():
    with pytest.raises(ConfigError, match="`dask serve run module:app`"):
        serve.run(Model.bind(), blocking=True)
    with pytest.raises(ConfigError, match=r"no option 'num_replicas'; options of a deployment go to"):
        serve.run(Model.bind(), num_replicas=2)
    with pytest.raises(ConfigError, match="port"):
        serve.run(Model.bind(), port=-1)
    with pytest.raises(ConfigError, match="did you mean 'host'"):
        serve.start(hots="x")
    with pytest.raises(ConfigError, match="num_proxies="):
        serve.start(proxy_location="EveryNode")


def test_no_client():
    for function in (serve.status, serve.url, serve.get_app_handle):
        with pytest.raises(NotRunningError, match="there is no Dask client"):
            function()
    with pytest.raises(NotRunningError):
        serve.delete("x")
    with pytest.raises(NotRunningError):
        Model.get_handle()
    assert serve.shutdown() is None


def test_what_is_no_client():
    for function in (serve.url, serve.status, serve.shutdown):
        with pytest.raises(ConfigError, match="'front' is no Dask client"):
            function("front")


# -- with an asynchronous client ---------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_run(c: Client, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None)
    assert handle == DeploymentHandle("default", "Model", s.address)
    assert await handle.remote(3) == 3
    held = s.plugins["dask-serve"].registry.code
    ((revision, code),) = held.items()
    (replica,) = (await serve.status()).applications["default"].deployments["Model"].replicas
    assert replica.revision == revision
    # The scheduler holds the code without having opened it.
    assert type(code).__name__ in {"Serialized", "Serialize", "ToPickle"}
    # The same again, and with other options, needs no code: what was sent first stays.
    await serve.run(Model.bind(), route_prefix=None, client=c)
    await serve.run(Model.options(num_replicas=3).bind(), route_prefix=None, wait=False)
    held = s.plugins["dask-serve"].registry.code
    assert list(held) == [revision]
    assert held[revision] is code
    model = (await serve.status()).applications["default"].deployments["Model"]
    assert model.target == 3
    assert replica.id in {one.id for one in model.replicas}
    await until(lambda status: status.applications["default"].status == "running")


@gen_cluster(client=True)
async def test_async_with(c, s, a, b):
    async with serve.run(Model.bind(), "app", None) as handle:
        assert handle == DeploymentHandle("app", "Model", s.address)
        assert await handle.remote(3) == 3
        status = await serve.status()
        assert list(status.applications) == ["app"]
        # Nobody asked for HTTP.
        assert (status.proxies, status.url) == ([], "")
    assert not (await serve.status()).applications


@gen_cluster(client=True)
async def test_http_options(c, s, a, b):
    await serve.run(Web.bind(), host="localhost", port=0)
    url = await serve.url()
    assert url.startswith("http://localhost:")
    assert (await post(url, "12345")).text == "5"
    # What is not named stays, and what others may call it is understood.
    assert await serve.start(http_options={"body_limit": 4}, num_proxies=2) == url
    assert [proxy.state for proxy in (await serve.status()).proxies].count("ready") == 2
    assert (await post(url, "1234")).text == "4"
    assert (await post(url, "12345")).status_code == 413
    # A port that is refused leaves no application behind.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on localhost is in use"):
            await serve.run(Model.bind(), "other", "/other", port=port)
    assert list((await serve.status()).applications) == ["default"]
    assert await serve.url() == url
    assert (await post(url, "1234")).text == "4"


@gen_cluster(client=True)
async def test_failure(c, s, a, b):
    expected = (
        r"(?s)'default' could not be started.*Traceback.*self\.share = 1 / 0.*ZeroDivisionError: division by zero"
    )
    with pytest.raises(DeploymentFailedError, match=expected):
        await serve.run(Broken.bind(), route_prefix=None)
    assert (await serve.status()).applications["default"].status == "failed"


@gen_cluster(client=True)
async def test_deleted_before_it_has_started(c: Client, s, a, b):
    await serve.run(Model.bind(), route_prefix=None)
    await serve.delete("default")
    asked, answers = asyncio.Event(), []
    answer = s.handlers["serve_code"]
    replicas = s.plugins["dask-serve"].registry.replicas

    async def late(**options: Any) -> Any:
        """Answer when the controller has let go of it, and its worker has not heard of that."""
        asked.set()
        while replicas:
            await asyncio.sleep(0)
        answers.append(await answer(**options))
        return answers[-1]

    s.handlers["serve_code"] = late
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("dask_serve").addHandler(handler)
    try:
        await serve.run(Model.bind(), route_prefix=None, wait=False)
        await asked.wait()
        await serve.delete("default")
        await until(lambda status: answers and not a.state.actors and not b.state.actors)
        threads = {thread for thread in threading.enumerate() if thread.name.startswith("default/Model/")}
        await until(lambda status: not any(thread.is_alive() for thread in threads))
    finally:
        logging.getLogger("dask_serve").removeHandler(handler)
    assert [one["error"][0] for one in answers] == ["DeploymentUnavailableError"]
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_timeout(c, s, a):
    app = Model.options(resources={"GPU": 1}).bind()
    await serve.run(app, route_prefix=None, wait=False)
    await until(lambda status: "GPU" in status.applications["default"].message)
    with pytest.raises(StartTimeoutError, match=r"(?s)not running after 0.05 s.*no worker has resources GPU=1"):
        await serve.run(app, route_prefix=None, timeout="50 ms")
    # It stays deployed.
    async with Worker(s.address, nthreads=1, resources={"GPU": 1}, dashboard=False):
        await until(lambda status: status.applications["default"].status == "running")
        assert await (await serve.get_app_handle("default")).remote(3) == 3


@contextmanager
def lines() -> Iterator[list[str]]:
    """What a session without a terminal is told."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage()) if record.name == "dask_serve" else None
    logger = logging.getLogger("dask_serve")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_progress(c, s, a):
    with lines() as told:
        app = Model.options(resources={"GPU": 1}).bind()
        running = asyncio.ensure_future(_awaited(serve.run(app, port=0, timeout=20)))
        await until(lambda _: any("GPU" in line for line in told))
        async with Worker(s.address, nthreads=1, resources={"GPU": 1}, dashboard=False):
            await running
            url = await serve.url()
    *before, last = told
    assert last == f"application 'default' is running at {url}/"
    waits = "application 'default': Model 0/1 ready (1 of 1 replicas wait for a worker: no worker has resources GPU=1"
    assert any(line.startswith(waits) for line in before)
    shape = re.compile(r"application 'default': Model 0/1 ready(, 1 starting)?( \(.+\))?")
    assert all(shape.fullmatch(line) for line in before), before
    assert all(one != other for one, other in itertools.pairwise(told))


async def _awaited(running):
    return await running


@gen_cluster(client=True)
async def test_errors_of_the_controller(c, s, a, b):
    await serve.run(Web.bind(), "one", port=0)
    with pytest.raises(ConfigError, match=r"'one' and 'two' cannot both have route_prefix='/'"):
        await serve.run(Web.bind(), "two")
    with pytest.raises(ApplicationNotFoundError, match="there is no application 'three'; applications: 'one'"):
        await serve.delete("three")
    await serve.delete("one")
    assert not (await serve.status()).applications


@gen_cluster(client=True)
async def test_status_and_url(c, s, a, b):
    assert (await serve.status()).message == "dask_serve does not run on this cluster"
    with pytest.raises(NotRunningError, match="does not run on the cluster at tcp://"):
        await serve.url()
    with pytest.raises(NotRunningError):
        await serve.delete("x")
    await serve.shutdown()
    await serve.run(Model.bind(), "python only", None)
    with pytest.raises(NotRunningError, match=r"serve\.start\(\)"):
        await serve.url()
    await serve.run(Web.bind())
    status = await serve.status()
    assert {name: one.status for name, one in status.applications.items()} == {
        "default": "running",
        "python only": "running",
    }
    url = await serve.url()
    assert url == status.url
    assert (await post(url, "123")).text == "3"
    await serve.shutdown()
    status = await serve.status()
    assert (status.applications, status.proxies, status.url) == ({}, [], "")
    assert s.status.name == "running"


@gen_cluster(client=True)
async def test_handles(c, s, a, b):
    child = Model.options(name="child").bind()
    await serve.run(Parent.bind(child), "one", None)
    await serve.run(Model.bind(), "two", None)
    handle = await serve.get_app_handle("one")
    assert handle == DeploymentHandle("one", "Parent", s.address)
    assert await handle.remote(3) == ("from the child", 3)
    handle = await serve.get_deployment_handle("child")
    assert handle == DeploymentHandle("one", "child", s.address)
    assert await handle.remote(4) == 4
    handle = await Model.get_handle(sync=False)
    assert handle == DeploymentHandle("two", "Model", s.address, sync=False)
    assert await (await handle.remote(5)) == 5
    with pytest.raises(ApplicationNotFoundError, match="no application 'x'; there are: one, two"):
        await serve.get_app_handle("x")
    with pytest.raises(ApplicationNotFoundError, match="no deployment 'Model' in application 'one'"):
        await Model.get_handle(app_name="one")
    await serve.run(Model.bind(), "three", None)
    with pytest.raises(ApplicationNotFoundError, match=r"several.*three/Model, two/Model.*app_name="):
        await Model.get_handle()
    handle = await Model.get_handle(app_name="three")
    assert handle.app_name == "three"
    assert await handle.remote(6) == 6


@gen_cluster(client=True)
async def test_inside_a_task(c, s, a, b):
    await serve.run(Model.bind(), route_prefix=None)
    app = Model.bind()

    def deploys():
        with pytest.raises(ServeError, match="does not work inside a replica or a Dask task"):
            serve.run(app)
        return serve.get_app_handle("default"), serve.get_deployment_handle("Model").remote(3).result(10)

    assert await c.submit(deploys) == (DeploymentHandle("default", "Model", s.address), 3)


@gen_cluster(client=True)
async def test_inside_a_replica(c, s, a, b):
    await serve.run(Model.bind(), "one", None)
    inside = serve.deployment(Inside).options(name="Model")
    handle = await serve.run(inside.bind(), "two", None)
    # Of two deployments of that name, the one in the replica's own application.
    assert await handle.look.remote() == (
        DeploymentHandle("one", "Model", s.address),
        DeploymentHandle("two", "Model", s.address),
    )


NO_PLUGINS = {"distributed.scheduler.blocked-handlers": ["register_scheduler_plugin"]}


@gen_cluster(client=True, nthreads=[], config=NO_PLUGINS)
async def test_scheduler_that_accepts_no_plugins(c, s):
    with pytest.raises(NotRunningError, match="--preload dask_serve"):
        await serve.run(Model.bind())


@gen_cluster(
    client=True,
    config=NO_PLUGINS,
    scheduler_kwargs={"preload": ["dask_serve.preload"], "preload_argv": ["--no-serve-http"]},
)
async def test_scheduler_that_accepts_no_plugins_and_preloads(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None)
    assert await handle.remote(3) == 3


# -- with a synchronous client -----------------------------------------------------------------------------------------


def test_synchronous(loop):
    with cluster(nworkers=1) as (scheduler, _), Client(scheduler["address"], loop=loop) as client:
        url = serve.start(port=0)
        with serve.run(Web.bind(), "app") as handle:
            assert handle == DeploymentHandle("app", "Web", scheduler["address"])
            assert serve.status().applications["app"].status == "running"
            assert serve.get_app_handle("app") == handle
            assert serve.url() == url
            assert httpx.post(url, content="123", timeout=10).text == "3"
            with serve.run(Model.bind(), "other", None) as other:
                assert other.remote(3).result(timeout=10) == 3
            assert list(serve.status().applications) == ["app"]
        assert not serve.status().applications
        serve.shutdown()
        # It was not started here, so it goes on.
        assert client.scheduler_info()["address"] == scheduler["address"]


def test_scheduler_address(loop):
    """Without a client, Dask's configuration says where to go; the client made for it ends with shutdown()."""
    with cluster(nworkers=1) as (scheduler, _), dask.config.set({"scheduler-address": scheduler["address"]}):
        with Client(scheduler["address"], loop=loop, set_as_default=False) as client:
            handle = serve.run(Model.bind(), "app", None)
            made = current_client()
            assert made.scheduler.address == scheduler["address"]
            assert handle.remote(3).result(timeout=10) == 3
            assert list(serve.status(client=client).applications) == ["app"]
            serve.shutdown()
            assert made.status == "closed"
            assert current_client() is None
            assert not serve.status(client=client).applications


def test_scheduler_without_the_package(loop):
    hide = "import sys\nsys.modules['dask_serve'] = None\n"
    with cluster(nworkers=0, scheduler_kwargs={"preload": [hide]}) as (scheduler, _):
        with Client(scheduler["address"], loop=loop):
            with pytest.raises(NotRunningError, match=r"(?s)tcp://.*cannot import dask_serve.*pip install dask-serve"):
                serve.run(Model.bind())


# -- without any client: the embedded cluster --------------------------------------------------------------------------

SCRIPT = """
import urllib.request
import helper
import dask_serve as serve

@serve.deployment
class Model:
    def __init__(self, offset):
        self.offset = offset

    def predict(self, x):
        return helper.double(x) + self.offset, serve.get_replica_context().app_name

    def __call__(self, request):
        return "over HTTP"

with serve.run(Model.bind(1), port=0, timeout=60) as handle:
    print(handle.predict.remote(3).result(timeout=20))
    print(urllib.request.urlopen(serve.url(), timeout=20).read().decode())
try:
    serve.status()
except serve.NotRunningError:
    print("ended")
"""


def test_embedded(tmp_path):
    """A script without a guard, in a directory that workers do not import from."""
    (tmp_path / "helper.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(serve.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout.splitlines() == ["(7, 'default')", "over HTTP", "ended"], done.stderr
    assert done.returncode == 0
