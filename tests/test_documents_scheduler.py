"""Documents and REST in the scheduler: what it starts with, who may change what, and what goes wrong."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import dask
import httpx
import pytest
from distributed import Client, LocalCluster
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve
from dask_serve.config import HTTPOptions
from dask_serve.controller.applying import apply
from dask_serve.controller.boot import Boot, BootDocument
from dask_serve.controller.child import Deployer, Task
from dask_serve.controller.plugin import Controller
from dask_serve.exceptions import ConfigError, ServeError, StartTimeoutError
from dask_serve.policy.desired import Source
from dask_serve.shipping.graph import Built, build

MODULE = """
import dask_serve as serve

@serve.deployment
def hello(request):
    return "hello"

app = hello.bind()
"""

DOCUMENT = "version: 1\napplications:\n- {name: NAME, import_path: 'started_module:app', route_prefix: null}\n"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the scheduler with a module in it."""
    (tmp_path / "started_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@serve.deployment
class Model:
    def __call__(self, x: Any = None) -> str:
        return "model"


def application(name: str, route: str | None = None, **options: Any) -> Built:
    return build(Model.options(**options).bind(), name, route, source=Source(import_path="m:app"))


def controller_of(scheduler: Any) -> Any:
    return scheduler.plugins[Controller.name]


async def get(scheduler: Any, path: str, **options: Any) -> httpx.Response:
    return await ask(scheduler, "GET", path, **options)


async def ask(scheduler: Any, method: str, path: str, **options: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{scheduler.http_server.port}{path}"
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as client:
        return await client.request(method, url, **options)


# -- one change --------------------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_several_applications_are_one_change(c, s, a):
    made = await apply(c, [application("one"), application("two")], (HTTPOptions(), []))
    assert made.versions == {"one": 1, "two": 1}
    again = await apply(c, [application("one"), application("two")], (HTTPOptions(), []))
    assert again.versions == again.before == {"one": 1, "two": 1}
    both = [application("one", "/x", threads=2), application("three", "/x")]
    with pytest.raises(ConfigError, match="cannot both have route_prefix='/x'"):
        await apply(c, both, (HTTPOptions(), []))
    assert set(controller_of(s).registry.applications) == {"one", "two"}
    pruned = await apply(c, [application("three")], (HTTPOptions(), []), prune=True)
    assert pruned.deleted == ["one", "two"]
    await until(lambda: set(controller_of(s).registry.applications) == {"three"})


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_a_change_that_cannot_be_saved_is_not_made(c, s, a, tmp_path):
    with dask.config.set({"serve.state-file": str(tmp_path / "state.sqlite")}):
        await apply(c, [application("one")], (HTTPOptions(), []))
    controller = controller_of(s)
    before = dict(controller.registry.applications)

    def broken(*_: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    controller.editor.store._save = broken
    with pytest.raises(ServeError, match="disk I/O error"):
        await apply(c, [application("one", threads=2), application("two")], (HTTPOptions(), []), prune=True)
    del controller.editor.store._save
    assert dict(controller.registry.applications) == before
    assert [entry.version for entry in controller.registry.history.of("one")] == [1]
    assert not controller.registry.history.of("two")


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_proxies_go_back_where_the_applications_cannot_be(c, s, a):
    url = await serve.start(port=0, client=c)
    controller = controller_of(s)
    before = controller.front.options
    await apply(c, [application("one", "/x")], (HTTPOptions(), []))

    async def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("not this time")

    controller.editor.deploy_all = refuse
    with pytest.raises(ConfigError, match="not this time"):
        await apply(c, [application("two", "/y")], (HTTPOptions(body_limit=5), ["body_limit"]))
    assert controller.front.options == before
    assert controller.front.url == url


# -- Dask's configuration ----------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_proxies_start_as_configured_and_are_not_changed_by_it(c, s, a):
    with dask.config.set({"serve.http.port": 0, "serve.http.body-limit": 1000}):
        url = await serve.start(body_limit=2000, client=c)
    assert not url.endswith(":8000")
    front = controller_of(s).front
    assert (front.options.port, front.options.body_limit) == (0, 2000)
    with dask.config.set({"serve.http.body-limit": 1}):
        assert await serve.start(client=c) == url
    assert front.options.body_limit == 2000
    await serve.shutdown(client=c)
    with dask.config.set({"serve.http.port": 0, "serve.http.body-limit": 1000}):
        await apply(c, [application("one", "/")], (HTTPOptions(max_headers=7), ["max_headers"]))
    assert (front.options.port, front.options.body_limit, front.options.max_headers) == (0, 1000, 7)


# -- the document that a scheduler starts with -------------------------------------------------------------------------


def boot(path: str) -> Any:
    return gen_cluster(
        client=True,
        nthreads=[("127.0.0.1", 1)],
        timeout=60,
        scheduler_kwargs={
            "preload": ["dask_serve.preload"],
            "preload_argv": ["--no-serve-http", "--serve-config", path, "--serve-state", "none"],
        },
    )


def test_a_document_is_deployed_at_the_start(modules: Path):
    (modules / "good.yaml").write_text(DOCUMENT)

    @boot("good.yaml")
    async def started(c, s, a):
        controller = controller_of(s)
        await until(lambda: "NAME" in controller.registry.applications, timeout=30)
        assert controller.registry.applications["NAME"].spec.source.import_path == "started_module:app"
        assert controller.boot.message == ""

    started()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing.yaml was not deployed: it cannot be read"),
        ("version: 1\nhtpp: {}", "did you mean 'http'"),
        (DOCUMENT.replace("started_module", "no_such_module"), "there is no module 'no_such_module'"),
    ],
)
def test_a_document_with_mistakes_is_told_and_the_scheduler_runs(modules: Path, text: str | None, message: str, caplog):
    name = "missing.yaml" if text is None else "bad.yaml"
    if text is not None:
        (modules / name).write_text(text)

    @boot(name)
    async def started(c, s, a):
        async def told() -> bool:
            return message in (await serve.status(client=c)).message

        await until(told, timeout=30)
        assert (await serve.status(client=c)).applications == {}

    with caplog.at_level(logging.ERROR, "dask_serve.controller"):
        started()
    assert message in caplog.text


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_what_was_deployed_after_the_document_stays(c, s, a, modules):
    await apply(c, [application("old")], (HTTPOptions(), []))
    old = controller_of(s).registry.applications["old"].spec
    text = DOCUMENT.replace("NAME", "old") + "- {name: new, import_path: 'started_module:app', route_prefix: null}\n"
    for when, stays in ((time.time() - 100, True), (time.time() + 100, False)):
        document = BootDocument(path="start.yaml", text=text, time=when)
        boot = Boot(document, controller_of(s).deployer, lambda: None)
        await boot.run()
        assert boot.message == ""
        assert (controller_of(s).registry.applications["old"].spec == old) is stays
        assert "new" in controller_of(s).registry.applications


# -- the child ---------------------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[])
async def test_a_child_that_takes_too_long_or_dies(c, s):
    deployer = Deployer(s)
    with pytest.raises(StartTimeoutError, match=r"was not deployed within 0\.05 s"):
        await deployer.run(Task(document="version: 1", name="slow"), 0.05)

    running = asyncio.ensure_future(deployer.run(Task(document="version: 1", name="dying"), 30))
    await until(lambda: deployer._children)
    deployer.close()
    with pytest.raises(ServeError, match="ended with exit code -9"):
        await running


def test_a_child_has_the_certificates_of_the_scheduler(modules: Path):
    # A scheduler of this process, with certificates that are in its memory only.
    options = {"processes": False, "security": True, "dashboard_address": "127.0.0.1:0", "protocol": "tls://"}
    with LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster, Client(cluster) as client:
        assert serve.status(client=client).applications == {}
        client.sync(apply, client, [application("one")], (HTTPOptions(), []))
        task = Task(document=DOCUMENT, name="the document")

        async def deploy() -> Any:
            return await controller_of(cluster.scheduler).deployer.run(task, 60)

        outcome = cluster.sync(deploy)
        assert (outcome.message, outcome.versions) == ("", {"NAME": 1})


# -- REST --------------------------------------------------------------------------------------------------------------


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], config={"serve.rest.writes": False})
async def test_rest_is_read_only_unless_enabled(c, s, a):
    assert (await get(s, "/api/serve/v1/applications")).status_code == 404
    await apply(c, [application("one")], (HTTPOptions(), []))
    found = (await get(s, "/api/serve/v1/applications")).json()
    assert found["applications"]["one"]["status"] == "running"
    assert (await get(s, "/api/serve/v1/applications/one")).json()["ingress"] == "Model"
    assert (await get(s, "/api/serve/v1/applications/two")).status_code == 404
    for method, path in (("PUT", ""), ("DELETE", "/one")):
        answer = await ask(s, method, f"/api/serve/v1/applications{path}", content=b"version: 1")
        assert answer.status_code == 403
        assert "serve.rest.writes" in answer.json()["message"]
    assert (await ask(s, "POST", "/api/serve/v1/applications")).status_code in (403, 405)
    # Dask's own routes are still there.
    assert (await get(s, "/health")).text == "ok"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serve.rest.writes": True}, "serve.rest.writes needs serve.rest.tokens-file"),
        ({"serve.rest.writes": True, "serve.rest.tokens-file": "/nowhere/tokens"}, "cannot read /nowhere/tokens"),
        ({"serve.rest.wirtes": True}, "did you mean 'writes'"),
        ({"serve.rest.timeout": "soon"}, "is no time"),
    ],
)
def test_rest_stays_closed_where_it_is_not_configured_well(settings: dict[str, Any], message: str, caplog):
    @gen_cluster(client=True, nthreads=[], config=settings)
    async def started(c, s):
        await c.register_plugin(Controller())
        answer = await ask(s, "PUT", "/api/serve/v1/applications", content=b"version: 1")
        assert answer.status_code == 403
        assert "the scheduler's log says why" in answer.json()["message"]
        assert "tokens" not in answer.text

    with caplog.at_level(logging.ERROR, "dask_serve.controller"):
        started()
    assert message in caplog.text


@gen_cluster(client=True, nthreads=[], scheduler_kwargs={"http_prefix": "/behind", "dashboard": False})
async def test_routes_are_below_the_prefix_of_the_dashboard(c, s):
    await c.register_plugin(Controller())
    assert (await get(s, "/behind/api/serve/v1/applications")).json()["applications"] == {}
    assert "/behind/api/serve/v1/applications" in (await get(s, "/behind/api/serve/v1/openapi.json")).json()["paths"]
