"""What the dashboard remembers: amounts by second, bounded; and the rows of one moment."""

from __future__ import annotations

from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.controller.status import ApplicationStatus, DeploymentStatus, ReplicaStatus, ServeStatus, WorkerStatus
from dask_serve.dashboard.history import ALL, History, Levels, Tellers, difference
from dask_serve.dashboard.series import COLUMNS, columns, status_class
from dask_serve.dashboard.snapshot import by_worker, take
from dask_serve.measures.counts import HttpCounts, ReplicaCounts

KEY = ("answered", 0)


def total(history: History, deployment: str, begin: int = 0, end: int = 2000) -> float:
    return sum(history.amounts(second, deployment).get(KEY, 0.0) for second in range(begin, end))


spans = st.tuples(st.floats(1000, 1099), st.floats(0, 60), st.sampled_from(["a/x", "a/y"]), st.integers(1, 1000))


@given(st.lists(spans, max_size=20))
def test_spreading_loses_and_doubles_nothing(told):
    history = History()
    for begin, length, deployment, amount in told:
        history.add(begin, begin + length, deployment, {KEY: amount})
    for name in ("a/x", "a/y"):
        assert total(history, name) == pytest.approx(sum(amount for _, _, of, amount in told if of == name))
    assert total(history, ALL) == pytest.approx(sum(amount for *_, amount in told))


@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from("abcdef")), max_size=200))
def test_it_is_bounded(told):
    history = History(kept=20, rows=50)
    for at, deployment in told:
        history.add(at, at + 3, deployment, {KEY: 1})
        history.note(at, {deployment: Levels(running=1)})
        assert history.rows <= 50 + 14, "the newest second stays whatever it has"
    newest = max((at for at, _ in told), default=0) + 3
    assert history.oldest > newest - 20 or not told


def test_a_steady_load_is_even_however_it_is_told():
    history = History()
    tellers = Tellers(history)
    counts = HttpCounts()
    # A proxy tells every second, late at times.
    for second in range(20):
        for _ in range(100):
            counts.add(200, 0.02)
        tellers.told("proxy", 1000.0 + second + 0.1 * (second % 3), {"": counts.export()})
    data = columns(history, "", range(1002, 1017))
    assert data["2xx"] == [pytest.approx(100, rel=0.3)] * 15
    assert sum(data["2xx"]) == pytest.approx(1500, rel=0.02)
    assert data["took_p50"] == [pytest.approx(17.5)] * 15


def test_a_pause_is_a_pause():
    history = History()
    tellers = Tellers(history)
    counts = HttpCounts()
    counts.add(200, 0.01)
    tellers.told("proxy", 1000.0, {"": counts.export()})
    counts.add(503, 0.01)
    tellers.told("proxy", 1060.0, {"": counts.export()})
    data = columns(history, ALL, range(999, 1061))
    assert [number for number, value in enumerate(data["503"]) if value] == [60]
    assert sum(data["503"]) == sum(data["2xx"]) == 1
    assert isnan(data["took_p50"][30])
    assert set(data) == set(COLUMNS)
    assert {len(values) for values in data.values()} == {62}


def test_what_was_told_before_is_not_told_again():
    before, after = ReplicaCounts(), ReplicaCounts()
    for counts in (before, after, after):
        counts.answered += 1
        counts.wasted += 0.5
        counts.add(0.0001, 0.02)
    assert difference(before.export(), after.export()) == {
        ("answered", 0): 1,
        ("wasted", 0): 0.5,
        ("waited", 0): 1,
        ("ran", 5): 1,
    }
    assert difference(after.export(), after.export()) == {}
    assert difference({}, before.export())["answered", 0] == 1


def test_levels_stay_between_two_looks():
    history = History()
    history.note(1000.2, {"a/x": Levels(running=2, ready=1, wanted=1), "a/y": Levels(queued=3, ready=1, wanted=2)})
    assert history.levels(1004, ALL) == Levels(running=2, queued=3, ready=2, wanted=3)
    assert history.levels(1004, "a/y") == Levels(queued=3, ready=1, wanted=2)
    assert history.levels(1010, "a/y") is None
    assert history.levels(999, "a/y") is None


@pytest.mark.parametrize(
    ("status", "told"),
    [(200, "2xx"), (101, "2xx"), (404, "4xx"), (499, "499"), (503, "503"), (504, "5xx"), (599, "5xx")],
)
def test_classes_of_answers(status, told):
    assert status_class(status) == told


def status(**options):
    replicas = [
        ReplicaStatus(id=f"a/x/{number}", state=state, worker=f"tcp://w{number % 2}", revision="r", in_flight=number)
        for number, state in enumerate(("ready", "ready", "starting"))
    ]
    deployment = DeploymentStatus(
        status="running", message="", target=3, counts={}, replicas=replicas, in_flight=3, queued=7
    )
    application = ApplicationStatus(
        status="running", message="", route_prefix="/", ingress="x", deployments={"x": deployment}
    )
    worker = WorkerStatus(
        address="tcp://w0",
        process="p",
        results=0,
        result_bytes=0,
        limit=None,
        replicas={"a/x/0": {"running": 4, "answered": 9, "failed": 1, "dropped": 2, "seconds_wasted": 0.126}},
        batches={"a/x/0": {"predict": {"batches": 2, "calls": 9}}},
        models={"a/x/0": ["m1", "m2"]},
    )
    given_ = {"applications": {"a": application}, "workers": [worker], "url": "http://here", **options}
    return ServeStatus(**given_)


NAMES = {"tcp://w0": "10", "tcp://w1": "9"}


def test_a_moment():
    snapshot = take(status(), NAMES)
    assert snapshot.trouble == []
    assert snapshot.levels == {"a/x": Levels(running=3, queued=7, ready=2, wanted=3)}
    first = snapshot.replicas[0]
    assert (first["worker"], first["escaped"], first["answered"], first["wasted"]) == ("10", "tcp%3A%2F%2Fw0", 9, 0.13)
    assert [row["model"] for row in snapshot.of(snapshot.models, "a/x")] == ["m1", "m2"]
    assert snapshot.of(snapshot.models, "a/y") == []
    workers = by_worker(snapshot.replicas)
    assert list(workers) == ["tcp://w1", "tcp://w0"], "by number, where names are numbers"
    assert (workers["tcp://w0"]["ready"], workers["tcp://w0"]["starting"]) == (1, 1)


def test_what_is_missing_says_what_to_do():
    (text, http) = take(ServeStatus(), {}).trouble
    assert "serve.run(app)" in text
    assert "serve.start()" in http
    assert "cluster.scale(2)" in take(status(), {}).trouble[0]
    assert take(status(url="", message="the proxies could not be started: x"), NAMES).trouble == [
        "the proxies could not be started: x"
    ]
    (text,) = take(status(), NAMES, "ValueError: x").trouble
    assert "ValueError: x" in text
    assert "restart the scheduler" in text


@pytest.mark.parametrize(
    ("state", "message", "told"),
    [
        (
            "failed",
            "x: replica a/x/0 failed:\nTraceback:\n  code\nRuntimeError: no weights",
            "failed: RuntimeError: no weights",
        ),
        (
            "deploying",
            "x: 2 of 3 replicas wait for a worker: no GPU",
            "deploying: x: 2 of 3 replicas wait for a worker: no GPU",
        ),
        ("failed", "", "failed: See"),
        ("deploying", "", ""),
        ("unhealthy", "y" * 5000, "yyy..."),
    ],
)
def test_what_is_wrong_with_an_application_is_told_with_its_cause(state, message, told):
    application = ApplicationStatus(status=state, message=message, route_prefix="/", ingress="x", deployments={})
    trouble = take(status(applications={"a": application}), NAMES).trouble
    assert bool(trouble) == bool(told)
    for text in trouble:
        assert text.startswith(f"Application a is {state}: ")
        assert told in text
        assert text.endswith("See dask serve status.")
        assert len(text) < 500
