"""The part of the controller that hears of loads and decides on numbers, without a cluster."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributed.utils_test import gen_test
from helpers import until

from dask_serve.config import AutoscalingConfig, DeploymentOptions
from dask_serve.controller import scaling, targets
from dask_serve.controller.editor import Editor
from dask_serve.controller.events import Events
from dask_serve.controller.registry import Registry
from dask_serve.controller.replica import Replica
from dask_serve.controller.scaling import Scaling
from dask_serve.controller.store import Store
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.policy.history import By


class FakeScheduler:
    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log_event(self, topic: str, message: Any) -> None:
        self.logged.append((topic, message))


class Setup:
    """A controller's parts around `Scaling`, and how often it had the others woken."""

    def __init__(self, deployments: int = 1, replicas: int = 1, **config: Any) -> None:
        config = {"max_replicas": 50, **config}
        options = DeploymentOptions(num_replicas="auto", autoscaling_config=AutoscalingConfig(**config))
        specs = [
            DeploymentSpec(name=f"d{n}", revision=f"r{n}", options=options, methods=["__call__"])
            for n in range(deployments)
        ]
        self.registry = Registry()
        self.registry.deploy(
            ApplicationSpec(name="app", route_prefix=None, ingress="d0", deployments=specs),
            {spec.revision: b"" for spec in specs},
        )
        for spec in specs:
            for number in range(replicas):
                replica = Replica("app", spec, f"tcp://w{number}", 0.0)
                self.registry.add(replica)
                replica.move("ready")
        self.registry.tidy([f"app/{spec.name}" for spec in specs])
        self.scheduler = FakeScheduler()
        self.events = Events(self.scheduler)
        self.woken = 0
        self.scaling = Scaling(self.registry, self.events, self.wake)

    def wake(self) -> None:
        self.woken += 1

    def target(self, name: str = "d0") -> int:
        return self.registry.targets[f"app/{name}"]

    async def until(self, target: int, timeout: float = 2.0) -> None:
        deadline = time.monotonic() + timeout
        while self.target() != target:
            assert time.monotonic() < deadline, f"{self.target()} is not {target} after {timeout} s"
            await asyncio.sleep(0.005)


@gen_test()
async def test_loads_of_workers_and_callers_add_up():
    setup = Setup(replicas=2)
    one, two = setup.registry.replicas.values()
    setup.scaling.runs("tcp://w0", {one.id: 4.0})
    setup.scaling.runs("tcp://w1", {two.id: 5.0, "app/d0/gone": 100.0})
    setup.scaling.waits("a", 1, {"app/d0": 3.0})
    setup.scaling.waits("b", 1, {"app/d0": 8.0, "app/unknown": 100.0})
    await setup.until(10)
    assert setup.woken == 1
    (event,) = setup.events.latest()
    assert event.text == "2 → 10 replicas, because 9 requests run and 11 wait; 2 to each replica makes 10"
    assert setup.scheduler.logged == [
        ("dask-serve", {"action": "scaled", "subject": "app/d0", "text": event.text}),
    ]
    # What drains is as good as answered.
    two.move("drain")
    setup.scaling.decide()
    assert setup.scaling.loads()["app/d0"].running == 4.0
    setup.scaling.close()


@gen_test()
async def test_reports_may_overtake_each_other():
    setup = Setup()
    setup.scaling.waits("a", 2, {"app/d0": 4.0})
    setup.scaling.waits("a", 1, {"app/d0": 40.0})
    await setup.until(2)
    setup.scaling.close()


@gen_test()
async def test_what_is_lost_or_silent_does_not_count(monkeypatch):
    monkeypatch.setattr(scaling, "EXPIRES", 0.8)
    setup = Setup(downscale_delay_s=0.0)
    setup.scaling.waits("a", 1, {"app/d0": 12.0}, "Client-1")
    await setup.until(6)
    setup.scaling.lost("Client-1")
    await setup.until(1)
    setup.scaling.waits("b", 1, {"app/d0": 12.0})
    await setup.until(6)
    await setup.until(1)
    setup.scaling.close()


@gen_test()
async def test_many_reports_are_few_decisions():
    setup = Setup()
    decided = 0
    decide = setup.scaling.decide

    def count() -> None:
        nonlocal decided
        decided += 1
        decide()

    setup.scaling.decide = count  # type: ignore[method-assign]
    began = time.monotonic()
    for number in range(200):
        setup.scaling.waits("a", number, {"app/d0": number % 7})
        await asyncio.sleep(0.001)
    assert decided <= (time.monotonic() - began) / scaling.LEAST + 2
    setup.scaling.close()


@gen_test()
async def test_another_application_of_the_name_begins_anew():
    setup = Setup()
    setup.scaling.waits("a", 1, {"app/d0": 20.0})
    await setup.until(10)
    spec = setup.registry.applications["app"].spec
    code = {deployment.revision: b"" for deployment in spec.deployments}
    setup.registry.deploy(spec, code)
    assert setup.registry.target("app", spec.deployments[0]) == 10
    setup.scaling.waits("a", 2, {})
    setup.registry.delete("app")
    for replica in list(setup.registry.replicas.values()):
        replica.move("lost")
    setup.registry.deploy(spec, code)
    setup.scaling.decide()
    assert setup.target() == 1
    setup.scaling.close()


@gen_test()
async def test_a_round_of_decisions_is_short():
    setup = Setup(deployments=100, replicas=10)
    for worker in range(200):
        mine = list(setup.registry.replicas)[5 * worker : 5 * worker + 5]
        setup.scaling.runs(f"tcp://w{worker}", dict.fromkeys(mine, 4.0))
    await setup.until(20)
    times = []
    for _ in range(51):
        began = time.thread_time()
        setup.scaling.decide()
        times.append(time.thread_time() - began)
    # The scheduler's loop does nothing else meanwhile. (One of them may meet a collection of all garbage.)
    assert sorted(times)[25] < 0.005, times
    setup.scaling.close()


def test_the_number_at_the_beginning():
    assert Setup(replicas=0).registry.target("app", _spec(Setup(replicas=0))) == 1
    for config, expected in [
        ({"min_replicas": 0}, 1),
        ({"min_replicas": 0, "initial_replicas": 0}, 0),
        ({"min_replicas": 3}, 3),
        ({"initial_replicas": 4}, 4),
    ]:
        setup = Setup(replicas=0, **config)
        assert setup.registry.target("app", _spec(setup)) == expected, config
    # It had more before.
    setup = Setup(replicas=0)
    setup.registry.targets.clear()
    spec = _spec(setup)
    for _ in range(7):
        setup.registry.add(Replica("app", spec, "tcp://w", 0.0))
    assert setup.registry.target("app", spec) == 7


def test_nothing_runs_without_requests_and_is_something_to_go_back_to():
    setup = Setup(min_replicas=0)
    (replica,) = setup.registry.replicas.values()
    replica.move("lost")
    setup.registry.set_target("app/d0", 0, "it is a test")
    spec = setup.registry.applications["app"].spec
    deployments = [msgspec.structs.replace(_spec(setup), revision="other")]
    setup.registry.deploy(msgspec.structs.replace(spec, deployments=deployments), {"other": b""})
    assert setup.registry.applications["app"].before == spec


def test_those_of_workers_that_leave_are_replaced_where_threads_are_taken():
    setup = Setup(replicas=2)
    assert setup.registry.is_extra("app/d0", _spec(setup))
    setup.registry.leaving.add("tcp://w1")
    assert not setup.registry.is_extra("app/d0", _spec(setup))


def _spec(setup: Setup) -> DeploymentSpec:
    return setup.registry.applications["app"].spec.deployments[0]


@pytest.mark.parametrize("reached", [False, True])
def test_what_has_not_run_yet_is_not_stopped_for_want_of_requests(reached):
    setup = Setup(replicas=int(reached), min_replicas=0)
    assert ("d0" in setup.registry.applications["app"].reached) is reached
    (config,) = setup.registry.scaled().values()
    assert config.min_replicas == (0 if reached else 1)


async def _opened(path: Path, setup: Setup) -> Editor:
    editor = Editor(setup.registry, setup.wake)
    assert editor.open(Store(path)) is None
    assert editor.trouble == []
    return editor


@gen_test()
async def test_a_scheduler_that_comes_back_begins_with_what_loads_had_led_to(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SETTLE", 0.1)
    first = Setup(deployments=3)
    editor = await _opened(tmp_path / "state", first)
    spec = first.registry.applications["app"].spec
    await editor.deploy(spec, dict(first.registry.code), By("ann", "c"))
    writes = []
    save = editor.store.save_targets

    async def counted(numbers: dict[str, int]) -> None:
        await save(numbers)
        writes.append(dict(numbers))

    editor.store.save_targets = counted
    for number in range(2, 12):
        first.registry.set_target("app/d0", number, "it is a test")
        editor.flush()
    await until(lambda: writes)
    assert writes == [{"app/d0": 11, "app/d1": 1, "app/d2": 1}]
    # What was not written yet is, at the end.
    first.registry.set_target("app/d1", 60, "it is a test")
    editor.flush()
    await editor.close()
    assert len(writes) == 2

    second = Setup(deployments=3, replicas=0)
    second.registry.applications.clear()
    second.registry.targets.clear()
    editor = await _opened(tmp_path / "state", second)
    specs = second.registry.applications["app"].spec.deployments
    # Within what its options allow.
    assert [second.registry.target("app", one) for one in specs] == [11, 50, 1]
    assert second.registry.reasons["app/d0"] == "as before the scheduler was started again"
    second.scaling.decide()
    assert second.target() == 11
    await editor.close()
    second.scaling.close()
