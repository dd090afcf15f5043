"""Which replicas move to workers with free threads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dask_serve.policy.balance import Sitting, to_move
from dask_serve.policy.placement import WorkerView


def worker(name: str, nthreads: int, threads: int, running: bool = True) -> WorkerView:
    return WorkerView(address=name, name=name, host="h", nthreads=nthreads, threads=threads, running=running)


def test_the_youngest_of_a_crowded_worker_moves():
    replicas = [Sitting("1", "a", 1), Sitting("2", "a", 1), Sitting("3", "b", 1)]
    workers = [worker("a", 1, 2), worker("b", 1, 1)]
    assert to_move(replicas, workers) == []
    assert to_move(replicas, [*workers, worker("c", 1, 0, running=False)]) == []
    assert to_move(replicas, [*workers, worker("c", 1, 0)]) == ["2"]
    assert to_move(replicas, [worker("a", 2, 2), worker("b", 1, 1), worker("c", 1, 0)]) == []


def test_who_needs_more_threads_than_are_free_stays():
    replicas = [Sitting("1", "a", 1), Sitting("2", "a", 4)]
    assert to_move(replicas, [worker("a", 1, 5), worker("b", 2, 0)]) == ["1"]


def test_leaving_workers_are_not_balanced():
    replicas = [Sitting("1", "a", 1), Sitting("2", "a", 1)]
    assert to_move(replicas, [worker("a", 1, 2, running=False), worker("b", 2, 0)]) == []


@st.composite
def clusters(draw) -> tuple[list[Sitting], list[WorkerView]]:
    nthreads = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    replicas = [
        Sitting(str(number), str(draw(st.integers(0, len(nthreads) - 1))), draw(st.integers(0, 3)))
        for number in range(draw(st.integers(0, 12)))
    ]
    workers = [
        worker(str(number), n, sum(r.threads for r in replicas if r.worker == str(number)), draw(st.booleans()))
        for number, n in enumerate(nthreads)
    ]
    return replicas, workers


@given(clusters())
def test_as_few_as_will_do_and_no_more_than_find_room(cluster):
    replicas, workers = cluster
    by_id = {replica.id: replica for replica in replicas}
    by_name = {view.address: view for view in workers}
    moved = [by_id[id] for id in to_move(replicas, workers)]
    assert len({replica.id for replica in moved}) == len(moved)
    free = sum(max(w.nthreads - w.threads, 0) for w in workers if w.running)
    assert sum(replica.threads for replica in moved) <= free
    over = {name: view.threads - view.nthreads for name, view in by_name.items()}
    for replica in moved:
        assert by_name[replica.worker].running
        assert over[replica.worker] > 0, "it was crowded when this one was chosen"
        over[replica.worker] -= replica.threads
    # Once nobody is crowded, nothing moves: it cannot go on for ever.
    if all(w.threads <= w.nthreads for w in workers):
        assert moved == []
