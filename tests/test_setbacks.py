"""What befell replicas that had been ready puts off the next ones, and gives no deployment up."""

from __future__ import annotations

import msgspec
import pytest

from dask_serve.config import DeploymentOptions
from dask_serve.controller.registry import FORGOTTEN, Registry
from dask_serve.controller.replica import Replica
from dask_serve.controller.views import Views
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.policy.reconcile import Attempts, Start, plan

KEY = ("app/d", "r1")


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    spec = DeploymentSpec(name="d", revision="r1", options=DeploymentOptions(), methods=[])
    registry.deploy(ApplicationSpec(name="app", route_prefix=None, ingress="d", deployments=[spec]), {"r1": b""})
    return registry


def replica(registry: Registry, now: float) -> Replica:
    return Replica("app", registry.applications["app"].deployments["d"], "tcp://w:1", now)


def test_each_one_waits_longer_and_none_is_the_last(registry):
    now, waits = 0.0, []
    for number in range(8):
        registry.count_setback(replica(registry, now), f"fell ill, {number}", now)
        todo = plan(registry.wanted(["app/d"]), [], registry.tries(), now)
        assert (todo.actions, todo.failed) == ([], frozenset())
        waits.append(todo.wake_at["app/d"] - now)
        now = todo.wake_at["app/d"]
        assert plan(registry.wanted(["app/d"]), [], registry.tries(), now).actions == [Start("app/d", "r1")]
    assert waits == pytest.approx([0.2, 1, 5, 25, 30, 30, 30, 30])
    status = Views(registry).statuses()["app"].deployments["d"]
    assert status.setback == "fell ill, 7 (8 times in a row)"
    assert status.setback in status.message


def test_they_are_forgotten(registry):
    registry.count_setback(replica(registry, 0), "once", 0)
    registry.count_setback(replica(registry, 0), "much later", FORGOTTEN + 1)
    assert registry.setbacks[KEY].failures == 1
    spec = registry.applications["app"].spec
    # Who deploys again means: try again.
    registry.deploy(spec, {})
    assert registry.setbacks == {}


def test_failed_starts_count_beside_them(registry):
    registry.count_setback(replica(registry, 0), "ill", 0)
    registry.attempts[KEY] = Attempts(failures=1, last=0, message="no start")
    assert registry.tries()[KEY].message == "no start"
    registry.count_setback(replica(registry, 0), "ill", 0.1)
    assert registry.tries()[KEY].message == "ill"
    registry.attempts[KEY] = msgspec.structs.replace(registry.attempts[KEY], failures=3)
    assert plan(registry.wanted(["app/d"]), [], registry.tries(), 0.2).failed == {"app/d"}
