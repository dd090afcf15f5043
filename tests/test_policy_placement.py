from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.placement import Need, WorkerView, place, wanted_workers


def worker(number: int, **fields) -> WorkerView:
    fields = {"nthreads": 4, "host": f"10.0.0.{number}", "name": f"w{number}", **fields}
    return WorkerView(address=f"tcp://{fields['host']}:{number}", **fields)


def test_no_workers():
    assert place(Need(), []).reason == "no workers are connected"


def test_none_running():
    choice = place(Need(), [worker(1, running=False)])
    assert choice.worker is None
    assert choice.reason == "no worker is running: all are paused or closing (workers: w1 at tcp://10.0.0.1:1)"


def test_named_workers():
    workers = [worker(1), worker(2), worker(3)]
    assert place(Need(workers=["w3"]), workers).worker == workers[2].address
    assert place(Need(workers=["tcp://10.0.0.2:2", "gone"]), workers).worker == workers[1].address
    assert "no worker is named 'w9' (workers: w1 at " in place(Need(workers=["w9"]), workers).reason


def test_resources_minus_bookings():
    workers = [worker(1, resources={"GPU": 2}, booked={"GPU": 1.5}), worker(2)]
    assert place(Need(resources={"GPU": 0.5}), workers).worker == workers[0].address
    assert place(Need(resources={"GPU": 1}), workers).reason == (
        "no worker has resources GPU=1 free "
        "(workers: w1 at tcp://10.0.0.1:1 (GPU: 0.5 of 2 free), w2 at tcp://10.0.0.2:2 (no GPU))"
    )


def test_tenths_add_up():
    assert place(Need(resources={"GPU": 0.1}), [worker(1, resources={"GPU": 1}, booked={"GPU": sum([0.1] * 9)})]).worker


def test_max_replicas_per_worker():
    workers = [worker(1, replicas=1), worker(2, replicas=1)]
    choice = place(Need(max_replicas_per_worker=1), workers)
    assert choice.worker is None
    assert "max_replicas_per_worker=1" in choice.reason
    assert place(Need(max_replicas_per_worker=2), workers).worker


def test_many_workers_are_not_all_listed():
    reason = place(Need(workers=["x"]), [worker(number) for number in range(1, 9)]).reason
    assert reason.endswith("and 3 more)")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The second is better each time.
        ({"failures": 1}, {"replicas": 5, "busy": 4}),
        ({"replicas": 1}, {"busy": 4, "threads": 9}),
        ({"busy": 4}, {"threads": 9}),
        ({"threads": 2}, {"threads": 1}),
        ({"threads": 2, "nthreads": 4}, {"threads": 3, "nthreads": 8}),
        ({"total": 1}, {}),
    ],
)
def test_preferences(first, second):
    workers = [worker(1, **first), worker(2, **second)]
    assert place(Need(), workers).worker == workers[1].address


def test_hosts_come_before_workers():
    workers = [
        worker(1, host="10.0.0.1", replicas=1),
        worker(2, host="10.0.0.1"),
        worker(3, host="10.0.0.2", busy=4, threads=4),
    ]
    assert place(Need(), workers).worker == workers[2].address


views = st.builds(
    worker,
    st.integers(1, 50),
    host=st.sampled_from(["a", "b"]),
    running=st.booleans(),
    busy=st.integers(0, 5),
    threads=st.integers(0, 5),
    replicas=st.integers(0, 3),
    resources=st.dictionaries(st.sampled_from(["GPU", "X"]), st.integers(0, 3)),
    booked=st.dictionaries(st.sampled_from(["GPU", "X"]), st.integers(0, 3)),
)
needs = st.builds(
    Need,
    threads=st.integers(1, 8),
    resources=st.dictionaries(st.sampled_from(["GPU", "X"]), st.integers(0, 2)),
    workers=st.lists(st.sampled_from(["w1", "w2", "w3"]), max_size=2),
    max_replicas_per_worker=st.none() | st.integers(1, 3),
)


@given(needs, st.lists(views, max_size=8, unique_by=lambda w: w.address), st.randoms())
def test_hard_limits_hold_and_order_does_not_matter(need, workers, random):
    choice = place(need, workers)
    assert (choice.worker is None) == bool(choice.reason)
    if choice.worker is not None:
        chosen = next(w for w in workers if w.address == choice.worker)
        assert chosen.running
        assert not need.workers or chosen.name in need.workers
        assert need.max_replicas_per_worker is None or chosen.replicas < need.max_replicas_per_worker
        for name, amount in need.resources.items():
            assert chosen.resources.get(name, 0) - chosen.booked.get(name, 0) >= amount
    shuffled = list(workers)
    random.shuffle(shuffled)
    assert place(need, shuffled).worker == choice.worker


@given(st.integers(1, 5), st.integers(1, 12))
def test_replicas_spread_evenly(hosts, replicas):
    workers = [worker(number) for number in range(1, hosts + 1)]
    for _ in range(replicas):
        address = place(Need(), workers).worker
        workers = [
            msgspec.structs.replace(w, replicas=w.replicas + 1, threads=w.threads + 1) if w.address == address else w
            for w in workers
        ]
    counts = [w.replicas for w in workers]
    assert max(counts) - min(counts) <= 1


def test_wanted_workers():
    assert wanted_workers([], 0) == 0
    assert wanted_workers([], 5) == 1
    assert wanted_workers([worker(1), worker(2, total=1)], 0) == 1
    assert wanted_workers([worker(1), worker(2)], 3) == 5
    # 10 threads on 4: half more than two such workers again.
    assert wanted_workers([worker(1, threads=10, total=10)], 0) == 3
    assert wanted_workers([worker(1, threads=4, total=4)], 0) == 1
    # Replicas that wait for free threads: as many workers more as have so many.
    assert wanted_workers([], 0, 5) == 1
    assert wanted_workers([worker(1, threads=4, total=4)], 0, 4) == 2
    assert wanted_workers([worker(1, threads=4, total=4), worker(2, threads=3, total=1)], 1, 5) == 5


def test_replicas_that_are_to_add_something_need_free_threads():
    workers = [worker(1, threads=4), worker(2, threads=3)]
    assert place(Need(only_free_threads=True), workers).worker == workers[1].address
    full = place(Need(threads=2, only_free_threads=True), workers)
    assert full.worker is None
    assert "no worker has a thread that no replica uses (threads=2)" in full.reason
    assert place(Need(threads=2), workers).worker is not None
