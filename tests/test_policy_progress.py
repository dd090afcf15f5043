from __future__ import annotations

from dask_serve.policy.progress import Progress, Sample, Verdict


def look(progress: Progress, at: float, after: float = 10, **seen) -> Verdict | None:
    return progress.look(Sample(at=at, **seen), after)


def test_nothing_waits():
    progress = Progress()
    assert all(look(progress, at) is None for at in range(0, 100, 5))


def test_taken_threads_without_progress():
    progress = Progress()
    assert look(progress, 0, activity=7, waiting=True) is None
    assert look(progress, 9, activity=7, waiting=True) is None
    assert look(progress, 10, activity=7, waiting=True) == Verdict(part="threads", since=0, computes=False)
    # Half of the time on a CPU.
    assert look(progress, 20, activity=7, waiting=True, pool_cpu=10.0).computes
    assert look(progress, 25, activity=8, waiting=True) is None


def test_activity_is_progress():
    progress = Progress()
    assert all(look(progress, at, activity=at, waiting=True) is None for at in range(0, 100, 5))


def test_cpu_counts_from_when_it_stood_still():
    progress = Progress()
    look(progress, 0, waiting=True, activity=1, pool_cpu=500.0)
    assert not look(progress, 20, waiting=True, activity=1, pool_cpu=500.5).computes
    assert look(progress, 20, waiting=True, activity=1, pool_cpu=501.0).computes


def test_one_that_waits_no_longer_begins_anew():
    progress = Progress()
    look(progress, 0, activity=1, waiting=True)
    assert look(progress, 9, activity=1) is None
    assert look(progress, 12, activity=1, waiting=True) is None
    assert look(progress, 22, activity=1, waiting=True).since == 12


def test_blocked_loop():
    progress = Progress()
    assert look(progress, 0) is None
    assert look(progress, 5, loop_asked=2) is None
    # Whatever threads do.
    assert look(progress, 12, loop_asked=2, activity=5, loop_cpu=0.1) == Verdict(part="loop", since=2, computes=False)
    assert look(progress, 13, loop_asked=2, activity=6, loop_cpu=3.0).computes
    assert look(progress, 14, activity=6) is None
