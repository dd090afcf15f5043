"""Who deployed what, going back to it, and several sessions at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import io
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import msgspec
import pytest
from distributed import Client, LocalCluster, Scheduler, Worker
from distributed.protocol import to_serialize
from distributed.utils_test import gen_cluster, gen_test, inc
from hypothesis import given
from hypothesis import strategies as st

import dask_serve as serve
from dask_serve.config import DeploymentOptions, HTTPOptions
from dask_serve.controller import history as history_module
from dask_serve.controller.front import first_options
from dask_serve.controller.history import History
from dask_serve.controller.plugin import Controller
from dask_serve.controller.progress import Progress, draw
from dask_serve.controller.state_file import StateFile
from dask_serve.controller.status import ApplicationStatus, DeploymentStatus, decode_status
from dask_serve.controller.store import HTTP
from dask_serve.exceptions import ApplicationNotFoundError, ConfigError, ConflictError, DeploymentFailedError
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.policy.history import By, Entry, earlier, extend, prove
from dask_serve.session import terminal

ME = f"{getpass.getuser()}@{socket.gethostname()}"
ANN = By("ann@host", "c-1")


def spec(revision: str = "r1", app: str = "app", **options: Any) -> ApplicationSpec:
    deployment = DeploymentSpec(
        name="d", revision=revision, options=msgspec.convert(options, DeploymentOptions), methods=["__call__"]
    )
    return ApplicationSpec(name=app, route_prefix=None, ingress="d", deployments=[deployment])


# -- the decisions


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30), st.integers(1, 5))
def test_versions(changes: list[tuple[str, bool]], keep: int) -> None:
    entries: tuple[Entry, ...] = ()
    everything: list[Entry] = []
    for number, (revision, ran) in enumerate(changes, 1):
        entries = extend(entries, spec(revision), ANN, "deployed", float(number), keep=keep)
        if ran:
            entries = prove(entries)
        everything.append(entries[-1])
        assert entries[-1].version == number
        assert entries[-keep:] == tuple(everything[-keep:])
        # One more at most, which is the last that ran.
        assert entries[:-keep] in ((), tuple([one for one in everything[:-keep] if one.ran][-1:]))
        assert any(one.ran for one in entries) == any(one.ran for one in everything)
        back = earlier(entries)
        if back is not None:
            assert back.ran
            assert back.spec != entries[-1].spec
            assert not any(one.ran and one.spec != entries[-1].spec for one in entries if one.version > back.version)
        else:
            assert all(not one.ran or one.spec == entries[-1].spec for one in entries)


def test_versions_go_on_after_a_deletion() -> None:
    history = History()
    history.put("app", history.extended(spec(), ANN, "deployed"))
    history.put("app", history.extended(spec("r2"), ANN, "deployed"))
    history.remove("app", By("bob@host"))
    assert history.of("app") == ()
    assert history.answer("app").deleted.by == By("bob@host")
    # Who waits for version 2 must not take this one for it.
    assert history.extended(spec(), ANN, "deployed")[-1].version == 3


def test_the_controller_notes_its_own_changes() -> None:
    history = History()
    history.put("app", history.extended(spec(), ANN, "deployed"))
    assert history.unsaved == set()
    entry = history.note(spec("r0"), "automatic rollback: it could not be started")
    assert (entry.version, entry.by.owner) == (2, "dask_serve")
    assert history.unsaved == {"app"}


def test_code_in_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "KEPT_BYTES", 25)
    history = History()
    code = {f"r{number}": bytes(10) for number in range(6)}
    for number in range(5):
        history.put("app", history.extended(spec(f"r{number}"), ANN, "deployed"))
    # r4 runs; of those before, two have room; r5 is nobody's.
    assert set(history.kept(code, {"r4"})) == {"r4", "r3", "r2"}
    history.stored = frozenset({"r3", "r2"})
    assert set(history.kept(code, {"r4"})) == {"r4", "r1", "r0"}


def test_options_of_the_first_proxies() -> None:
    given = HTTPOptions(port=80, host="0.0.0.0")
    saved = HTTP(HTTPOptions(port=8001, host="1.2.3.4", num_proxies=3), ["host", "num_proxies"])
    assert first_options(None, set(), None) == (None, set())
    assert first_options(given, {"port"}, None) == (given, {"port"})
    assert first_options(None, set(), saved) == (saved.options, {"host", "num_proxies"})
    merged, explicit = first_options(given, {"port"}, saved)
    assert (merged.port, merged.host, merged.num_proxies) == (80, "1.2.3.4", 3)
    assert explicit == {"port", "host", "num_proxies"}


# -- a controller that is ended and begun again


def model(answer: Any, **options: Any) -> Any:
    @serve.deployment(**options)
    class Model:
        def __call__(self) -> Any:
            return answer

    return Model.bind()


def broken() -> Any:
    @serve.deployment
    class Broken:
        def __init__(self) -> None:
            raise ValueError("it is broken")

        def __call__(self) -> None: ...

    return Broken.bind()


@contextlib.asynccontextmanager
async def cluster(state: StateFile):
    """A scheduler with the preload's controller, a worker and a client, all of them in this process."""
    async with Scheduler(dashboard=False, dashboard_address=":0", port=0) as scheduler:
        scheduler.add_plugin(Controller(state=state))
        await scheduler.plugins["dask-serve"].start(scheduler)
        async with (
            Worker(scheduler.address, nthreads=2) as worker,
            Client(scheduler.address, asynchronous=True, name="tester") as client,
        ):
            yield scheduler, worker, client


async def running(client: Client, app: str, revision: int | None = None) -> ApplicationStatus:
    while True:
        application = (await serve.status(client=client)).applications[app]
        if application.status == "running":
            return application
        assert application.status in ("deploying", "unhealthy"), application
        await asyncio.sleep(0.02)


@gen_test()
async def test_what_comes_back_and_what_cannot(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state")
    async with cluster(state) as (_, _, client):
        bound = client.submit(inc, 1)
        await serve.run(model(1), name="plain", route_prefix=None, client=client)
        await serve.run(model(2), name="plain", route_prefix=None, client=client)
        await serve.run(model(bound), name="bound", route_prefix=None, client=client)
        await serve.run(model(3), name="gone", route_prefix=None, client=client)
        await serve.delete("gone", client=client)
    async with cluster(state) as (scheduler, _, client):
        application = await running(client, "plain")
        assert (application.version, application.owner, application.reason) == (2, ME, "deployed")
        assert application.client.startswith("Client-tester-")
        handle = await serve.get_app_handle("plain", client=client)
        assert await handle.remote() == 2
        status = await serve.status(client=client)
        assert set(status.applications) == {"plain", "bound"}
        # Not one try is made of what cannot succeed.
        assert status.applications["bound"].status == "failed"
        assert "were lost with the last scheduler: compute them again, and deploy again" in str(status)
        assert not [r for d in status.applications["bound"].deployments.values() for r in d.replicas]
        # What only an earlier version needs is on disk and not in memory.
        controller = scheduler.plugins["dask-serve"]
        assert len(controller.registry.code) == 1
        assert await serve.rollback("plain", client=client) == 3
        assert await handle.remote() == 1
        bound = client.submit(inc, 10)
        handle = await serve.run(model(bound), name="bound", route_prefix=None, client=client)
        assert await handle.remote() == 11
    async with cluster(state) as (_, _, client):
        application = await running(client, "plain")
        assert (application.version, application.reason) == (3, "rolled back to 1")
        assert [r.reason for r in await serve.history("plain", client=client)] == [
            "deployed",
            "deployed",
            "rolled back to 1",
        ]
        await serve.shutdown(client=client)
    async with cluster(state) as (_, _, client):
        assert (await serve.status(client=client)).applications == {}


@gen_test()
async def test_what_the_controller_does_by_itself_is_saved(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state")
    async with cluster(state) as (scheduler, _, client):
        await serve.run(model(1), route_prefix=None, client=client)
        handle = await serve.run(model(2), route_prefix=None, client=client)
        controller = scheduler.plugins["dask-serve"]
        first, second = controller.registry.history.of("default")
        controller.registry.deploy(first.spec, {})
        controller.editor.taken_back("default", second.spec, "replica x failed:\nTraceback\nValueError: broken")
        controller.reconciler.wake()
        while await handle.remote() != 1:
            await asyncio.sleep(0.02)
    async with cluster(state) as (_, _, client):
        application = await running(client, "default")
        assert (application.version, application.owner) == (3, "dask_serve")
        assert application.reason.startswith("automatic rollback: replica x failed:")
        assert "version 3, automatic rollback: replica x failed: ... ValueError: broken by dask_serve at" in str(
            application
        )
        handle = await serve.get_app_handle("default", client=client)
        assert await handle.remote() == 1


@gen_test()
async def test_an_update_that_is_taken_back_is_another_version(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state")
    async with cluster(state) as (_, _, client):
        handle = await serve.run(model(1), route_prefix=None, client=client)
        with pytest.raises(DeploymentFailedError, match=r"(?s)automatic rollback: .*ValueError: it is broken"):
            await serve.run(broken(), route_prefix=None, client=client)
        application = (await serve.status(client=client)).applications["default"]
        assert (application.version, application.owner, application.status) == (3, "dask_serve", "failed")
        assert "the update was taken back" in application.message
        assert [(r.ran, r.current) for r in await serve.history("default", client=client)] == [
            (True, False),
            (False, False),
            (True, True),
        ]
        assert await handle.remote() == 1
    async with cluster(state) as (_, _, client):
        assert (await running(client, "default")).version == 3


@gen_test()
async def test_a_damaged_file_is_told_by_the_status(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state")
    state.path.write_bytes(b"damaged")
    state.path.chmod(0o600)
    for expected in (True, False):
        async with cluster(state) as (_, _, client):
            status = await serve.status(client=client)
            assert ("could not be used" in str(status)) == expected
            await serve.run(model(1), route_prefix=None, client=client)


@gen_test()
async def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with cluster(StateFile(tmp_path / "file" / "state")) as (_, _, client):
        status = await serve.status(client=client)
        assert "Nothing is saved" in status.message
        handle = await serve.run(model(1), route_prefix=None, client=client)
        assert await handle.remote() == 1


@gen_test()
async def test_what_cannot_be_saved_is_not_done(tmp_path: Path) -> None:
    async with cluster(StateFile(tmp_path / "state")) as (scheduler, _, client):
        handle = await serve.run(model(1), route_prefix=None, client=client)
        store = scheduler.plugins["dask-serve"].editor.store
        database = store._database
        database.execute(f"PRAGMA max_page_count={database.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(serve.ServeError, match="full"):
            await serve.run(model("x" * 100_000), route_prefix=None, client=client)
        assert await handle.remote() == 1
        assert [r.version for r in await serve.history("default", client=client)] == [1]
        database.execute("PRAGMA max_page_count=100000")
        handle = await serve.run(model("x" * 100_000), route_prefix=None, client=client)
        assert len(await handle.remote()) == 100_000


@gen_test()
async def test_a_file_for_crashes_ends_with_the_scheduler(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state", for_crashes=True)
    async with cluster(state) as (_, _, client):
        await serve.run(model(1), route_prefix=None, client=client)
        assert state.path.exists()
    assert list(tmp_path.iterdir()) == []


# -- sessions on one cluster


@pytest.fixture(scope="module")
def shared():
    """A cluster with three sessions; each test has applications of its own names."""
    with (
        dask.config.set({"serve.history-length": 4}),
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=None) as cluster,
        contextlib.ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(Client(cluster, set_as_default=False, name=name)) for name in ("ann", "bob", "eve")
        ]
        clients[0].register_plugin(Controller())
        yield clients


def run(client: Client, app: Any, name: str, **options: Any) -> Any:
    return serve.run(app, name=name, route_prefix=None, client=client, **options)


def test_who_deployed_what(shared) -> None:
    ann, bob, _ = shared
    run(ann, model(1), "who")
    run(bob, model(1), "who")
    # The same again is no change.
    [only] = serve.history("who", client=ann)
    assert (only.version, only.owner, only.client, only.ran, only.current) == (1, ME, ann.id, True, True)
    run(bob, model(2), "who")
    first, second = serve.history("who", client=ann)
    assert (second.version, second.client, second.current, first.current) == (2, bob.id, True, False)
    assert first.deployments.keys() == second.deployments.keys() == {"Model"}
    assert first.deployments != second.deployments
    assert f"version 2, deployed by {ME} at 20" in str(serve.status(client=ann))
    assert str(second).startswith(f"version 2, the present one: deployed by {ME} at 20")


def test_rollback(shared) -> None:
    ann, bob, _ = shared
    handle = run(ann, model(1, num_replicas=2), "back")
    run(ann, model(2), "back")
    assert serve.rollback("back", client=bob) == 3
    assert handle.remote().result() == 1
    assert len(serve.status(client=ann).applications["back"].deployments["Model"].replicas) >= 2
    latest = serve.history("back", client=ann)[-1]
    assert (latest.reason, latest.client, latest.ran) == ("rolled back to 1", bob.id, True)
    # Back from going back.
    assert serve.rollback("back", client=bob) == 4
    assert handle.remote().result() == 2
    assert serve.rollback("back", 3, client=bob) == 5
    assert handle.remote().result() == 1
    with pytest.raises(ConfigError, match=r"has no version 1; versions: 2, 3, 4, 5"):
        serve.rollback("back", 1, client=bob)
    with pytest.raises(ApplicationNotFoundError, match="there is no application 'none'; applications"):
        serve.rollback("none", client=bob)
    with pytest.raises(ApplicationNotFoundError, match="there is no application 'none'"):
        serve.history("none", client=bob)


def test_rollback_from_what_failed(shared) -> None:
    ann, _, _ = shared
    handle = run(ann, model(1), "failing")
    with pytest.raises(DeploymentFailedError, match="it is broken"):
        run(ann, broken(), "failing")
    with contextlib.suppress(ConfigError):  # where it went back by itself
        serve.rollback("failing", client=ann)
    assert handle.remote().result() == 1
    assert serve.history("failing", client=ann)[-1].current


def test_nothing_to_go_back_to(shared) -> None:
    ann, _, _ = shared
    run(ann, model(1), "first")
    with pytest.raises(ConfigError, match="no other version that ran; versions: 1"):
        serve.rollback("first", client=ann)


def test_data_that_is_gone_does_not_come_back(shared) -> None:
    ann, _, _ = shared
    bound = ann.submit(inc, 100)
    run(ann, model(bound), "data")
    del bound
    run(ann, model(2), "data")
    until = threading.Event()
    while ann.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) > 10 and not until.wait(0.01):
        pass
    with pytest.raises(ConfigError, match="version 1 of application 'data' cannot come back: the Dask values"):
        while True:
            serve.rollback("data", 1, client=ann)
            serve.rollback("data", 2, client=ann)


def test_the_loser_is_told_who_won(shared) -> None:
    ann, bob, _ = shared
    slow = model(1, resources={"NONE": 1})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, ann, slow, "race")
        seen(bob, "race", 1)
        assert run(bob, model(2), "race").remote().result() == 2
        with pytest.raises(ConflictError) as error:
            waiting.result(10)
    text = str(error.value)
    assert "version 1 of application 'race', which this session waited for, was replaced by version 2, deployed" in text
    assert f"by {ME} ({bob.id}) at 20" in text


def test_the_loser_is_told_who_deleted(shared) -> None:
    ann, bob, eve = shared
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(run, ann, model(1, resources={"NONE": 1}), "doomed")
        seen(bob, "doomed", 1)
        serve.delete("doomed", client=bob)
        with pytest.raises(ConflictError, match=f"was deleted by {ME} .{bob.id}. at 20"):
            waiting.result(10)
    with pytest.raises(ApplicationNotFoundError, match=rf"no application 'doomed' \(it was deleted by {ME} at 20"):
        serve.delete("doomed", client=eve)


def seen(client: Client, name: str, version: int) -> None:
    pause = threading.Event()
    while (app := serve.status(client=client).applications.get(name)) is None or app.version != version:
        pause.wait(0.01)


def test_a_with_block_does_not_delete_what_is_anothers(shared) -> None:
    ann, bob, _ = shared
    with run(ann, model(1), "block"):
        run(bob, model(2), "block")
    assert serve.get_app_handle("block", client=ann).remote().result() == 2
    with run(ann, model(3), "block"):
        run(ann, model(4), "block")
    assert "block" not in serve.status(client=ann).applications


def test_a_deletion_ends_though_the_same_is_deployed_at_once(shared) -> None:
    ann, bob, _ = shared
    run(ann, model(1, num_replicas=2), "again")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            deleting = pool.submit(serve.delete, "again", client=ann)
            deploying = pool.submit(run, bob, model(1, num_replicas=2), "again")
            outcomes = [_outcome(deleting), _outcome(deploying)]
            assert outcomes[0] is None
            assert not isinstance(outcomes[1], Exception) or isinstance(outcomes[1], ConflictError), outcomes
            with contextlib.suppress(ApplicationNotFoundError):
                run(bob, model(1, num_replicas=2), "again")


def _outcome(future: Any) -> Any:
    try:
        return future.result(20)
    except Exception as error:
        return error


def test_many_at_once(shared) -> None:
    """Three sessions deploy, roll back and delete the same application: the end is one of them as a whole."""
    chance = random.Random(5)
    plans = [[chance.choice("rrrbd") for _ in range(10)] for _ in shared]

    def session(number: int) -> list[Any]:
        client, outcomes = shared[number], []
        for step, what in enumerate(plans[number]):
            try:
                if what == "r":
                    pair = serve.deployment(Pair).bind(model((number, step)), (number, step))
                    run(client, pair, "many", timeout=30)
                elif what == "b":
                    serve.rollback("many", client=client, timeout=30)
                else:
                    serve.delete("many", client=client)
            except (ConflictError, ApplicationNotFoundError, ConfigError) as error:
                outcomes.append(error)
        return outcomes

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(session, number) for number in range(3)]:
            for error in future.result(100):
                assert "many" in str(error)
    status = serve.status(client=shared[0]).applications.get("many")
    if status is not None:
        latest = serve.history("many", client=shared[0])[-1]
        assert latest.version == status.version
        assert latest.current
        handle = serve.get_app_handle("many", client=shared[0])
        inner, outer = handle.remote().result(timeout=20)
        assert inner == outer


class Pair:
    def __init__(self, inner: Any, mine: Any) -> None:
        self.inner, self.mine = inner, mine

    async def __call__(self) -> Any:
        return await self.inner.remote(), self.mine


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_code_that_was_deleted_meanwhile_is_sent_again(c, s, a) -> None:
    await c.register_plugin(Controller())
    missing = c.scheduler
    await missing.serve_deploy(application=msgspec.msgpack.encode(spec()), code={"r1": to_serialize(b"x")})
    assert (await missing.serve_missing(revisions=["r1"]))["missing"] == ()
    await missing.serve_delete(app="app")
    answer = await missing.serve_deploy(application=msgspec.msgpack.encode(spec(app="b")), code={})
    assert answer == {"missing": ("r1",)}
    status = decode_status((await missing.serve_status())["status"])
    assert status.applications == {}


# -- the bar


def application(**deployments: tuple[int, dict[str, int]]) -> ApplicationStatus:
    return ApplicationStatus(
        status="deploying",
        message="",
        route_prefix=None,
        ingress="",
        deployments={
            name: DeploymentStatus(status="deploying", message="", target=target, counts=counts, replicas=[])
            for name, (target, counts) in deployments.items()
        },
    )


def test_the_bar() -> None:
    assert draw(application(m=(4, {})), 200) == "m " + "·" * 20 + " 0/4 ready"
    some = draw(application(m=(4, {"ready": 1, "starting": 2})), 200)
    assert some == "m " + "█" * 5 + "▒" * 10 + "·" * 5 + " 1/4 ready, 2 starting"
    more = draw(application(m=(4, {"ready": 4, "draining": 4})), 200)
    assert more == "m " + "█" * 10 + "░" * 10 + " 4/4 ready, 4 draining"
    two = draw(application(a=(1, {"ready": 1}), b=(2, {"starting": 1})), 200)
    assert two == f"a {'█' * 10} 1/1 ready | b {'▒' * 5}{'·' * 5} 0/2 ready, 1 starting"
    assert draw(application(m=(0, {})), 200).endswith("0/0 ready")
    assert len(draw(application(m=(4, {})), 20)) == 20
    amiss = application(m=(1, {"starting": 1}))
    one = msgspec.structs.replace(amiss.deployments["m"], message="first\nits constructor runs")
    amiss = msgspec.structs.replace(amiss, deployments={"m": one})
    assert draw(amiss, 200).endswith("0/1 ready, 1 starting (its constructor runs)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_is_drawn_over_itself_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    say = Progress()
    say.replicas("", application(m=(10, {"starting": 10})))
    say.replicas("", application(m=(10, {"ready": 10})))
    say("something else")
    say.replicas("stuck", application(m=(10, {})), urgent=True)
    say.end()
    first, second, third, fourth = screen.getvalue().splitlines()[:1] and screen.getvalue().split("\n")[:4]
    before, after = first.split("\r")[1:]
    assert before.rstrip().endswith("0/10 ready, 10 starting")
    assert after.rstrip().endswith("10/10 ready")
    assert len(after) >= len(before)
    assert second == "dask_serve: something else"
    assert third == "dask_serve: stuck"
    assert fourth.startswith("\rm ·")
    assert screen.getvalue().endswith("ready\n")


def test_it_is_off_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    say = Progress()
    with caplog.at_level("INFO", logger="dask_serve"):
        for _ in range(2):
            say.replicas("in words", application(m=(10, {"ready": 10})))
        say.end()
    assert file.getvalue() == ""
    assert [record.message for record in caplog.records] == ["in words"]
    monkeypatch.setattr("sys.stderr", None)
    say.replicas("nothing there", application(m=(1, {})))
    assert terminal.is_watched() is False
