"""What a session does, against a stand-in for the controller; the whole is tested elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import msgspec
import pytest
from distributed import Client, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils_test import cluster, gen_cluster

import dask_serve as serve
from dask_serve import api
from dask_serve.config import HTTPOptions
from dask_serve.controller.status import (
    ApplicationStatus,
    DeploymentStatus,
    ReplicaStatus,
    ServeStatus,
    encode_status,
)
from dask_serve.exceptions import (
    ApplicationNotFoundError,
    ConfigError,
    DeploymentFailedError,
    NotRunningError,
    ServeError,
    StartTimeoutError,
)
from dask_serve.policy.desired import ApplicationSpec
from dask_serve.routing.table import DeploymentEntry, Table, encode_table
from dask_serve.session import peers as session


@serve.deployment
class Model:
    def __call__(self, x):
        return x


class FakeController:
    """Answers as the controller does, and keeps what it was told."""

    def __init__(self, scheduler: Scheduler, steps: list[str] | None = None, message: str = "") -> None:
        self.specs: dict[str, ApplicationSpec] = {}
        self.code: dict[str, Any] = {}
        self.sent: list[list[str]] = []
        self.started: list[tuple[HTTPOptions, list[str]]] = []
        self.steps = steps or ["running"]
        self.message = message
        self.version = 1
        scheduler.plugins["dask-serve"] = SchedulerPlugin()
        for name in dir(self):
            if name.startswith("serve_"):
                scheduler.handlers[name] = getattr(self, name)

    def _status(self) -> bytes:
        state = self.steps[0]
        counts = {"ready": 1} if state == "running" else {"starting": 1}
        replicas = [ReplicaStatus(id="x/Model/abc", state="starting", worker="tcp://w", revision="r")]
        applications = {
            name: ApplicationStatus(
                status=state,
                message=self.message,
                route_prefix=spec.route_prefix,
                ingress=spec.ingress,
                deployments={
                    one.name: DeploymentStatus(
                        status=state, message=self.message, target=1, counts=counts, replicas=replicas
                    )
                    for one in spec.deployments
                },
            )
            for name, spec in self.specs.items()
        }
        url = "http://127.0.0.1:8000" if self.started else ""
        return encode_status(ServeStatus(version=self.version, applications=applications, url=url))

    async def serve_status(self):
        return {"status": self._status()}

    async def serve_watch(self, since=0, timeout=30.0):
        if len(self.steps) > 1:
            self.steps.pop(0)
            self.version += 1
        else:
            await asyncio.sleep(timeout)
        return {"status": self._status()}

    async def serve_missing(self, revisions):
        return {"missing": [revision for revision in revisions if revision not in self.code]}

    async def serve_deploy(self, application, code):
        spec = msgspec.msgpack.decode(application, type=ApplicationSpec)
        for other in self.specs.values():
            if other.name != spec.name and other.route_prefix == spec.route_prefix:
                return {"error": ["ConfigError", f"route {spec.route_prefix} belongs to {other.name}"]}
        self.sent.append(sorted(code))
        self.code.update(code)
        self.specs[spec.name] = spec
        return {"known": sorted(self.code)}

    async def serve_start(self, options, explicit):
        given = msgspec.msgpack.decode(options, type=HTTPOptions)
        if given.port == 1:
            return {"error": ["ConfigError", "port 1 is busy"]}
        self.started.append((given, list(explicit)))
        return {"url": "http://127.0.0.1:8000"}

    async def serve_delete(self, app):
        if app not in self.specs:
            return {"error": ["ApplicationNotFoundError", f"there is no {app}"]}
        del self.specs[app]
        return {"deleted": True}

    async def serve_shutdown(self):
        self.specs.clear()
        return {}

    async def serve_table(self, epoch="", since=0, timeout=30.0):
        def entry(id: str) -> DeploymentEntry:
            return DeploymentEntry(id, [], 100, None, None, ["__call__"])

        names = [f"{app}/{one.name}" for app, spec in self.specs.items() for one in spec.deployments]
        table = Table(
            epoch="e",
            version=1,
            secret=b"",
            deployments={name: entry(name) for name in names},
            routes=[],
            applications={app: f"{app}/{spec.ingress}" for app, spec in self.specs.items()},
        )
        return {"table": encode_table(table)}


class FakeHandle:
    def __init__(self, app, deployment, address, on_exit=None, sync=True):
        self.app_name, self.deployment_name, self.address = app, deployment, address
        self.on_exit, self.sync = on_exit, sync

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.on_exit()


@pytest.fixture(autouse=True)
def handles(monkeypatch):
    def make(app, deployment, *, address, client=None, **options):
        return FakeHandle(app, deployment, address, **options)

    monkeypatch.setattr(api, "make_handle", make)
    monkeypatch.setattr(session, "make_handle", make)


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


# -- with an asynchronous client ---------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_run(c: Client, s, a, b):
    controller = FakeController(s, ["deploying", "running"])
    handle = await serve.run(Model.bind())
    assert (handle.app_name, handle.deployment_name, handle.address) == ("default", "Model", s.address)
    assert controller.started == [(HTTPOptions(), [])]
    spec = controller.specs["default"]
    (revision,) = controller.code
    assert spec.deployments[0].revision == revision
    # The scheduler holds the code without having opened it.
    assert type(controller.code[revision]).__name__ in {"Serialized", "Serialize", "ToPickle"}
    await serve.run(Model.bind(), client=c)
    assert controller.sent == [[revision], []]
    await serve.run(Model.options(num_replicas=3).bind(), wait=False)
    assert controller.sent[-1] == []
    assert controller.specs["default"].deployments[0].options.num_replicas == 3


@gen_cluster(client=True)
async def test_async_with(c, s, a, b):
    controller = FakeController(s)
    async with serve.run(Model.bind(), "app", None) as handle:
        assert handle.app_name == "app"
        assert list(controller.specs) == ["app"]
    assert not controller.specs
    assert not controller.started


@gen_cluster(client=True)
async def test_http_options(c, s, a, b):
    controller = FakeController(s)
    await serve.run(Model.bind(), host="0.0.0.0", port=0)
    assert controller.started.pop() == (HTTPOptions(host="0.0.0.0", port=0), ["host", "port"])
    assert await serve.start(http_options={"port": 9}, num_proxies=2) == "http://127.0.0.1:8000"
    assert controller.started.pop() == (HTTPOptions(port=9, num_proxies=2), ["num_proxies", "port"])
    # A port that is refused leaves no application behind.
    with pytest.raises(ConfigError, match="port 1 is busy"):
        await serve.run(Model.bind(), "other", "/other", port=1)
    assert list(controller.specs) == ["default"]


@gen_cluster(client=True)
async def test_failure(c, s, a, b):
    FakeController(s, ["deploying", "failed"], message="Traceback ...\nZeroDivisionError: division by zero")
    with pytest.raises(DeploymentFailedError, match=r"(?s)'default' could not be started.*ZeroDivisionError"):
        await serve.run(Model.bind())


@gen_cluster(client=True)
async def test_timeout(c, s, a, b):
    FakeController(s, ["deploying"], message="no worker has GPU=1")
    with pytest.raises(StartTimeoutError, match=r"(?s)not running after 0.05 s.*no worker has GPU=1"):
        await serve.run(Model.bind(), timeout="50 ms")


@gen_cluster(client=True)
async def test_progress(c, s, a, b):
    FakeController(s, ["deploying", "deploying", "running"], message="waits for a worker")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("dask_serve")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel("INFO")
    try:
        await serve.run(Model.bind())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert records == [
        "application 'default': Model 0/1 ready, 1 starting (waits for a worker)",
        "application 'default' is running at http://127.0.0.1:8000/",
    ]


@gen_cluster(client=True)
async def test_errors_of_the_controller(c, s, a, b):
    FakeController(s)
    await serve.run(Model.bind(), "one")
    with pytest.raises(ConfigError, match="route / belongs to one"):
        await serve.run(Model.bind(), "two")
    with pytest.raises(ApplicationNotFoundError, match="there is no three"):
        await serve.delete("three")
    await serve.delete("one")


@gen_cluster(client=True)
async def test_status_and_url(c, s, a, b):
    assert (await serve.status()).message == "dask_serve does not run on this cluster"
    with pytest.raises(NotRunningError, match="does not run on the cluster at tcp://"):
        await serve.url()
    with pytest.raises(NotRunningError):
        await serve.delete("x")
    await serve.shutdown()
    FakeController(s)
    with pytest.raises(NotRunningError, match=r"serve\.start\(\)"):
        await serve.url()
    await serve.run(Model.bind())
    assert (await serve.status()).applications["default"].status == "running"
    assert await serve.url() == "http://127.0.0.1:8000"
    await serve.shutdown()
    assert not (await serve.status()).applications
    assert s.status.name == "running"


@gen_cluster(client=True)
async def test_handles(c, s, a, b):
    FakeController(s)
    child = Model.options(name="child").bind()
    parent = serve.deployment(type("Parent", (), {"__init__": lambda self, child: None}))
    await serve.run(parent.bind(child), "one", "/1")
    await serve.run(Model.bind(), "two", "/2")
    handle = await serve.get_app_handle("one")
    assert (handle.app_name, handle.deployment_name, handle.address) == ("one", "Parent", s.address)
    handle = await serve.get_deployment_handle("child")
    assert (handle.app_name, handle.deployment_name) == ("one", "child")
    assert (await Model.get_handle(sync=False)).sync is False
    with pytest.raises(ApplicationNotFoundError, match="no application 'x'; there are: one, two"):
        await serve.get_app_handle("x")
    with pytest.raises(ApplicationNotFoundError, match="no deployment 'Model' in application 'one'"):
        await Model.get_handle(app_name="one")
    await serve.run(Model.bind(), "three", "/3")
    with pytest.raises(ApplicationNotFoundError, match=r"several.*three/Model, two/Model.*app_name="):
        await Model.get_handle()
    assert (await Model.get_handle(app_name="three")).app_name == "three"


@gen_cluster(client=True)
async def test_inside_a_task(c, s, a, b):
    FakeController(s)
    await serve.run(Model.bind())
    app = Model.bind()

    def deploys():
        with pytest.raises(ServeError, match="does not work inside a replica or a Dask task"):
            serve.run(app)
        return serve.get_app_handle("default").address, serve.get_deployment_handle("Model").app_name

    assert await c.submit(deploys) == (s.address, "default")


@gen_cluster(client=True)
async def test_scheduler_without_the_package(c, s, a, b):
    async def register(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'dask_serve'")

    s.handlers["register_scheduler_plugin"] = register
    with pytest.raises(NotRunningError, match=r"(?s)tcp://.*cannot import dask_serve.*pip install dask-serve"):
        await serve.run(Model.bind())


@gen_cluster(client=True)
async def test_scheduler_that_accepts_no_plugins(c, s, a, b):
    s.blocked_handlers = ["register_scheduler_plugin"]
    with pytest.raises(NotRunningError, match="--preload dask_serve"):
        await serve.run(Model.bind())
    FakeController(s)
    await serve.run(Model.bind())


# -- with a synchronous client -----------------------------------------------------------------------------------------


def install(dask_scheduler: Scheduler) -> None:
    dask_scheduler.fake = FakeController(dask_scheduler)


def applications(dask_scheduler: Scheduler) -> list[str]:
    return sorted(dask_scheduler.fake.specs)


def test_synchronous(loop):
    with cluster(nworkers=1) as (scheduler, _), Client(scheduler["address"], loop=loop) as client:
        client.run_on_scheduler(install)
        with serve.run(Model.bind(), "app") as handle:
            assert handle.address == scheduler["address"]
            assert client.run_on_scheduler(applications) == ["app"]
            assert serve.get_app_handle("app").deployment_name == "Model"
        assert client.run_on_scheduler(applications) == []
        serve.shutdown()
        # It was not started here, so it goes on.
        assert client.scheduler_info()["address"] == scheduler["address"]


def test_scheduler_address(loop):
    """Without a client, Dask's configuration says where to go; the client made for it ends with shutdown()."""
    with cluster(nworkers=1) as (scheduler, _), dask.config.set({"scheduler-address": scheduler["address"]}):
        with Client(scheduler["address"], loop=loop, set_as_default=False) as client:
            client.run_on_scheduler(install)
            serve.run(Model.bind(), "app")
            made = session.current_client()
            assert made.scheduler.address == scheduler["address"]
            assert client.run_on_scheduler(applications) == ["app"]
            serve.shutdown()
            assert made.status == "closed"
            assert session.current_client() is None
            assert client.run_on_scheduler(applications) == []


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
