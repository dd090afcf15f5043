"""`serve.status()`: what it tells of replicas, errors and decisions, as text and in a notebook."""

from __future__ import annotations

import asyncio
import time
from html.parser import HTMLParser
from typing import Any

import pytest
from distributed import Client
from helpers import wait_until

import dask_serve as serve
from dask_serve.controller.errors import KEPT, Errors
from dask_serve.controller.events import Event
from dask_serve.controller.status import (
    ApplicationStatus,
    AutoscalingStatus,
    DeploymentStatus,
    ErrorStatus,
    ProxyStatus,
    ReplicaStatus,
    ServeStatus,
    decode_status,
    encode_status,
)

EVIL = "<script>alert(1)</script>&\"'"


@serve.deployment(max_ongoing_requests=2)
class Model:
    async def waits(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def fails(self, number: int) -> None:
        raise LookupError(f"no such thing: {number}")

    @serve.multiplexed(max_num_models_per_replica=2)
    async def model(self, name: str) -> str:
        return name

    async def named(self) -> str:
        return str(await self.model(serve.get_multiplexed_model_id()))


def deployment() -> DeploymentStatus:
    return serve.status().applications["status"].deployments["Model"]


@pytest.fixture(scope="module")
def served(shared_cluster: str) -> Any:
    """A deployment whose requests wait, fail and load models."""
    with Client(shared_cluster) as client:
        with serve.run(Model.bind(), name="status", route_prefix=None) as handle:
            yield handle
        serve.shutdown(client=client)


def test_what_a_replica_does(served: Any) -> None:
    before = time.time()
    handle = served
    handle.named.options(multiplexed_model_id="small").remote().result()
    refs = [handle.waits.remote(30) for _ in range(6)]
    try:
        found = wait_until(lambda: (one := deployment()).in_flight == 2 and one.queued == 4 and one)
        (replica,) = found.replicas
        assert (replica.state, replica.in_flight) == ("ready", 2)
        assert before - 60 < replica.since <= time.time()
        assert replica.memory > 10_000_000
        assert replica.models == ["small"]
        assert found.revision == replica.revision
        assert found.decision == ""
        text = str(serve.status())
        assert "2 in flight, 4 queued" in text
        assert "models small" in text
        assert text == repr(serve.status()) or "queued" in repr(serve.status())
    finally:
        for ref in refs:
            ref.cancel()


def test_the_last_errors_have_their_tracebacks(served: Any) -> None:
    for number in range(3):
        assert isinstance(served.fails.options(request_id=f"id-{number}").remote(number).exception(), LookupError)
    error = wait_until(lambda: deployment().errors)[0]
    assert error.request_id == "id-0"
    assert error.replica.startswith("status/Model/")
    assert error.summary == "LookupError: no such thing: 0"
    assert 'in fails\n    raise LookupError(f"no such thing' in error.traceback
    # One a second is told, and how many there were.
    time.sleep(1.1)
    served.fails.remote(3).exception()
    last = wait_until(lambda: len(deployment().errors) > 1 and deployment().errors[-1])
    assert last.count == 3
    assert "last error" in str(serve.status())


def test_why_something_is_under_way(served: Any) -> None:
    ref = served.waits.remote(30)
    wait_until(lambda: deployment().in_flight == 1)
    try:
        serve.run(Model.options(version="2").bind(), name="status", route_prefix=None)
        found = deployment()
        old = next(replica for replica in found.replicas if replica.state == "draining")
        assert old.message == f"revision {found.revision[:8]} takes its place"
        assert old.revision != found.revision
        assert "ending 1 replica, once" in found.decision
    finally:
        ref.cancel()
    wait_until(lambda: deployment().decision == "")


# -- pure --------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects tags, attributes and text, and checks that all that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags._open
    return tags


def evil_status() -> ServeStatus:
    replica = ReplicaStatus(
        id=f"a/b/{EVIL}",
        state=EVIL,
        worker=EVIL,
        revision=EVIL,
        message=EVIL,
        devices=[EVIL],
        models=[EVIL],
        environment=EVIL,
        since=1.0,
        memory=5,
    )
    error = ErrorStatus(time=1.0, replica=EVIL, request_id=EVIL, traceback=f"x\n{EVIL}", count=2)
    deployment = DeploymentStatus(
        status="failed",
        message=EVIL,
        target=1,
        counts={"ready": 1},
        replicas=[replica],
        setback=f"{EVIL}!",
        autoscaling=AutoscalingStatus(min_replicas=1, max_replicas=2, why=EVIL),
        revision=EVIL,
        decision=EVIL,
        errors=[error],
        queued=1,
    )
    application = ApplicationStatus(
        status="failed",
        message=EVIL,
        route_prefix=f"/{EVIL}",
        ingress=EVIL,
        deployments={EVIL: deployment},
        version=1,
        owner=EVIL,
        reason=EVIL,
    )
    return ServeStatus(
        applications={EVIL: application},
        proxies=[ProxyStatus(state=EVIL)],
        url=f"http://x/{EVIL}",
        message=EVIL,
        events=[Event(time=1.0, kind="scaled", subject=EVIL, text=EVIL)],
    )


def test_html_escapes_everything() -> None:
    status = evil_status()
    whole = parsed(status._repr_html_())
    allowed = {"div", "span", "b", "a", "code", "table", "tr", "th", "td", "details", "summary", "pre"}
    assert whole.tags <= allowed
    assert whole.attributes <= {"style", "href", "target", "title"}
    # Each place where the text stands: url, messages, names, states, and so on.
    assert whole.text.count(EVIL) > 20
    application = status.applications[EVIL]
    for part in (application, application.deployments[EVIL]):
        assert EVIL in parsed(part._repr_html_()).text
    assert "javascript" not in ServeStatus(url="javascript:alert(1)")._repr_html_().partition("<code>")[0]
    assert "no applications" in parsed(ServeStatus()._repr_html_()).text


def test_it_travels_and_older_ones_are_read() -> None:
    status = evil_status()
    assert decode_status(encode_status(status)) == status
    older = {"applications": {}, "proxies": [{"slot": 1, "more": 2}], "workers": [], "url": "", "message": ""}
    import msgspec

    read = decode_status(msgspec.msgpack.encode(older))
    assert (read.applications, read.proxies) == ({}, [ProxyStatus(slot=1)])


def test_many_replicas_are_counted() -> None:
    replicas = [ReplicaStatus(id=f"a/b/{i}", state="ready", worker="tcp://w", revision="r") for i in range(50)]
    one = DeploymentStatus(status="running", message="", target=50, counts={"ready": 50}, replicas=replicas)
    assert "and 30 more" in parsed(one._repr_html_()).text


def test_errors_are_kept_by_deployment() -> None:
    class Registry:
        applications = {"a": object()}

    errors = Errors(Registry())  # type: ignore[arg-type]
    for number in range(KEPT + 2):
        errors.add("a/b/c", float(number), "id", f"E{number}", 1, later_field=1)
    errors.add("gone/b/c", 0.0, "id", "E", 1)
    assert [error.summary for error in errors.of("a/b")] == [f"E{number}" for number in range(2, KEPT + 2)]
    assert errors.of("gone/b") == []
    Registry.applications = {}
    errors.add("a/b/c", 0.0, "id", "E", 1)
    assert errors.of("a/b") == []
