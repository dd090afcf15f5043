"""Which worker a new replica goes to.

The sums are done on what the controller booked itself: Dask forgets the resources of an actor once its constructor
returned, and knows neither devices nor the memory of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from .devices import TOLERANCE, Device, describe_devices, pick_devices

__all__ = ["GPU", "Need", "Placement", "WorkerView", "booking", "place", "wanted_workers", "worth_restarting"]

#: The name under which workers declare GPUs as a resource of Dask's, where they do.
GPU = "GPU"


class Need(Struct, frozen=True, kw_only=True):
    """What one replica asks of its worker."""

    threads: int = 1
    resources: Mapping[str, float] = {}
    #: Devices: a whole number, or a fraction of one.
    gpus: float = 0
    #: Bytes.
    memory: int = 0
    #: Names or addresses; empty means any worker.
    workers: Sequence[str] = ()
    max_replicas_per_worker: int | None = None
    #: Only where it does not exceed the worker's threads: it is to add to what the workers can do.
    only_free_threads: bool = False
    #: Name of what its process has to have; "": nothing special, and nothing that others asked for.
    environment: str = ""


class WorkerView(Struct, frozen=True, kw_only=True):
    """One worker, as placement sees it."""

    address: str
    name: str
    host: str
    nthreads: int
    #: False while the worker is paused, closing or about to be restarted.
    running: bool = True
    #: It has just come, and what waits has not been tried on it yet.
    fresh: bool = False
    #: Task threads that run something of Dask's at this moment.
    busy: int = 0
    #: What the worker has in all.
    resources: Mapping[str, float] = {}
    #: What our replicas on it have taken.
    booked: Mapping[str, float] = {}
    #: What tasks of Dask's that are on it want.
    in_use: Mapping[str, float] = {}
    #: Its devices, with what is left of them; None: not known yet.
    devices: Sequence[Device] | None = ()
    #: Bytes that Dask lets it use; 0: no limit.
    memory_limit: int = 0
    #: Bytes that our replicas on it are counted with.
    memory: int = 0
    #: Threads of our replicas on it.
    threads: int = 0
    #: Replicas of the deployment in question.
    replicas: int = 0
    #: Replicas of any deployment.
    total: int = 0
    #: Failed starts of the revision in question on it.
    failures: int = 0
    #: Name of the environment that its process has, until it ends; "": none.
    environment: str = ""
    #: Its process may be given an environment: it never held a replica, and has nothing of Dask's.
    clean: bool = True
    #: Its process may be ended: it holds nothing of anybody's, and another one comes in its place.
    spare: bool = False

    @property
    def named(self) -> bool:
        """Whether somebody gave it a name; Dask names the others by their addresses."""
        return self.name != self.address


class Placement(Struct, frozen=True):
    """A worker's address, or the reason why there is none."""

    worker: str | None
    reason: str = ""
    devices: Sequence[Device] = ()


def place(need: Need, workers: Sequence[WorkerView]) -> Placement:
    """Choose a worker, or say exactly what is missing.

    Hard limits first: named workers, running ones, those that have its environment or can be given it,
    ``max_replicas_per_worker``, resources, memory, devices. Among what is left the replica goes where this revision
    failed least, to the host and then the worker with the fewest replicas of its deployment, then to where no task of
    Dask's holds what it takes and task threads are free (a new actor waits in line as any task does), then to a
    worker's own devices rather than others that it sees, then to the worker whose threads our replicas use least. On a
    host, a worker is given an environment when the threads of those that have it are used.
    """
    if not workers:
        return Placement(None, "no workers are connected")
    left = [w for w in workers if _named(need, w)]
    if not left:
        names = ", ".join(map(repr, need.workers))
        return Placement(None, f"no worker is named {names} (workers: {_list(workers)})")
    named, left = left, [w for w in left if w.running]
    if not left:
        return Placement(None, f"no worker is running: all are paused or closing (workers: {_list(named)})")
    few, left = left, [w for w in left if _suits(need, w)]
    if not left:
        return Placement(None, _no_environment(need, few))
    limit = need.max_replicas_per_worker
    fits, left = left, [w for w in left if limit is None or w.replicas < limit]
    if not left:
        return Placement(
            None, f"every worker holds max_replicas_per_worker={limit} replicas already (workers: {_list(fits)})"
        )
    few, left = left, [w for w in left if _lacks(need, w, w.booked) is None]
    if not left:
        asked = {name: amount for w in few for name, amount in booking(need, w.resources).items()}
        text = ", ".join(f"{name}={amount:g}" for name, amount in sorted(asked.items()))
        return Placement(None, f"no worker has resources {text} free (workers: {_list(few, asked)})")
    if need.memory:
        few, left = left, [w for w in left if not w.memory_limit or w.memory + need.memory <= w.memory_limit]
        if not left:
            notes = [f"{_size(w.memory_limit - w.memory)} of {_size(w.memory_limit)} not booked" for w in few]
            return Placement(
                None, f"no worker has memory={_size(need.memory)} left (workers: {_list(few, notes=notes)})"
            )
    devices = {w.address: pick_devices(need.gpus, w.devices or ()) if need.gpus else [] for w in left}
    few, left = left, [w for w in left if devices[w.address] is not None]
    if not left:
        notes = [describe_devices(w.devices) for w in few]
        return Placement(None, f"no worker has gpus={need.gpus:g} free (workers: {_list(few, notes=notes)})")
    full, left = left, [w for w in left if _has_threads(need, w)]
    if not left:
        free = f"a thread that no replica uses (threads={need.threads})"
        return Placement(None, f"no worker has {free}; there are more with more workers (workers: {_list(full)})")
    on_host: dict[str, int] = {}
    for worker in workers:
        on_host[worker.host] = on_host.get(worker.host, 0) + worker.replicas

    best = min(left, key=lambda w: _cost(need, w, on_host[w.host], devices[w.address] or ())).address
    return Placement(best, devices=devices[best] or ())


def _cost(need: Need, worker: WorkerView, on_host: int, chosen: Sequence[Device]) -> tuple[float | str, ...]:
    return (
        worker.failures,
        on_host,
        _reluctance(need, worker),
        worker.replicas,
        # What it takes is in the hands of tasks; then, all threads are.
        _lacks(need, worker, worker.booked, worker.in_use) is not None,
        worker.busy >= worker.nthreads,
        # Devices that are its own come first.
        sum((worker.devices or ()).index(device) for device in chosen),
        (worker.threads + need.threads) / max(worker.nthreads, 1),
        worker.total,
        worker.address,
    )


def booking(need: Need, declared: Mapping[str, float]) -> dict[str, float]:
    """Return what a replica takes of Dask's resources on a worker that declares these."""
    taken = {name: amount for name, amount in need.resources.items() if amount}
    if need.gpus and GPU in declared:
        taken[GPU] = taken.get(GPU, 0) + need.gpus
    return taken


def wanted_workers(workers: Sequence[WorkerView], unplaced: int, short: int = 0) -> int:
    """Return how many workers an adaptive cluster should have for our replicas.

    At least those that hold some; more when replicas could not be placed, or when their threads exceed the
    threads there are. Where replicas crowd each other, as many as have threads for all: those that were asked for must
    not go again before replicas have moved there. Without any worker one is asked for first: what it is like tells how
    many more. A worker that has just come is taken for one that was asked for: asking for another in its place would be
    taken back at once.

    Where some of those that hold replicas have no name of their own, all such workers are needed: whoever closes one
    of them by a name of the cluster's may mean any.

    Parameters
    ----------
    workers : sequence of WorkerView
        Those there are.
    unplaced : int
        Replicas that no worker can hold, whatever its free threads.
    short : int
        Threads of the replicas that only wait for free threads.
    """
    if not workers:
        return 1 if unplaced or short else 0
    fresh = [w for w in workers if w.fresh]
    unplaced, filled = max(unplaced - len(fresh), 0), min(unplaced, len(fresh))
    short = max(short - sum(w.nthreads for w in fresh[filled:]), 0)
    nthreads = sum(w.nthreads for w in workers)
    # Free threads that these replicas cannot use, scattered or on workers that close, are not counted on.
    used = sum(w.threads for w in workers)
    excess = max(used - nthreads, 0) + short
    more = unplaced + (-(-excess * len(workers) // max(nthreads, 1)) if excess > 0 else 0)
    if more:
        return len(workers) + more
    nameless = any(w.total and not w.named for w in workers)
    holding = sum(1 for w in workers if w.total or w.fresh or (nameless and not w.named))
    if any(w.threads > w.nthreads for w in workers):
        return max(holding, -(-used * len(workers) // nthreads))
    return holding


def worth_restarting(need: Need, workers: Sequence[WorkerView]) -> str | None:
    """Return the address of a worker whose process stands in the way of a replica only by what it once was.

    For replicas that `place` found no worker for. Never one that holds replicas, or anything of Dask's.
    """
    candidates = [w for w in workers if w.spare and not _suits(need, w)]
    found = [w for w in candidates if place(need, [replace(w, environment="", clean=True)]).worker is not None]
    return min(found, key=lambda w: (w.failures, w.address)).address if found else None


def _suits(need: Need, worker: WorkerView) -> bool:
    if worker.environment == need.environment:
        return True
    return bool(need.environment) and not worker.environment and worker.clean


def _reluctance(need: Need, worker: WorkerView) -> int:
    """Tell how much to wait with taking a worker for an environment, of which there will be fewer for others."""
    if not need.environment:
        return 0
    if worker.environment != need.environment:
        return 1
    return 0 if worker.threads + need.threads <= worker.nthreads else 2


def _no_environment(need: Need, workers: Sequence[WorkerView]) -> str:
    notes = []
    for worker in workers:
        if worker.environment:
            held = "replicas of" if worker.total else "no replicas now, but"
            notes.append(f"{held} environment {worker.environment}")
        else:
            notes.append("replicas without an environment" if worker.total else "Dask's tasks or data, or used before")
    what = f"can be given environment {need.environment}" if need.environment else "is without an environment"
    return f"no worker {what}, of which a process has one: add a worker (workers: {_list(workers, notes=notes)})"


def _named(need: Need, worker: WorkerView) -> bool:
    return not need.workers or worker.address in need.workers or worker.name in need.workers


def _lacks(need: Need, worker: WorkerView, *taken: Mapping[str, float]) -> str | None:
    """Name a resource that the worker has too little of."""
    for name, amount in booking(need, worker.resources).items():
        left = worker.resources.get(name, 0) - sum(other.get(name, 0) for other in taken)
        if left < amount - TOLERANCE:
            return name
    return None


def _has_threads(need: Need, worker: WorkerView) -> bool:
    return not need.only_free_threads or worker.threads + need.threads <= worker.nthreads


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.0f} MiB"


def _list(workers: Sequence[WorkerView], resources: Mapping[str, float] = {}, notes: Sequence[str] = ()) -> str:
    texts = [f"{_describe(w, {})} ({note})" for w, note in zip(workers, notes, strict=True)] if notes else []
    shown = sorted(texts)[:5] or [_describe(w, resources) for w in sorted(workers, key=lambda w: w.address)[:5]]
    if len(workers) > len(shown):
        shown.append(f"and {len(workers) - len(shown)} more")
    return ", ".join(shown)


def _describe(worker: WorkerView, resources: Mapping[str, float]) -> str:
    text = worker.address if worker.name == worker.address else f"{worker.name} at {worker.address}"
    if not resources:
        return text
    parts = []
    for name in sorted(resources):
        total = worker.resources.get(name, 0)
        booked = worker.booked.get(name, 0)
        parts.append(f"{name}: {total - booked:g} of {total:g} free" if total else f"no {name}")
    return f"{text} ({', '.join(parts)})"
