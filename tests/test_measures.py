"""What is counted, and how counts of many processes become one."""

from __future__ import annotations

import bisect

import pytest
from helpers import embedded_client, http_client, wait_until
from hypothesis import given
from hypothesis import strategies as st

import dask_serve as serve
from dask_serve.measures.counts import HttpCounts, ReplicaCounts
from dask_serve.measures.histogram import BOUNDS, Histogram
from dask_serve.measures.totals import Totals
from dask_serve.replica.ledger import KEPT, Ledger

durations = st.lists(st.floats(0.0, 100.0), max_size=50)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(durations, durations)
def test_histograms_add_up_and_travel(first, second):
    both = histogram_of(first + second)
    merged = Histogram(histogram_of(first).export())
    merged.merge(histogram_of(second))
    assert merged.counts == both.counts
    assert merged.total == len(first) + len(second)
    assert merged.seconds == pytest.approx(sum(first + second))
    assert both.since(histogram_of(first)).counts == histogram_of(second).counts


@given(durations.filter(bool), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, share):
    true = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    told = histogram_of(values).quantile(share)
    bucket = min(bisect.bisect_left(BOUNDS, true), len(BOUNDS) - 1)
    low, high = (BOUNDS[bucket - 1] if bucket else 0.0), BOUNDS[bucket]
    assert low <= told <= high
    assert Histogram().quantile(share) is None


def replica_counts(answered: int) -> ReplicaCounts:
    counts = ReplicaCounts()
    counts.answered = answered
    return counts


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(0, 9), st.booleans())))
def test_totals_never_shrink_whatever_restarts(steps):
    totals, alive, life, expected = Totals(ReplicaCounts), {}, {}, {"x": 0, "y": 0}
    for source, deployment, more, restarts in steps:
        if restarts:
            alive.pop(source, None)
            life[source] = life.get(source, 0) + 1
            totals.gone(f"{source}{life[source] - 1}")
        counted = alive.setdefault(source, {})
        counted[deployment] = counted.get(deployment, 0) + more
        expected[deployment] += more
        told = {name: replica_counts(number) for name, number in counted.items()}
        totals.tell(f"{source}{life.get(source, 0)}", told)
        sums = totals.by_deployment()
        assert {name: sums[name].answered for name in sums} == {name: n for name, n in expected.items() if name in sums}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from(["more", "ends", "later"]))))
def test_a_ledger_never_forgets_and_tells_replicas_long_enough(steps):
    now = 0.0
    ledger, alive, ended, expected = Ledger(lambda: now), {}, {}, 0
    for number, (slot, more, step) in enumerate(steps):
        if step == "later":
            now += KEPT / 2
        elif step == "ends":
            if slot in alive:
                replica, _ = alive.pop(slot)
                ledger.close(replica)
                ended[replica] = now
        else:
            if slot not in alive:
                alive[slot] = (f"app/d/{number}", ledger.open("app/d", f"app/d/{number}"))
            alive[slot][1].answered += more
            expected += more
        told = {replica for _, replica, _ in ledger.by_replica()}
        assert told == {replica for replica, _ in alive.values()} | {r for r, at in ended.items() if now - at <= KEPT}
        sums = ledger.by_deployment()
        assert sum(counts.answered for counts in sums.values()) == expected


def test_counts_survive_the_trip():
    counts = ReplicaCounts()
    counts.answered, counts.wasted = 3, 0.5
    counts.ran.add(0.02)
    again = ReplicaCounts.read(counts.export())
    assert (again.answered, again.wasted, again.ran.counts) == (3, 0.5, counts.ran.counts)
    http = HttpCounts()
    http.add(200, 0.1)
    http.add(503, 0.001)
    http.waited.add(0.01)
    first = HttpCounts.read(http.export())
    http.add(200, 0.2)
    later = http.since(first)
    assert (later.statuses, later.took.total, later.waited.total) == ({200: 1}, 1, 0)
    assert HttpCounts.read(http.export()).statuses == http.statuses


@serve.deployment
class Counted:
    def __call__(self) -> str:
        return "x"

    def fail(self) -> None:
        raise ValueError


@pytest.fixture(scope="module")
def client():
    with embedded_client(1, 2) as client:
        yield client


def counted(dask_scheduler=None):
    """Return what the controller has counted, as plain data."""
    measures = dask_scheduler.plugins["dask-serve"].measures
    return (
        {name: counts.export() for name, counts in measures.replicas().items()},
        {name: counts.export() for name, counts in measures.http().items()},
    )


def test_the_controller_knows_what_all_processes_counted(client):
    handle = serve.run(Counted.bind(), name="counted", route_prefix="/counted", client=client)
    with http_client(serve.url(client=client)) as http:
        for _ in range(20):
            assert http.get("/counted").status_code == 200
        assert http.get("/nowhere").status_code == 404
        assert http.get("/counted", headers={"X-Request-Timeout-Seconds": "never"}).status_code == 400
    for _ in range(10):
        assert handle.remote().result(10) == "x"
    for _ in range(5):
        assert isinstance(handle.fail.remote().exception(10), ValueError)
    # The replica is replaced by another revision, and what it counted stays.
    serve.run(Counted.options(version="2").bind(), name="counted", route_prefix="/counted", client=client)
    assert handle.remote().result(10) == "x"

    def complete():
        replicas, http = client.run_on_scheduler(counted)
        done = replicas.get("counted/Counted", {})
        if done.get("answered") != 31 or "counted/Counted" not in http or "" not in http:
            return None
        return replicas, http

    replicas, http = wait_until(complete)
    done = replicas["counted/Counted"]
    assert done["failed"] == 5
    assert Histogram(done["ran"]).total == Histogram(done["waited"]).total == 36
    assert http["counted/Counted"]["statuses"] == {"200": 20, "400": 1}
    assert Histogram(http["counted/Counted"]["took"]).total == 21
    assert http[""]["statuses"]["404"] == 1
