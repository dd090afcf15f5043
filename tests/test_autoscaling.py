"""Replicas that follow the load, on real worker processes."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client
from helpers import local_client

import dask_serve as serve
from dask_serve.controller.status import DeploymentStatus, ServeStatus
from dask_serve.exceptions import ConfigError, RequestTimeoutError

QUICK = {"max_replicas": 4, "downscale_delay_s": 0.5}


def until(met: Callable[[], Any], timeout: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := met()):
        assert time.monotonic() < deadline, f"not met after {timeout} s"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(2, 4) as client:
        yield client


@pytest.fixture
def run(client) -> Iterator[Callable[..., Any]]:
    """Deploys an application for one test."""

    def run(app: Any, name: str = "app", **options: Any) -> Any:
        return serve.run(app, name=name, route_prefix=options.pop("route_prefix", None), client=client, **options)

    yield run
    for name in list(serve.status(client=client).applications):
        serve.delete(name, client=client)


@serve.deployment(autoscaling_config=QUICK)
class Model:
    def __init__(self, wait: float = 0.0) -> None:
        time.sleep(wait)

    async def __call__(self, request: Any = None) -> str:
        return "called"

    async def slow(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id


def scaled(**config: Any) -> Any:
    return Model.options(autoscaling_config={**QUICK, **config})


def deployment(client: Client, app: str = "app", name: str = "Model") -> DeploymentStatus:
    status: ServeStatus = serve.status(client=client)
    return status.applications[app].deployments[name]


def ids(client: Client) -> set[str]:
    return {replica.id for replica in deployment(client).replicas}


def until_zero(client: Client, name: str = "Model") -> None:
    until(lambda: (d := deployment(client, name=name)).target == 0 and not d.replicas)


# -- up and down


def scalings(client) -> list[str]:
    return [event.text for event in serve.status(client=client).events if event.kind == "scaled"]


def test_up_at_once_and_down_after_the_delay(client, run):
    handle = run(scaled(downscale_delay_s=1.0).bind())
    first = ids(client)
    assert len(first) == 1
    began = time.monotonic()
    refs = [handle.slow.remote(2.0) for _ in range(20)]
    until(lambda: deployment(client).counts.get("ready", 0) > 1)
    assert time.monotonic() - began < 1.5
    until(lambda: deployment(client).counts == {"ready": 4})
    status = serve.status(client=client)
    grown = status.applications["app"].deployments["Model"]
    assert (grown.target, grown.autoscaling.min_replicas, grown.autoscaling.max_replicas) == (4, 1, 4)
    assert "20 requests run and 0 wait; 2 to each replica makes 10, but max_replicas=4" in grown.autoscaling.why
    assert status.loads["app/Model"].needed == 4
    assert scalings(client)[-1].startswith("1 → 4 replicas, because 20 requests run")
    for ref in refs:
        ref.result(20)
    ended = time.monotonic()
    until(lambda: deployment(client).target == 1)
    # Until then a mean of the last second may still count.
    assert 0.5 < time.monotonic() - ended < 6.0
    until(lambda: deployment(client).counts == {"ready": 1})
    assert ids(client) == first
    logged = [event["text"] for _, event in client.get_events("dask-serve")]
    assert any(text.startswith("4 → 1 replicas") for text in logged)
    shown = str(serve.status(client=client))
    assert "1 of 1 to 4, since" in shown
    assert "load of app/Model: 0 requests run, 0 wait, 1 replicas needed" in shown


def test_what_waits_at_routers_counts_whoever_waits(client, run):
    handle = run(scaled(target_ongoing_requests=1).options(max_ongoing_requests=1).bind(), route_prefix="/waits")
    url = serve.url(client=client) + "/waits"
    refs = [handle.slow.remote(600) for _ in range(3)]
    # One replica for each that waits, wherever it does: these three are taken, so that a fourth answers HTTP.
    until(lambda: deployment(client).counts.get("ready") == 3)
    assert urllib.request.urlopen(url, timeout=30).read() == b"called"
    assert {ref.status for ref in refs} == {"pending"}
    for ref in refs:
        ref.cancel()


def test_constant_load_moves_nothing(client, run):
    # Reports of two workers may count a request twice that has just gone from one to the other.
    handle = run(scaled(target_ongoing_requests=3).bind())
    stop = time.monotonic() + 3.0

    def ask() -> None:
        while time.monotonic() < stop:
            handle.slow.remote(0.2).result(20)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: deployment(client).target == 2)
    number = len(scalings(client))
    until(lambda: time.monotonic() > stop - 0.3)
    events = scalings(client)
    for thread in threads:
        thread.join()
    # A thread that comes late is a call less, for a moment.
    assert len(events) <= number + 1, events


# -- zero


def test_from_zero_the_first_request_waits_and_is_answered(client, run):
    handle = run(scaled(min_replicas=0, downscale_delay_s=0.1).bind(), route_prefix="/zero")
    assert deployment(client).target == 1
    url = serve.url(client=client)
    until_zero(client)
    assert serve.status(client=client).applications["app"].status == "running"
    assert urllib.request.urlopen(url + "/-/readyz").read() == b"ready"
    began = time.monotonic()
    assert handle.remote().result(20) == "called"
    assert time.monotonic() - began < 1.0
    until_zero(client)
    began = time.monotonic()
    assert urllib.request.urlopen(url + "/zero").read() == b"called"
    assert time.monotonic() - began < 1.0
    until_zero(client)

    async def ask() -> list[str]:
        async with Client(client.scheduler.address, asynchronous=True) as mine:
            handle = await serve.get_app_handle("app", client=mine)
            return [await handle.remote() for _ in range(2)]

    assert asyncio.run(ask()) == ["called"] * 2


def test_from_zero_through_another_deployment(client, run):
    @serve.deployment
    class Front:
        def __init__(self, model: Any) -> None:
            self.model = model

        async def __call__(self) -> str:
            return await self.model.remote()

    handle = run(Front.bind(scaled(min_replicas=0, initial_replicas=0).bind()))
    assert deployment(client).replicas == []
    assert handle.remote().result(20) == "called"


def test_from_zero_within_the_deadline(client, run):
    handle = run(scaled(min_replicas=0, initial_replicas=0).options(resources={"unobtainium": 1}).bind())
    with pytest.raises(RequestTimeoutError, match="has no ready replica"):
        handle.options(request_timeout_s=0.5).remote().result(20)
    until(lambda: "no worker has resources unobtainium=1 free" in deployment(client).message)
    # Nobody waits any more: nothing is wanted any more.
    until(lambda: deployment(client).target == 0)


# -- changes


def test_changes_restart_nothing(client, run):
    run(Model.options(num_replicas=3).bind())
    three = ids(client)
    handle = run(scaled(max_replicas=4, downscale_delay_s=600).bind())
    assert deployment(client).target == 3
    assert ids(client) == three
    # Those that were started without it report their load too.
    refs = [handle.slow.remote(2.5) for _ in range(8)]
    until(lambda: len(ids(client)) == 4)
    four = ids(client)
    assert three < four
    for ref in refs:
        ref.result(20)
    run(scaled(max_replicas=2, min_replicas=2).bind())
    until(lambda: deployment(client).counts == {"ready": 2})
    assert ids(client) < four
    two = ids(client)
    run(Model.options(num_replicas=2).bind())
    assert deployment(client).autoscaling is None
    assert serve.status(client=client).loads == {}
    assert ids(client) == two


def test_replicas_beyond_the_least_need_free_threads(client, run):
    handle = run(scaled(max_replicas=50, downscale_delay_s=600).options(threads=2).bind())
    refs = [handle.slow.remote(1.0) for _ in range(20)]
    until(lambda: deployment(client).counts.get("ready") == 4)
    found = until(lambda: (d := deployment(client)).message and d)
    assert found.status == "running"
    assert "6 of 10 replicas wait for a worker: no worker has a thread that no replica uses" in found.message
    for ref in refs:
        ref.result(20)


# -- policies

POLICY = """
def constant(context, replicas):
    assert context.app == "app" and context.deployment == "Model" and context.ready >= 0
    return replicas, f"it is always {replicas}"

def broken(context):
    raise RuntimeError("no idea")
"""


@pytest.fixture
def policies(tmp_path, monkeypatch) -> Iterator[str]:
    (tmp_path / "policies_of_mine.py").write_text(POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "policies_of_mine"
    sys.modules.pop("policies_of_mine", None)


def test_policy(client, run, policies):
    run(scaled(policy=[f"{policies}:constant", {"replicas": 3}]).bind())
    until(lambda: deployment(client).counts.get("ready") == 3)
    assert "the policy asks for 3: it is always 3" in deployment(client).autoscaling.why
    run(scaled(policy=[f"{policies}:constant", {"replicas": 2}]).bind())
    until(lambda: deployment(client).counts == {"ready": 2})
    handle = run(scaled(policy=f"{policies}:broken").bind())
    until(lambda: "no idea" in serve.status(client=client).loads["app/Model"].policy_error)
    refs = [handle.slow.remote(1.0) for _ in range(8)]
    until(lambda: deployment(client).target == 4)
    for ref in refs:
        ref.result(20)


def test_policy_that_cannot_be_imported_deploys_nothing(client, run, policies):
    with pytest.raises(ConfigError, match=r"nothing_here:f.*cannot be imported where the scheduler runs"):
        run(scaled(policy="nothing_here:f").bind())
    with pytest.raises(ConfigError, match="has no attribute 'missing'"):
        run(scaled(policy=f"{policies}:missing").bind())
    assert serve.status(client=client).applications == {}
