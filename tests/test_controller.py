"""The controller with in-process clusters, and with replicas that do as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from distributed import Client, Nanny, get_worker
from distributed.core import Status
from distributed.protocol import to_serialize
from distributed.utils_test import gen_cluster, inc, slowinc
from helpers import until

from dask_serve.config import DeploymentOptions, HTTPOptions
from dask_serve.controller import actors
from dask_serve.controller.plugin import Controller
from dask_serve.controller.status import ServeStatus, decode_status
from dask_serve.exceptions import ServeError
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.routing.table import Table, decode_table

ONE = [("127.0.0.1", 1)]
TWO = [("127.0.0.1", 1)] * 2


class FakeReplica:
    """Stands for the actor: what its code says, it does."""

    #: By revision: what has been called.
    calls: dict[str, list[Any]] = defaultdict(list)
    #: By revision: set it to let drains end.
    gates: dict[str, asyncio.Event] = {}

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.worker = get_worker()
        self.worker.loop.add_callback(self.begin)

    async def begin(self) -> None:
        scheduler = self.worker.scheduler
        answer = await scheduler.serve_code(revision=self.spec["revision"])
        if "error" in answer:
            return
        code = answer["code"]
        FakeReplica.calls[self.spec["revision"]].append((code, len(answer["secret"])))
        if code.startswith(b"fail"):
            error = "Traceback (most recent call last):\nValueError: " + code.decode()
            await scheduler.serve_report(replica=self.spec["id"], event="failed", error=error)
        elif not code.startswith(b"silent"):
            await scheduler.serve_report(
                replica=self.spec["id"], event="ready", door="tcp://127.0.0.1:1", process="p-" + self.worker.id
            )

    async def drain(self, timeout: float) -> None:
        FakeReplica.calls["drain"].append(self.spec["id"])
        if gate := FakeReplica.gates.get(self.spec["revision"]):
            await gate.wait()

    async def reconfigure(self, options: bytes) -> None:
        changed = msgspec.msgpack.decode(options, type=DeploymentOptions)
        if changed.user_config == "bad":
            raise ServeError("ValueError: cannot take 'bad'")
        if gate := FakeReplica.gates.get(str(changed.user_config)):
            await gate.wait()
        FakeReplica.calls["reconfigure"].append(changed.max_ongoing_requests)
        FakeReplica.calls["user_config"].append(changed.user_config)


class BrokenActor:
    def __init__(self, spec: dict[str, Any]) -> None:
        raise ModuleNotFoundError("No module named 'dask_serve'")


@pytest.fixture(autouse=True)
def fake_replicas(monkeypatch):
    monkeypatch.setattr(actors, "replica_class", lambda: FakeReplica)
    FakeReplica.calls.clear()
    FakeReplica.gates.clear()


def spec(
    revision: str = "r1", app: str = "app", route: str | None = None, keys: list[str] | None = None, **options: Any
) -> ApplicationSpec:
    deployment = DeploymentSpec(
        name="d",
        revision=revision,
        options=msgspec.convert(options, DeploymentOptions),
        methods=["__call__"],
        keys=keys or [],
    )
    return ApplicationSpec(name=app, route_prefix=route, ingress="d", deployments=[deployment])


class Service:
    """The operations, as a session calls them."""

    def __init__(self, client: Client) -> None:
        self.rpc = client.scheduler

    async def deploy(self, application: ApplicationSpec, code: bytes = b"ok") -> dict[str, Any]:
        return await self.rpc.serve_deploy(
            application=msgspec.msgpack.encode(application),
            code={d.revision: to_serialize(code) for d in application.deployments},
        )

    async def missing(self, revisions: list[str]) -> list[str]:
        return list((await self.rpc.serve_missing(revisions=revisions))["missing"])

    async def table(self) -> Table:
        return decode_table((await self.rpc.serve_table(timeout=0))["table"])

    async def status(self) -> ServeStatus:
        return decode_status((await self.rpc.serve_status())["status"])

    async def until(self, met: Callable[[ServeStatus], bool], timeout: float = 10) -> ServeStatus:
        status = await self.status()
        deadline = asyncio.get_running_loop().time() + timeout
        while not met(status):
            left = deadline - asyncio.get_running_loop().time()
            assert left > 0, f"still\n{status}"
            answer = await self.rpc.serve_watch(since=status.version, timeout=left)
            status = decode_status(answer["status"])
        return status

    async def running(self, app: str = "app") -> ServeStatus:
        return await self.until(lambda s: s.applications[app].status == "running")


def replicas(status: ServeStatus, app: str = "app", state: str | None = None) -> list[Any]:
    found = status.applications[app].deployments["d"].replicas
    # What they use of memory is measured anew with each heartbeat.
    return [msgspec.structs.replace(replica, memory=0) for replica in found if state in (None, replica.state)]


async def service(client: Client) -> Service:
    await client.register_plugin(Controller())
    return Service(client)


# -- applications


@gen_cluster(client=True, nthreads=TWO)
async def test_deploy(c, s, a, b):
    serve = await service(c)
    assert await serve.missing(["r1"]) == ["r1"]
    assert await serve.deploy(spec(num_replicas=2), b"ok code") == {"version": 1}
    assert await serve.missing(["r1"]) == []
    status = await serve.running()
    assert {r.worker for r in replicas(status)} == {a.address, b.address}
    table = await serve.table()
    entry = table.deployments["app/d"]
    assert sorted(r.id for r in entry.replicas) == sorted(r.id for r in replicas(status))
    assert {r.process for r in entry.replicas} == {"p-" + a.id, "p-" + b.id}
    assert table.applications == {"app": "app/d"}
    assert table.routes == []
    assert FakeReplica.calls["r1"] == [(b"ok code", 32)] * 2
    assert len(table.secret) == 32
    assert "app: running" in str(status)
    assert "2 ready of 2 wanted" in str(status)


@gen_cluster(client=True, nthreads=TWO)
async def test_the_same_again_changes_nothing(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    before = await serve.table()
    await serve.deploy(spec(num_replicas=2))
    assert (await serve.status()).applications["app"].status == "running"
    await serve.deploy(spec(app="other"))
    await serve.running("other")
    after = await serve.table()
    assert after.deployments["app/d"] == before.deployments["app/d"]
    assert after.version > before.version


@gen_cluster(client=True, nthreads=TWO)
async def test_controller_is_registered_once(c, s, a, b):
    serve = await service(c)
    epoch = (await serve.table()).epoch
    await c.register_plugin(Controller())
    assert (await serve.table()).epoch == epoch


@gen_cluster(client=True, nthreads=TWO)
async def test_replicas_outlive_the_session(c, s, a, b):
    async with Client(s.address, asynchronous=True) as other:
        serve = await service(other)
        await serve.deploy(spec())
        before = await serve.running()
    after = await Service(c).status()
    assert replicas(after) == replicas(before)
    assert sum(len(ws.actors) for ws in s.workers.values()) == 1


@gen_cluster(client=True, nthreads=TWO)
async def test_scale_up_and_down(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=1))
    first = replicas(await serve.running())
    await serve.deploy(spec(num_replicas=4))
    status = await serve.running()
    assert len(replicas(status)) == 4
    assert first[0] in replicas(status)
    await serve.deploy(spec(num_replicas=2))
    status = await serve.until(lambda s: len(replicas(s)) == 2)
    assert first[0] in replicas(status)
    while sum(len(ws.actors) for ws in s.workers.values()) != 2:
        await asyncio.sleep(0.01)


@gen_cluster(client=True, nthreads=TWO)
async def test_options_change_in_place(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    before = replicas(await serve.running())
    await serve.deploy(spec(num_replicas=2, max_ongoing_requests=7))
    while FakeReplica.calls["reconfigure"] != [7, 7]:
        await asyncio.sleep(0.01)
    assert replicas(await serve.running()) == before
    assert (await serve.table()).deployments["app/d"].max_ongoing_requests == 7


@gen_cluster(client=True, nthreads=TWO)
async def test_a_user_config_that_raises_is_taken_back(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2, user_config="good"))
    before = replicas(await serve.running())
    await serve.deploy(spec(num_replicas=2, user_config="bad"))
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert "cannot take 'bad'" in status.applications["app"].message
    # Whoever had taken it over, and whoever raised, gets the one before again.
    while FakeReplica.calls["user_config"] != ["good", "good"]:
        await asyncio.sleep(0.01)
    assert {r.id for r in replicas(await serve.status())} == {r.id for r in before}
    await serve.deploy(spec(num_replicas=2, user_config="better"))
    assert {r.id for r in replicas(await serve.running())} == {r.id for r in before}
    assert FakeReplica.calls["user_config"][2:] == ["better", "better"]


@gen_cluster(client=True, nthreads=ONE)
async def test_a_user_config_is_waited_for_and_the_last_one_holds(c, s, a):
    serve = await service(c)
    await serve.deploy(spec(user_config="first"))
    await serve.running()
    FakeReplica.gates["slow"] = gate = asyncio.Event()
    await serve.deploy(spec(user_config="slow"))
    status = await serve.until(lambda s: "it takes over changed options" in s.applications["app"].message)
    # It may be told before the replica hears of it.
    await until(lambda: gate._waiters)
    assert status.applications["app"].status == "deploying"
    for config in ("skipped", "last"):
        await serve.deploy(spec(user_config=config))
    gate.set()
    await serve.running()
    assert FakeReplica.calls["user_config"] == ["slow", "last"]


@gen_cluster(client=True, nthreads=ONE)
async def test_a_replica_that_takes_no_user_config_is_replaced_where_nothing_is_to_be_gone_back_to(c, s, a):
    serve = await service(c)
    await serve.deploy(spec(user_config="first"))
    [before] = replicas(await serve.running())
    application = s.plugins["dask-serve"].registry.applications["app"]
    found = s.plugins["dask-serve"].reconciler
    found._not_reconfigured(found.registry.replicas[before.id], "ValueError: no")
    assert application.before is None
    status = await serve.until(lambda s: [r.id for r in replicas(s)] not in ([before.id], []))
    assert "could not be reconfigured" in status.applications["app"].deployments["d"].setback


@gen_cluster(client=True, nthreads=TWO)
async def test_rolling_update(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    FakeReplica.gates["r1"] = asyncio.Event()
    await serve.deploy(spec("r2", num_replicas=2))
    version, seen = 0, []
    while True:
        answer = await serve.rpc.serve_table(epoch=(await serve.table()).epoch, since=version, timeout=5)
        table = decode_table(answer["table"])
        version = table.version
        seen.append(len(table.deployments["app/d"].replicas))
        status = await serve.status()
        if len(replicas(status, state="draining")) == 2:
            break
    assert min(seen) == 2
    # Those that drain are out of the table, and count for nothing.
    assert status.applications["app"].status == "running"
    table = await serve.table()
    assert {r.id for r in table.deployments["app/d"].replicas} == {r.id for r in replicas(status, state="ready")}
    assert await serve.missing(["r1", "r2"]) == []
    FakeReplica.gates["r1"].set()
    status = await serve.until(lambda s: len(replicas(s)) == 2)
    assert {r.revision for r in replicas(status)} == {"r2"}
    # The code of earlier versions is kept for rolling back.
    assert await serve.missing(["r1", "r2", "r3"]) == ["r3"]


@gen_cluster(client=True, nthreads=TWO)
async def test_delete_drains(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    FakeReplica.gates["r1"] = asyncio.Event()
    deleting = asyncio.ensure_future(serve.rpc.serve_delete(app="app"))
    await serve.until(lambda s: s.applications["app"].status == "deleting")
    assert (await serve.table()).deployments == {}
    assert (await serve.table()).applications == {}
    await serve.until(lambda s: len(replicas(s, state="draining")) == 2)
    assert not deleting.done()
    FakeReplica.gates["r1"].set()
    assert await deleting == {"deleted": True}
    assert (await serve.status()).applications == {}
    assert await serve.missing(["r1"]) == ["r1"]
    while any(ws.actors for ws in s.workers.values()):
        await asyncio.sleep(0.01)


@gen_cluster(client=True, nthreads=TWO)
async def test_delete_does_not_wait_for_ever(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(graceful_shutdown_timeout_s=0))
    await serve.running()
    FakeReplica.gates["r1"] = asyncio.Event()
    assert await serve.rpc.serve_delete(app="app") == {"deleted": True}
    FakeReplica.gates["r1"].set()


@gen_cluster(client=True, nthreads=TWO)
async def test_deploy_again_while_deleting(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec())
    await serve.running()
    FakeReplica.gates["r1"] = asyncio.Event()
    deleting = asyncio.ensure_future(serve.rpc.serve_delete(app="app"))
    await serve.until(lambda s: s.applications["app"].status == "deleting")
    await serve.deploy(spec("r2"))
    await serve.running()
    FakeReplica.gates["r1"].set()
    assert await deleting == {"deleted": True}
    assert (await serve.running()).applications["app"].status == "running"


@gen_cluster(client=True, nthreads=TWO)
async def test_shutdown(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec())
    await serve.deploy(spec(app="two"))
    assert await serve.rpc.serve_shutdown() == {}
    assert (await serve.status()).applications == {}
    await serve.deploy(spec())
    await serve.running()


@gen_cluster(client=True, nthreads=ONE)
async def test_errors_are_data(c, s, a):
    serve = await service(c)
    await serve.deploy(spec())
    assert (await serve.rpc.serve_delete(app="x"))["error"] == (
        "ApplicationNotFoundError",
        "there is no application 'x'; applications: 'app'",
    )
    kind, message = (await serve.deploy(spec(app="b", route="x")))["error"]
    assert kind == "ConfigError"
    assert "must start with '/'" in message
    answer = await serve.rpc.serve_deploy(application=msgspec.msgpack.encode(spec("r9")), code={})
    assert answer == {"missing": ("r9",)}
    assert (await serve.rpc.serve_code(revision="r9"))["error"][0] == "DeploymentUnavailableError"
    assert list((await serve.status()).applications) == ["app"]


@gen_cluster(client=True, nthreads=ONE)
async def test_one_route_for_one_application(c, s, a):
    serve = await service(c)
    s.plugins["dask-serve"].front.url = "http://nowhere"  # as if proxies were running
    await serve.deploy(spec(app="one", route="/x"))
    kind, message = (await serve.deploy(spec(app="two", route="/x")))["error"]
    assert kind == "ConfigError"
    assert "'one'" in message
    assert "'two'" in message
    assert [(r.prefix, r.deployment) for r in (await serve.table()).routes] == [("/x", "one/d")]
    await serve.rpc.serve_delete(app="one")
    assert "error" not in await serve.deploy(spec(app="two", route="/x"))


# -- long polls


@gen_cluster(client=True, nthreads=ONE)
async def test_long_polls(c, s, a):
    serve = await service(c)
    table = await serve.table()
    same = {"epoch": table.epoch, "since": table.version}
    assert await serve.rpc.serve_table(**same, timeout=0.01) == {"table": None}
    # A table of another controller is never the present one.
    assert (await serve.rpc.serve_table(epoch="other", since=table.version, timeout=30))["table"]
    poll = asyncio.ensure_future(serve.rpc.serve_table(**same, timeout=30))
    await serve.deploy(spec())
    assert decode_table((await poll)["table"]).version > table.version
    status = await serve.running()
    answer = await serve.rpc.serve_watch(since=status.version, timeout=0.01)
    assert decode_status(answer["status"]) == status


@gen_cluster(client=True, nthreads=ONE)
async def test_the_end_of_the_scheduler_ends_long_polls(c, s, a):
    serve = await service(c)
    table = await serve.table()
    poll = asyncio.ensure_future(serve.rpc.serve_table(epoch=table.epoch, since=table.version, timeout=60))
    while not s.plugins["dask-serve"]._tables._event._waiters:
        await asyncio.sleep(0.01)
    await asyncio.wait_for(s.close(), 10)
    with contextlib.suppress(OSError):
        assert await asyncio.wait_for(poll, 5) == {"table": None}


# -- failures


@gen_cluster(client=True, nthreads=TWO)
async def test_constructor_that_fails(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(), b"fail: no such file")
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert "Traceback (most recent call last):" in status.applications["app"].message
    assert "ValueError: fail: no such file" in status.applications["app"].message
    assert len(FakeReplica.calls["r1"]) == 3
    assert replicas(status) == []
    assert "fail: no such file" in (await serve.table()).deployments["app/d"].failure
    # Another deployment of the same tries again.
    await serve.deploy(spec(), b"fail: no such file")
    assert (await serve.status()).applications["app"].status == "deploying"
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert len(FakeReplica.calls["r1"]) == 6
    await serve.deploy(spec("r2"))
    await serve.running()
    assert (await serve.table()).deployments["app/d"].failure is None


@gen_cluster(client=True, nthreads=TWO)
async def test_replicas_that_fail_together_are_one_attempt(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=4), b"fail")
    await serve.until(lambda s: s.applications["app"].status == "failed")
    assert len(FakeReplica.calls["r1"]) > 8


@gen_cluster(client=True, nthreads=TWO)
async def test_update_that_fails_rolls_back(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    before = replicas(await serve.running())
    await serve.deploy(spec("r2", num_replicas=2), b"fail")
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert "2 replicas of the previous revision go on serving" in status.applications["app"].message
    assert replicas(status, state="ready") == before
    entry = (await serve.table()).deployments["app/d"]
    assert entry.failure is None
    assert len(entry.replicas) == 2
    # The previous revision is looked after still.
    lost = next(r for r in before if r.worker == a.address)
    await a.close()
    status = await serve.until(
        lambda s: len(replicas(s, state="ready")) == 2 and lost.id not in {r.id for r in replicas(s)}
    )
    assert {r.revision for r in replicas(status)} == {"r1"}


@gen_cluster(client=True, nthreads=TWO)
async def test_a_failed_update_is_taken_back_as_a_whole(c, s, a, b):
    def two(revision: str, *names: str) -> ApplicationSpec:
        options = msgspec.convert({"num_replicas": 2}, DeploymentOptions)
        deployments = [
            DeploymentSpec(name=name, revision=f"{revision}{name}", options=options, methods=[]) for name in names
        ]
        return ApplicationSpec(name="app", route_prefix=None, ingress="d", deployments=deployments)

    serve = await service(c)
    await serve.deploy(two("r1", "d", "e"))
    await serve.running()
    told = []
    s.plugins["dask-serve"].registry.on_taken_back = lambda name, spec, why: told.append((name, spec, why))
    failing = two("r2", "d", "f")
    await serve.rpc.serve_deploy(
        application=msgspec.msgpack.encode(failing),
        code={"r2d": to_serialize(b"ok"), "r2f": to_serialize(b"fail: no model")},
    )
    # What the new version has no more is called by the old one's replicas until the end.
    for _ in range(20):
        assert len((await serve.table()).deployments["app/e"].replicas) == 2
        await asyncio.sleep(0.01)
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert "the update was taken back" in status.applications["app"].message
    assert "ValueError: fail: no model" in status.applications["app"].message
    status = await serve.until(lambda s: [r.revision for r in replicas(s)] == ["r1d"] * 2)
    assert sorted((await serve.table()).deployments) == ["app/d", "app/e"]
    assert list(status.applications["app"].deployments) == ["d", "e"]
    assert [(name, spec) for name, spec, _ in told] == [("app", failing)]
    # Whoever deploys again tries again.
    await serve.rpc.serve_deploy(
        application=msgspec.msgpack.encode(failing),
        code={"r2d": to_serialize(b"ok"), "r2f": to_serialize(b"ok")},
    )
    await serve.running()
    assert sorted((await serve.table()).deployments) == ["app/d", "app/f"]


@gen_cluster(client=True, nthreads=ONE, worker_kwargs={"resources": {"GPU": 2}})
async def test_an_update_without_room(c, s, a):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2, resources={"GPU": 1}))
    before = replicas(await serve.running())
    await serve.deploy(spec("r2", num_replicas=2, resources={"GPU": 1}))
    status = await serve.until(lambda s: "max_unavailable=1" in s.applications["app"].message)
    assert "no worker has resources GPU=1 free" in status.applications["app"].message
    assert replicas(status) == before
    await serve.deploy(spec("r2", num_replicas=2, resources={"GPU": 1}, max_unavailable=1))
    ready = []

    def updated(status: ServeStatus) -> bool:
        ready.append(len(replicas(status, state="ready")))
        return [replica.revision for replica in replicas(status, state="ready")] == ["r2"] * 2

    await serve.until(updated)
    assert min(ready) == 1


@gen_cluster(client=True, nthreads=TWO)
async def test_retired_workers_lose_their_replicas_first(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    FakeReplica.gates["r1"] = asyncio.Event()
    retiring = asyncio.ensure_future(c.retire_workers([a.address]))
    status = await serve.until(lambda s: len(replicas(s, state="draining")) == 1)
    assert [replica.worker for replica in replicas(status, state="ready")] == [b.address] * 2
    assert a.address in s.workers
    FakeReplica.gates["r1"].set()
    assert list(await retiring) == [a.address]
    # The last one goes as well, when it is told to: without a replacement.
    with pytest.raises(TypeError, match="mutually exclusive"):
        await s.retire_workers(workers=[b.address], names=["b"])


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)] * 3)
async def test_replicas_do_not_move_to_workers_that_leave_too(c, s, *workers):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    holding = [replica.worker for replica in replicas(await serve.running())]
    (empty,) = s.workers.keys() - set(holding)
    assert set(await c.retire_workers([holding[0], empty])) == {holding[0], empty}
    assert [replica.worker for replica in replicas(await serve.running())] == [holding[1]] * 2
    assert s.workers[holding[1]].status == Status.running


@gen_cluster(client=True, nthreads=TWO)
async def test_a_cluster_object_closes_workers_itself(c, s, a, b):
    """It asks by alias, as when it scales down or is closed: data moves where it can, and no worker is sent away."""
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    kept = await c.scatter(1, workers=[a.address])
    assert list(await c.scheduler.retire_workers(workers=[a.name])) == [a.address]
    assert b.address in {worker.address for worker in s.tasks[kept.key].who_has}
    assert s.workers[a.address].status == Status.closing_gracefully
    assert {replica.worker for replica in replicas(await serve.status())} == {b.address}
    # The last ones: nobody is left who could take anything, so Dask would only complain.
    assert await c.scheduler.retire_workers(workers=[a.name, b.name]) == {}
    assert s.workers[b.address].status == Status.running
    assert replicas(await serve.status()) == []
    assert len(s.workers) == 2


@gen_cluster(client=True, nthreads=ONE)
async def test_a_worker_that_dask_does_not_retire(c, s, a):
    serve = await service(c)
    kept = await c.scatter(1)
    await serve.deploy(spec())
    before = replicas(await serve.running())
    # Its data has nowhere to go.
    assert await c.retire_workers([a.address]) == {}
    status = await serve.running()
    assert before[0].id not in {replica.id for replica in replicas(status)}
    assert kept.status == "finished"


@gen_cluster(client=True, nthreads=TWO)
async def test_drain_by_name(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    await serve.running()
    answer = await serve.rpc.serve_drain(worker=str(a.name))
    assert (answer["worker"], list(answer["left"])) == (a.address, [])
    assert {replica.worker for replica in replicas(await serve.status())} == {b.address}
    assert "there is no worker 'nobody'" in (await serve.rpc.serve_drain(worker="nobody"))["error"][1]


@gen_cluster(client=True, nthreads=ONE)
async def test_worker_without_the_package(c, s, a):
    serve = await service(c)
    actors.replica_class = lambda: BrokenActor  # restored by the fixture's monkeypatch
    await serve.deploy(spec())
    status = await serve.until(lambda s: s.applications["app"].status == "failed")
    assert a.address in status.applications["app"].message
    assert "pip install dask-serve" in status.applications["app"].message


@gen_cluster(client=True, nthreads=TWO)
async def test_lost_worker(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    before = replicas(await serve.running())
    lost = next(r for r in before if r.worker == a.address)
    await s.remove_worker(a.address, stimulus_id="test", close=False)
    # At once, without another turn of the event loop.
    table = s.plugins["dask-serve"]._table
    assert lost.id not in {r.id for r in table.deployments["app/d"].replicas}
    status = await serve.until(lambda s: len(replicas(s, state="ready")) == 2)
    assert {r.worker for r in replicas(status)} == {b.address}


@gen_cluster(client=True, nthreads=ONE)
async def test_lost_while_starting(c, s, a):
    serve = await service(c)
    await serve.deploy(spec(), b"silent")
    await serve.until(lambda s: any("constructor" in r.message for r in replicas(s)))
    await a.close()
    status = await serve.until(lambda s: "no workers are connected" in s.applications["app"].message)
    assert status.applications["app"].status == "deploying"


@gen_cluster(client=True, nthreads=[])
async def test_no_workers(c, s):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    status = await serve.until(lambda s: s.applications["app"].message != "")
    assert status.applications["app"].message == "d: 2 of 2 replicas wait for a worker: no workers are connected"
    assert s.adaptive_target() == 1
    from distributed import Worker

    async with Worker(s.address, nthreads=1, dashboard=False) as w:
        await serve.running()
        assert s.adaptive_target() == 2
        assert w.state.actors


@gen_cluster(client=True, nthreads=TWO, worker_kwargs={"resources": {"GPU": 1}})
async def test_resources_are_booked(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(num_replicas=3, resources={"GPU": 1}))
    status = await serve.until(lambda s: len(replicas(s, state="ready")) == 2)
    assert "1 of 3 replicas wait for a worker: no worker has resources GPU=1 free" in str(status)
    assert {r.worker for r in replicas(status)} == {a.address, b.address}
    assert await c.scheduler.adaptive_target() == 3
    await serve.deploy(spec(num_replicas=2, resources={"GPU": 1}))
    await serve.running()
    assert await c.scheduler.adaptive_target() == 2


@gen_cluster(client=True, nthreads=ONE)
async def test_busy_worker_is_told(c, s, a):
    serve = await service(c)
    future = c.submit(slowinc, 1, delay=2.5)
    while not a.state.executing_count:
        await asyncio.sleep(0.01)
    await serve.deploy(spec())
    status = await serve.until(lambda s: "queued on worker" in s.applications["app"].message)
    assert f"queued on worker {a.address}: its only thread is busy" in replicas(status)[0].message
    await serve.running()
    assert await future == 2


@gen_cluster(client=True, nthreads=ONE)
async def test_delete_while_queued(c, s, a):
    serve = await service(c)
    future = c.submit(slowinc, 1, delay=1)
    while not a.state.executing_count:
        await asyncio.sleep(0.01)
    await serve.deploy(spec())
    while not s.workers[a.address].actors:
        await asyncio.sleep(0.01)
    await serve.rpc.serve_delete(app="app")
    # Dask would go on thinking that the worker holds an actor.
    assert not s.workers[a.address].actors
    assert await future == 2
    assert not a.state.actors


@gen_cluster(client=True, nthreads=ONE)
async def test_delete_at_once(c, s, a):
    serve = await service(c)
    await asyncio.gather(serve.deploy(spec()), serve.deploy(spec(app="two")))
    assert await serve.rpc.serve_shutdown() == {}
    assert (await serve.status()).applications == {}
    while s.workers[a.address].actors or a.state.actors:
        await asyncio.sleep(0.01)


@gen_cluster(client=True, nthreads=TWO)
async def test_replica_that_drains_of_itself(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec())
    (replica,) = replicas(await serve.running())
    await serve.rpc.serve_report(replica=replica.id, event="draining")
    assert replica.id not in {r.id for r in (await serve.table()).deployments["app/d"].replicas}
    status = await serve.running()
    assert {r.worker for r in replicas(status, state="ready")} == {a.address, b.address} - {replica.worker}
    await serve.rpc.serve_report(replica=replica.id, event="stopped")
    await serve.until(lambda s: len(replicas(s)) == 1)


@gen_cluster(client=True, nthreads=ONE)
async def test_replica_that_gives_up(c, s, a):
    serve = await service(c)
    await serve.deploy(spec())
    (replica,) = replicas(await serve.running())
    await serve.rpc.serve_report(replica=replica.id, event="failed", error="out of ideas")
    status = await serve.until(lambda s: "out of ideas" in s.applications["app"].message)
    assert status.applications["app"].status == "unhealthy"
    status = await serve.running()
    assert replicas(status)[0].id != replica.id


@gen_cluster(client=True, nthreads=TWO, Worker=Nanny, timeout=150)
async def test_client_restart(c, s, a, b):
    # Workers are processes of their own: the fake lives there too, since it is pickled by reference to this module.
    serve = await service(c)
    await serve.deploy(spec(num_replicas=2))
    before = {r.id for r in replicas(await serve.running())}
    await c.restart(timeout=60)

    def is_back(status: Any) -> bool:
        now = {r.id for r in replicas(status)}
        return status.applications["app"].status == "running" and not before & now and len(now) == 2

    await serve.until(is_back, 60)


# -- what Dask is told


@gen_cluster(client=True, nthreads=TWO)
async def test_workers_with_replicas_are_not_scaled_down(c, s, a, b):
    serve = await service(c)
    assert len(s.workers_to_close(n=2)) == 2
    await serve.deploy(spec())
    (replica,) = replicas(await serve.running())
    assert s.workers_to_close(n=2) == list({a.address, b.address} - {replica.worker})


@gen_cluster(client=True, nthreads=ONE, scheduler_kwargs={"idle_timeout": "0.5 s"})
async def test_idle_timeout(c, s, a):
    serve = await service(c)
    await serve.deploy(spec())
    await serve.running()
    # Three times the time-out, without any task.
    deadline = asyncio.get_running_loop().time() + 1.5
    while asyncio.get_running_loop().time() < deadline:
        assert s.status.name == "running"
        await asyncio.sleep(0.1)
    await serve.rpc.serve_delete(app="app")
    while s.status.name == "running":
        await asyncio.sleep(0.05)


@gen_cluster(client=True, nthreads=TWO)
async def test_keys_of_bound_arguments_are_kept(c, s, a, b):
    serve = await service(c)
    future = c.submit(inc, 1, key="bound")
    await serve.deploy(spec(keys=["bound"]))
    await serve.running()
    del future
    await c.submit(inc, 2)
    assert s.tasks["bound"].state == "memory"
    # An update that does not refer to them lets go of them once the previous revision is not needed any more.
    await serve.deploy(spec("r2"))
    await serve.running()
    while "bound" in s.tasks:
        await asyncio.sleep(0.01)


# -- promises


@gen_cluster(client=True, nthreads=ONE)
async def test_promises(c, s, a):
    serve = await service(c)
    fetch = asyncio.ensure_future(serve.rpc.serve_outcome(promise="p", timeout=10))
    assert await serve.rpc.serve_outcome(promise="p", timeout=0.01) == {"outcome": None}
    await serve.rpc.serve_promise(promise="p", client=c.id)
    await serve.rpc.serve_settle(promise="p", outcome=to_serialize({"value": 1}))
    await serve.rpc.serve_settle(promise="p", outcome=to_serialize({"value": 2}))
    assert await fetch == {"outcome": {"value": 1}}
    assert await serve.rpc.serve_outcome(promise="p") == {"outcome": {"value": 1}}


@gen_cluster(client=True, nthreads=ONE)
async def test_promises_of_a_client_that_left(c, s, a):
    serve = await service(c)
    async with Client(s.address, asynchronous=True) as other:
        await other.scheduler.serve_promise(promise="p", client=other.id)
        await other.scheduler.serve_promise(promise="q", client=other.id)
        await other.scheduler.serve_settle(promise="q", outcome="done")
    assert await serve.rpc.serve_outcome(promise="p") == {"outcome": {"lost": True}}
    assert await serve.rpc.serve_outcome(promise="q") == {"outcome": "done"}


# -- proxies


async def get(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(read)


async def start_proxies(serve: Service, **options: Any) -> dict[str, Any]:
    encoded = msgspec.msgpack.encode(HTTPOptions(**options))
    return await serve.rpc.serve_start(options=encoded, explicit=list(options))


@gen_cluster(client=True, nthreads=ONE)
async def test_proxies(c, s, a):
    serve = await service(c)
    url = (await start_proxies(serve, port=0))["url"]
    assert (await serve.table()).url == (await serve.status()).url == url
    assert [proxy.state for proxy in (await serve.status()).proxies] == ["ready"]
    # The same again, and the start without wishes that comes with a deployment, change nothing.
    before = (await serve.status()).proxies
    assert await start_proxies(serve, port=0) == {"url": url}
    assert await start_proxies(serve) == {"url": url}
    await serve.deploy(spec(route="/some"))
    await serve.running()
    assert (await serve.status()).proxies == before
    while "/some" not in await get(url + "/-/routes"):
        await asyncio.sleep(0.01)
    assert await serve.rpc.serve_shutdown() == {}
    assert (await serve.status()).url == (await serve.table()).url == ""
    with pytest.raises(OSError):
        await get(url + "/-/routes")


@gen_cluster(client=True, nthreads=ONE)
async def test_applications_with_a_route_start_proxies(c, s, a):
    serve = await service(c)
    assert "error" not in await serve.deploy(spec(route="/"))
    assert "/" in await get((await serve.table()).url + "/-/routes")


@gen_cluster(client=True, nthreads=ONE)
async def test_busy_port(c, s, a):
    serve = await service(c)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        kind, message = (await start_proxies(serve, port=port))["error"]
    assert kind == "ConfigError"
    assert str(port) in message
    assert str(port) in (await serve.status()).message
    assert "error" not in await start_proxies(serve, port=port)
    status = await serve.status()
    assert status.message == ""
    assert re.search(r"proxy slot 0, pid \d+, state ready, restarts 0$", str(status), re.MULTILINE)
    # Proxies that run stay as they were, and there is nothing to tell of them.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        kind, _ = (await start_proxies(serve, port=taken.getsockname()[1]))["error"]
    after = await serve.status()
    assert (kind, after.message, after.url) == ("ConfigError", "", status.url)


# -- the preload


@gen_cluster(
    client=True,
    nthreads=ONE,
    scheduler_kwargs={"preload": ["dask_serve.preload"], "preload_argv": ["--no-serve-http"]},
)
async def test_preload(c, s, a):
    serve = Service(c)
    await serve.deploy(spec())
    await serve.running()


@gen_cluster(
    client=True,
    nthreads=[],
    scheduler_kwargs={"preload": ["dask_serve.preload"], "preload_argv": ["--serve-port", "0"]},
)
async def test_preload_starts_proxies(c, s):
    status = await Service(c).until(lambda s: bool(s.url))
    assert await get(status.url + "/-/routes")


@gen_cluster(
    client=True,
    nthreads=[],
    scheduler_kwargs={
        "preload": ["dask_serve.preload"],
        "preload_argv": ["--serve-port", "0", "--serve-host", "localhost", "--serve-http", "body_limit=5"],
    },
)
async def test_what_the_preload_was_given_holds_after_a_shutdown(c, s):
    serve = Service(c)
    await serve.until(lambda s: bool(s.url))
    assert await serve.rpc.serve_shutdown() == {}
    assert "url" in await start_proxies(serve, body_limit=7)
    options = s.plugins["dask-serve"].front.options
    assert (options.host, options.body_limit) == ("localhost", 7)
    assert not (await serve.status()).url.endswith(":8000")
