"""Rules that callers count on: who blocks and who awaits, what a handle belongs to, and what time-outs do.

What is tested elsewhere:

- a synchronous client blocks, and `await` works beside it: test_api.test_synchronous,
  test_refs.test_results_in_a_script, test_handle.test_a_synchronous_client_in_a_loop; in Jupyter: test_notebook
- an asynchronous client: test_api.test_run, test_async_with; its refs: test_refs
- no client: test_api.test_embedded, test_scheduler_address; the embedded cluster's life: test_embedded
- `def` and `async def` of replicas, Dask tasks: test_handle.test_in_replicas, test_in_dask_tasks,
  test_api.test_inside_a_replica, test_inside_a_task
- dropped refs free their results: test_refs.test_dropped_refs_leave_nothing; unread errors are logged once:
  test_refs.test_unread_errors_are_logged_once; what shows a ref promotes nothing:
  test_refs_promotion.test_harmless_things_promote_nothing
- two clusters: test_handle.test_two_clusters
- time-outs never cancel: test_refs.test_timeouts_never_cancel, test_results_in_a_script; deadlines end requests:
  test_handle.test_deadlines, and over HTTP test_http
- errors of user code arrive as themselves, or as descriptions: test_handle.test_errors_of_user_code
- `with serve.run(...)`, and whose cluster `serve.shutdown` ends: test_api.test_synchronous
- `serve.start` on a running service, and busy ports: test_api.test_http_options, test_proxies
- spellings of Ray: test_api.test_wrong_options, test_deployment.test_wrong_options
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed import Client, LocalCluster, get_client
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve
from dask_serve import config
from dask_serve.handle import DeploymentHandle
from dask_serve.proxy import forward, stream
from dask_serve.replica.process import ServeProcess
from dask_serve.routing.session import Session


@serve.deployment
class Model:
    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.ended: list[Any] = []

    def __call__(self, x):
        return x + 1

    async def gate(self, value):
        await self.open.wait()
        self.ended.append(value)
        return value

    async def unlock(self):
        self.open.set()

    async def what_ended(self):
        return list(self.ended)

    async def remaining(self):
        deadline = serve.get_request_context().deadline
        return None if deadline is None else deadline - time.monotonic()

    def fail(self, text):
        raise ValueError(text)

    def scheduler(self):
        return serve.get_replica_context().replica_id, get_client().scheduler.address


@serve.deployment
class Caller:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def remaining(self):
        return await self.model.remaining.remote()

    async def manage(self):
        return managed()


def managed() -> dict[str, str]:
    """What the functions of a session say where they do not work."""
    found = {}
    for name, call in {
        "run": lambda: serve.run(Model.bind()),
        "start": lambda: serve.start(port=0),
        "delete": lambda: serve.delete("default"),
        "shutdown": serve.shutdown,
    }.items():
        try:
            call()
        except serve.ServeError as error:
            found[name] = str(error)
    return found


@pytest.fixture
def handle(client):
    """A handle of a synchronous client, whose two workers are processes with one thread each."""
    yield serve.run(Model.bind(), route_prefix=None, client=client)
    serve.shutdown(client=client)


# -- who blocks, who awaits --------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_an_asynchronous_client_awaits_everything(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None)
    ref = handle.remote(1)
    assert await ref == await ref.result() == await ref.result(timeout=5) == 2
    failed = handle.fail.remote("no")
    with pytest.raises(ValueError, match="no"):
        await failed.result()
    assert isinstance(await failed.exception(), ValueError)
    assert isinstance(await failed.traceback(), types.TracebackType)
    await handle.gate.remote(1).cancel()
    assert await (await serve.get_app_handle()).remote(1) == 2
    assert await (await Model.get_handle()).remote(1) == 2
    assert (await serve.status()).applications["default"].status == "running"
    await serve.delete("default")
    await serve.shutdown()


@gen_cluster(client=True)
async def test_a_session_is_managed_in_no_replica_and_no_task(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None)
    for found in (await handle.manage.remote(), await c.submit(managed, pure=False)):
        assert set(found) == {"run", "start", "delete", "shutdown"}
        for name, text in found.items():
            assert text.startswith(f"serve.{name} does not work inside a replica or a Dask task")
    assert list((await serve.status()).applications) == ["default"]


SCRIPT = """
import asyncio
from distributed import Client, default_client
import dask_serve as serve

@serve.deployment
class Model:
    def __call__(self, x):
        return x + 1

handle = serve.run(Model.bind(), route_prefix=None)
cluster = default_client()
print("result", handle.remote(1).result(timeout="20s"))

async def main():
    ref = await Model.get_handle(sync=False).remote(2)
    return await handle.remote(1), await ref

print("await", *asyncio.run(main()))
print("default client", cluster.gather(handle.remote(3)), cluster.submit(abs, -1).result())
# The cluster was not made for this block, and outlives it; the application does not, whatever ends the block.
try:
    with serve.run(Model.options(name="Other").bind(), "other", None) as other:
        print("with", other.remote(4).result(timeout=20), sorted(serve.status().applications))
        raise KeyError("an error in the block")
except KeyError:
    print("after", sorted(serve.status().applications), cluster.status, handle.remote(5).result(timeout=20))
serve.shutdown()
print("shut down", cluster.status)
try:
    handle.remote(1)
except serve.NotRunningError as error:
    print("gone", "belongs to the cluster at tcp://" in str(error))
"""


def test_without_a_client(tmp_path):
    """In a script, where the first call makes the cluster and the default client."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(serve.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout.splitlines() == [
        "result 2",
        "await 2 3",
        "default client 4 1",
        "with 5 ['default', 'other']",
        "after ['default'] running 6",
        "shut down closed",
        "gone True",
    ], done.stderr
    assert done.returncode == 0, done.stderr


# -- what becomes of a call --------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_dropping_a_ref_never_cancels(c, s, a, b):
    handle = await serve.run(Model.options(max_ongoing_requests=1).bind(), route_prefix=None)
    (unit,) = ServeProcess.units_of(a) + ServeProcess.units_of(b)
    # One that runs, and some that wait here.
    for i in range(5):
        handle.gate.remote(i)
    gc.collect()
    await until(lambda: unit.user.instance is not None)
    unit.user.loop.call_soon_threadsafe(unit.user.instance.open.set)
    await until(lambda: len(unit.user.instance.ended) == 5)
    assert await handle.what_ended.remote() == [0, 1, 2, 3, 4]


def test_time_outs_are_text_numbers_and_nothing_else(client, handle):
    ref = handle.gate.remote(7)
    for arguments in ({"timeout": "20ms"}, {"timeout": 0.02}, {"timeout_s": 0.02}, {"timeout": 0}, {"timeout": -1}):
        for wait_for in (ref.result, ref.exception):
            with pytest.raises(TimeoutError, match="goes on"):
                wait_for(**arguments)
    with pytest.raises(serve.ConfigError, match="timeout='soon' is not a time"):
        ref.result("soon")
    handle.unlock.remote().result(5)
    assert ref.result("5 s") == ref.result(timeout_s=5) == 7


@gen_cluster(client=True)
async def test_the_deployment_says_how_long_a_request_may_take(c, s, a, b):
    model = Model.options(request_timeout_s=5)
    caller = await serve.run(Caller.bind(model.bind()), route_prefix=None)
    handle = await serve.get_deployment_handle("Model")
    assert 4 < await handle.remaining.remote() < 5
    # The handle's own comes first, and a request gives its calls no more than it has left itself.
    assert 7 < await handle.remaining.options(request_timeout_s=8).remote() < 8
    assert 4 < await caller.remaining.remote() < 5
    assert 4 < await caller.remaining.options(request_timeout_s=60).remote() < 5
    assert 1 < await caller.remaining.options(request_timeout_s=2).remote() < 2
    # It ends the request, unlike timeout=.
    await serve.run(Caller.bind(Model.options(request_timeout_s=0.1).bind()), route_prefix=None)
    begun = time.monotonic()
    with pytest.raises(serve.RequestTimeoutError, match=r"deadline after 0\.1"):
        await handle.gate.remote(1)
    assert time.monotonic() - begun < 2
    # A session that hears of the deployment only after it was called.
    async with Client(s.address, asynchronous=True, set_as_default=False) as other:
        with pytest.raises(serve.RequestTimeoutError, match="deadline"):
            await asyncio.wait_for(DeploymentHandle("default", "Model", s.address, client=other).gate.remote(1), 5)


# -- what comes back ---------------------------------------------------------------------------------------------------


@serve.deployment
class Odd:
    """Raises what would end the process of whoever raised it, and returns what means nothing elsewhere."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    def leave(self, name):
        raise getattr(builtins, name)(3)

    async def leave_in_a_coroutine(self, name):
        raise getattr(builtins, name)(3)

    async def forgets_await(self, how):
        return self.what(how)

    def forgets_result(self, how):
        return self.what(how)

    def what(self, how):
        ref = self.model.remote(1)
        if how == "Dask future":
            return {"deep": [get_client().submit(abs, -1)]}
        return {"bare": ref, "nested": {"deep": [ref]}, "assigned": [self.model.options(sync=True).remote(1)]}[how]

    async def text(self):
        return ["distributed.client", "is only text here"]


@serve.deployment
class Between:
    def __init__(self, odd: DeploymentHandle) -> None:
        self.odd = odd

    async def through(self, name):
        return await self.odd.leave.remote(name)


@gen_cluster(client=True)
async def test_what_would_end_the_caller_arrives_as_a_description(c, s, a, b):
    between = await serve.run(Between.bind(Odd.bind(Model.bind())), route_prefix=None)
    odd = await serve.get_deployment_handle("Odd")
    for name in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration"):
        for method in (odd.leave, odd.leave_in_a_coroutine, between.through):
            # Python itself turns a StopIteration of a coroutine into a RuntimeError.
            with pytest.raises((serve.UserCodeError, RuntimeError), match=name) as caught:
                await asyncio.wait_for(method.remote(name), 5)
            assert "in leave" in str(caught.value) + str(caught.value.__cause__)
    assert len((await serve.status()).applications["default"].deployments["Odd"].replicas) == 1


@gen_cluster(client=True)
async def test_results_hold_no_refs_and_no_futures(c, s, a, b):
    await serve.run(Odd.bind(Model.bind()), route_prefix=None)
    odd = await serve.get_deployment_handle("Odd")
    for method in (odd.forgets_await, odd.forgets_result):
        for how in ("bare", "nested", "assigned"):
            with pytest.raises(serve.PayloadError, match=r"result of replica .* a ref, .*return await"):
                await asyncio.wait_for(method.remote(how), 5)
        with pytest.raises(serve.PayloadError, match=r"result of replica .* a Dask future, .*future\.result\(\)"):
            await asyncio.wait_for(method.remote("Dask future"), 5)
    assert await odd.text.remote() == ["distributed.client", "is only text here"]


# -- the queue of a handle ---------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_a_call_without_deadline_is_never_refused(c, s, a, b):
    """Neither for the length of the queue, nor for the time that it will take; with a limit it is, and at once."""
    handle = await serve.run(Model.options(max_ongoing_requests=1).bind(), route_prefix=None)
    refs = [handle.gate.remote(i) for i in range(20_000)]
    (router,) = Session.of(c).fabric(asyncio.get_running_loop()).routers.values()
    assert router.queued >= 19_900
    assert {ref.status for ref in refs} == {"pending"}
    for ref in refs:
        ref.cancel()
    await until(lambda: not router.in_flight and not router.queued, 60)

    await serve.run(Model.options(max_ongoing_requests=1, max_queued_requests=3).bind(), route_prefix=None)
    await until(lambda: router.entry.max_queued_requests == 3)
    refs = [handle.gate.remote(i) for i in range(50)]
    # Three wait; one runs, and one may be there ahead of its turn, if the router knows already that they may.
    refused = [ref for ref in refs if ref.status == "error"]
    assert 45 <= len(refused) <= 47
    assert refs[-1] in refused
    with pytest.raises(serve.BackPressureError, match=r"3 may.*max_queued_requests"):
        await refused[0]
    for ref in refs:
        ref.cancel()
    await until(lambda: not router.in_flight and not router.queued, 60)
    assert await asyncio.wait_for(handle.remote(1), 20) == 2


@serve.deployment
class Full:
    def __init__(self, model):
        self.model = model

    async def own(self):
        raise serve.BackPressureError("not now", 7.5)

    async def all_at_once(self):
        refs = [self.model.gate.remote(i) for i in range(20)]
        while not any(ref.done() for ref in refs):
            await asyncio.sleep(0.01)
        refused = [ref for ref in refs if ref.done()]
        for ref in refs:
            ref.cancel()
        return len(refused), refused[-1].exception().retry_after_s

    async def __call__(self, request):
        await self.own()


@gen_cluster(client=True)
async def test_refusals_tell_when_to_come_back(c, s, a, b):
    """Also through another deployment and over HTTP; and calls that come before the limit is known count as well."""
    model = Model.options(max_ongoing_requests=1, max_queued_requests=3).bind()
    handle = await serve.run(Full.bind(model), port=0)
    refused, seconds = await asyncio.wait_for(handle.all_at_once.remote(), 10)
    assert refused in {15, 16}
    assert seconds == 1.0  # nothing is known yet

    with pytest.raises(serve.BackPressureError, match="not now") as error:
        await handle.own.remote()
    assert error.value.retry_after_s == 7.5
    async with httpx.AsyncClient() as http:
        answer = await http.get(await serve.url())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "8")


@pytest.mark.slow
def test_a_hundred_thousand_calls_at_once(client, handle):
    """How Dask users talk."""
    refs = [handle.remote(x) for x in range(100_000)]
    assert [ref.result(60) for ref in refs] == list(range(1, 100_001))


def test_the_defaults():
    options = config.DeploymentOptions()
    assert (options.num_replicas, options.max_ongoing_requests, options.threads) == (1, 100, 1)
    assert (options.max_queued_requests, options.max_replicas_per_worker, options.request_timeout_s) == (None,) * 3
    assert options.graceful_shutdown_timeout_s == 20
    http = config.HTTPOptions()
    assert (http.host, http.port, http.num_proxies) == ("127.0.0.1", None, 1)
    assert (http.request_timeout_s, http.body_limit) == (60, 100 * 2**20)
    assert (forward.MAX_QUEUED, stream.STREAM_IDLE) == (10_000, 60)
    assert DeploymentHandle("a", "b") == DeploymentHandle("a", "b", request_timeout_s=None, retries_on_loss=None)


# -- two clusters in one session ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def two_clusters(loop: Any) -> Iterator[tuple[Client, Client]]:
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        clusters = [stack.enter_context(LocalCluster(loop=loop, dashboard_address=":0", **options)) for _ in range(2)]
        one, two = (stack.enter_context(Client(cluster, loop=loop)) for cluster in clusters)
        yield one, two


def test_handles_and_refs_belong_to_their_cluster(loop):
    with two_clusters(loop) as (one, two):
        first = serve.run(Model.bind(), route_prefix=None, client=one)
        second = serve.run(Model.bind(), route_prefix=None, client=two)
        home = {client: client.scheduler.address for client in (one, two)}
        assert first != second

        def seen(handle: DeploymentHandle) -> str:
            return handle.scheduler.remote().result(10)[1]

        for default in (one, two):
            with default.as_current():
                assert (seen(first), seen(second)) == (home[one], home[two])
                # By name, it is that of the client which is the default now.
                assert seen(serve.get_app_handle()) == seen(Model.get_handle()) == home[default]
                assert seen(serve.get_app_handle(client=one)) == home[one]
                # Refs are promoted in their own cluster.
                ref = first.remote(1)
                assert one.gather(ref) == 2
                assert one.submit(lambda x: x, ref).result(10) == 2
        # In threads, which know no current client, and in loops of their own.
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend([seen(first), seen(second)]))
        thread.start()
        thread.join(20)
        assert found == [home[one], home[two]]

        async def main() -> list[str]:
            refs = [await handle.options(sync=False).scheduler.remote() for handle in (first, second)]
            return [address for _, address in await asyncio.gather(*refs)]

        assert asyncio.run(main()) == [home[one], home[two]]
        # One that goes does not take the other along.
        serve.shutdown(client=two)
        two.close()
        assert seen(first) == home[one]
        # Its workers are in this process, and say what they know.
        with pytest.raises(serve.DeploymentUnavailableError, match="default/Model"):
            second.remote(1).result(10)
        serve.shutdown(client=one)
