from __future__ import annotations

from math import ceil

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from dask_serve.policy.devices import Device, pick_devices, share_of
from dask_serve.policy.placement import Need, WorkerView, booking, place, wanted_workers, worth_restarting


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


def gpu(*free: float, first: int = 0) -> list[Device]:
    return [Device(str(first + number), number, share) for number, share in enumerate(free)]


@pytest.mark.parametrize(
    ("gpus", "free", "chosen"),
    [
        (1, (1, 1), [0]),
        (2, (1, 0.5, 1), [0, 2]),
        (1, (0.5, 0.9), None),
        # Fractions share the device that has the least left.
        (0.5, (1, 0.5, 0.7), [1]),
        (0.3, (0.2, 1 - 0.1 - 0.1 - 0.1 - 0.4), [1]),
        (0.5, (0.4, 0.4), None),
        (0.1, (), None),
    ],
)
def test_devices(gpus, free, chosen):
    found = pick_devices(gpus, gpu(*free))
    assert chosen == (None if found is None else [device.ordinal for device in found])
    choice = place(Need(gpus=gpus), [worker(1), worker(2, devices=gpu(*free))])
    assert (choice.worker is None) == (chosen is None)
    assert [device.ordinal for device in choice.devices] == (chosen or [])


def test_reasons_for_want_of_devices_and_memory():
    workers = [worker(1, devices=gpu(0.25, 0)), worker(2, devices=None), worker(3)]
    assert place(Need(gpus=0.5), workers).reason == (
        "no worker has gpus=0.5 free (workers: w1 at tcp://10.0.0.1:1 (free of its 2 GPUs: 0: 0.25, 1: 0), "
        "w2 at tcp://10.0.0.2:2 (its devices are being looked up), w3 at tcp://10.0.0.3:3 (no GPUs found there))"
    )
    workers = [worker(1, memory_limit=4 * 2**30, memory=3 * 2**30), worker(2, memory_limit=2**20)]
    assert place(Need(memory=2 * 2**30), workers).reason == (
        "no worker has memory=2.00 GiB left (workers: w1 at tcp://10.0.0.1:1 (1.00 GiB of 4.00 GiB not booked), "
        "w2 at tcp://10.0.0.2:2 (1 MiB of 1 MiB not booked))"
    )
    assert place(Need(memory=2**30), workers).worker == workers[0].address
    # No limit is no limit.
    assert place(Need(memory=2**50), [worker(1)]).worker


def test_gpus_take_the_resource_of_dask_too_where_there_is_one():
    declared = worker(1, resources={"GPU": 2}, booked={"GPU": 1.5}, devices=gpu(1, 1))
    assert "no worker has resources GPU=1 free" in place(Need(gpus=1), [declared]).reason
    assert place(Need(gpus=0.5), [declared]).worker
    assert booking(Need(gpus=2, resources={"x": 1, "y": 0}), {"GPU": 2}) == {"x": 1, "GPU": 2}
    assert booking(Need(gpus=2), {}) == {}


def test_where_tasks_hold_what_a_replica_takes_comes_last():
    workers = [worker(1, resources={"GPU": 1}, in_use={"GPU": 1}), worker(2, resources={"GPU": 1}, threads=9)]
    assert place(Need(resources={"GPU": 1}), workers).worker == workers[1].address
    assert place(Need(resources={"GPU": 1}), workers[:1]).worker == workers[0].address


def test_a_worker_gives_its_own_device_first():
    """As dask-cuda has it: each worker sees all devices of the host, and its own comes first."""
    first = [Device("0", 0, 0.0), Device("1", 1)]
    second = [Device("1", 0), Device("0", 1, 0.0)]
    workers = [worker(1, host="a", devices=first), worker(2, host="a", devices=second, threads=3)]
    assert place(Need(gpus=1), workers).worker == workers[1].address


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
            assert not amount or chosen.resources.get(name, 0) - chosen.booked.get(name, 0) >= amount
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


class Machine(Struct):
    """A worker as it really is."""

    host: str
    resources: dict[str, float]
    memory_limit: int
    sees: list[str]


machines = st.lists(
    st.builds(
        Machine,
        host=st.sampled_from(["a", "b"]),
        resources=st.dictionaries(st.sampled_from(["GPU", "X"]), st.integers(0, 3)),
        memory_limit=st.integers(0, 3),
        sees=st.permutations(["0", "1", "2"]).flatmap(lambda ids: st.integers(0, 3).map(lambda n: ids[:n])),
    ),
    min_size=1,
    max_size=4,
)
asked = st.builds(
    Need,
    resources=st.dictionaries(st.just("X"), st.sampled_from([0.1, 0.5, 1, 2])),
    gpus=st.sampled_from([0, 0.1, 0.25, 0.5, 0.7, 1, 2]),
    memory=st.integers(0, 2),
    max_replicas_per_worker=st.none() | st.integers(1, 2),
)


@given(machines, st.lists(st.tuples(asked, st.booleans()), max_size=25), st.randoms())
def test_nothing_is_ever_given_away_twice(machines, steps, random):
    """Replicas come and go; what they have together never exceeds a worker, nor a device of a host."""
    living: list[tuple[int, Need, tuple[Device, ...], dict[str, float]]] = []
    for need, one_goes in steps:
        if one_goes and living:
            living.pop(random.randrange(len(living)))
        left: dict[tuple[str, str], float] = {}
        for number, other, devices, _ in living:
            for device in devices:
                key = (machines[number].host, device.id)
                left[key] = left.get(key, 1.0) - share_of(other.gpus)
        workers = []
        for number, machine in enumerate(machines):
            here = [entry for entry in living if entry[0] == number]
            booked: dict[str, float] = {}
            for entry in here:
                for name, amount in entry[3].items():
                    booked[name] = booked.get(name, 0) + amount
            workers.append(
                worker(
                    number,
                    host=machine.host,
                    resources=machine.resources,
                    booked=booked,
                    memory_limit=machine.memory_limit,
                    memory=sum(entry[1].memory for entry in here),
                    devices=[Device(id, i, left.get((machine.host, id), 1.0)) for i, id in enumerate(machine.sees)],
                    replicas=len(here),
                )
            )
        choice = place(need, workers)
        if choice.worker is None:
            continue
        number = next(n for n, w in enumerate(workers) if w.address == choice.worker)
        assert len(choice.devices) == ceil(need.gpus)
        living.append((number, need, tuple(choice.devices), booking(need, machines[number].resources)))
        # What all of them have now, counted anew.
        for number, machine in enumerate(machines):
            here = [entry for entry in living if entry[0] == number]
            assert not machine.memory_limit or sum(entry[1].memory for entry in here) <= machine.memory_limit
            for name in {name for entry in here for name in entry[3]}:
                assert sum(entry[3].get(name, 0) for entry in here) <= machine.resources.get(name, 0) + 1e-6
        for host, id in {(machines[n].host, device.id) for n, _, devices, _ in living for device in devices}:
            shares = [
                share_of(other.gpus)
                for n, other, devices, _ in living
                if machines[n].host == host and id in [device.id for device in devices]
            ]
            assert sum(shares) <= 1 + 1e-6


def test_wanted_workers():
    assert wanted_workers([], 0) == 0
    assert wanted_workers([], 5) == 1
    assert wanted_workers([worker(1), worker(2, total=1)], 0) == 1
    assert wanted_workers([worker(1), worker(2)], 3) == 5
    # 10 threads on 4: half more than two such workers again.
    assert wanted_workers([worker(1, threads=10, total=10)], 0) == 3
    assert wanted_workers([worker(1, threads=4, total=4)], 0) == 1
    # The second one was asked for because of the crowd on the first: it stays until they have moved, or for good.
    assert wanted_workers([worker(1, nthreads=1, threads=2, total=2), worker(2, nthreads=1)], 0) == 2
    assert wanted_workers([worker(1, nthreads=1, threads=2, total=2)] + [worker(n, nthreads=1) for n in (2, 3)], 0) == 2
    # Replicas that wait for free threads: as many workers more as have so many.
    assert wanted_workers([], 0, 5) == 1
    assert wanted_workers([worker(1, threads=4, total=4)], 0, 4) == 2
    assert wanted_workers([worker(1, threads=4, total=4), worker(2, threads=3, total=1)], 1, 5) == 5


def test_a_worker_that_has_just_come_is_one_that_was_asked_for():
    fresh = worker(2, fresh=True)
    assert wanted_workers([fresh], 1) == 1
    assert wanted_workers([fresh], 0) == 1
    assert wanted_workers([worker(1, threads=4, total=4), fresh], 2) == 3
    # Its threads are four of those that replicas wait for, if no replica has the worker for itself.
    assert wanted_workers([worker(1, threads=4, total=4), fresh], 0, 4) == 2
    assert wanted_workers([worker(1, threads=4, total=4), fresh], 0, 5) == 3
    assert wanted_workers([worker(1, threads=4, total=4), fresh], 1, 4) == 3


def test_nameless_workers_are_needed_all_or_none():
    def nameless(number: int, **fields) -> WorkerView:
        return worker(number, name=worker(number).address, **fields)

    assert wanted_workers([nameless(1), nameless(2)], 0) == 0
    assert wanted_workers([nameless(1, total=1), nameless(2)], 0) == 2
    assert wanted_workers([nameless(1, total=1), worker(2)], 0) == 1
    assert wanted_workers([nameless(1), worker(2, total=1)], 0) == 1


def test_replicas_that_are_to_add_something_need_free_threads():
    workers = [worker(1, threads=4), worker(2, threads=3)]
    assert place(Need(only_free_threads=True), workers).worker == workers[1].address
    full = place(Need(threads=2, only_free_threads=True), workers)
    assert full.worker is None
    assert "no worker has a thread that no replica uses (threads=2)" in full.reason
    assert place(Need(threads=2), workers).worker is not None


# -- environments


def test_a_worker_is_given_an_environment_when_those_that_have_it_are_used():
    mine, free = worker(1, environment="e", threads=3, replicas=3), worker(2)
    mine, free = (msgspec.structs.replace(w, host="a") for w in (mine, free))
    assert place(Need(environment="e"), [mine, free]).worker == mine.address
    assert place(Need(environment="e", threads=2), [mine, free]).worker == free.address
    # Other hosts come first, as ever.
    assert place(Need(environment="e"), [mine, worker(2)]).worker == worker(2).address


def test_reasons_for_want_of_a_process():
    workers = [
        worker(1, environment="abc", total=1),
        worker(2, clean=False, total=2),
        worker(3, clean=False),
        worker(4, environment="abc"),
    ]
    assert place(Need(environment="e"), workers).reason == (
        "no worker can be given environment e, of which a process has one: add a worker (workers: "
        "w1 at tcp://10.0.0.1:1 (replicas of environment abc), w2 at tcp://10.0.0.2:2 (replicas without an "
        "environment), w3 at tcp://10.0.0.3:3 (Dask's tasks or data, or used before), w4 at tcp://10.0.0.4:4 "
        "(no replicas now, but environment abc))"
    )
    assert "no worker is without an environment" in place(Need(), [workers[0]]).reason
    assert place(Need(environment="abc"), workers).worker == workers[3].address


def test_only_processes_that_hold_nothing_are_restarted():
    old, held, other = worker(1, environment="old", spare=True), worker(2, environment="old"), worker(3, clean=False)
    need = Need(environment="new", workers=["w1", "w2", "w3"])
    assert worth_restarting(need, [old, held, other]) == old.address
    assert worth_restarting(need, [held, other]) is None
    # It would not help.
    assert worth_restarting(Need(environment="new", workers=["w2"]), [old, held]) is None
    assert worth_restarting(Need(environment="new", resources={"X": 1}), [old]) is None
    assert worth_restarting(Need(), [old]) == old.address


class Process(Struct):
    """A worker's process as it really is."""

    environment: str | None = None
    replicas: list[str] = []
    ever: bool = False
    data: bool = False
    nanny: bool = True


steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(["", "e", "f"])),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("data"), st.integers(0, 3)),
    ),
    max_size=30,
)


@given(st.lists(st.booleans(), min_size=1, max_size=4), steps)
def test_a_process_never_has_two_environments_nor_is_one_ended_that_holds_something(nannies, steps):
    processes = [Process(nanny=nanny, replicas=[]) for nanny in nannies]
    for what, which in steps:
        if what == "end":
            full = [process for process in processes if process.replicas]
            if full:
                full[which % len(full)].replicas.pop()
        elif what == "data":
            process = processes[which % len(processes)]
            process.data = not process.data
        else:
            workers = [
                worker(
                    number,
                    host="a",
                    environment=p.environment or "",
                    clean=not p.ever and not p.data,
                    spare=p.nanny and not p.replicas and not p.data,
                    replicas=len(p.replicas),
                    total=len(p.replicas),
                    threads=len(p.replicas),
                )
                for number, p in enumerate(processes)
            ]
            address = place(Need(environment=which), workers).worker
            if address is not None:
                process = processes[[w.address for w in workers].index(address)]
                if process.ever:
                    assert process.environment == (which or None)
                elif which:
                    assert not process.data
                process.environment = which or None
                process.ever = True
                process.replicas.append(which)
            elif (address := worth_restarting(Need(environment=which), workers)) is not None:
                number = [w.address for w in workers].index(address)
                assert not processes[number].replicas
                assert not processes[number].data
                processes[number] = Process(replicas=[])
            else:
                # Nobody could take it, whatever one did.
                assert all(p.replicas or p.data or not p.nanny for p in processes)
        assert all(set(p.replicas) <= {p.environment or ""} for p in processes)
