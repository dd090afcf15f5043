"""What the page shows of one moment, as plain rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from .history import ALL, Levels

if TYPE_CHECKING:
    from ..controller.status import ApplicationStatus, DeploymentStatus, ProxyStatus, ServeStatus, WorkerStatus

__all__ = ["STATES", "Snapshot", "by_worker", "take"]

#: States of replicas in the order in which they are drawn.
STATES = ("ready", "starting", "draining")
#: Characters of what is wrong with one application, at most.
LONGEST = 400


class Snapshot(NamedTuple):
    """Rows by what they describe.

    Attributes
    ----------
    deployments : list of str
        Ids of all that are deployed.
    levels : dict
        Of each deployment.
    replicas, batches, models, proxies : list of dict
        One for each; the first three have ``deployment``.
    trouble : list of str
        What is wrong or missing, and what to do about it.
    url : str
        Where HTTP is served.
    """

    deployments: list[str]
    levels: dict[str, Levels]
    replicas: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    models: list[dict[str, Any]]
    proxies: list[dict[str, Any]]
    trouble: list[str]
    url: str

    def of(self, rows: Iterable[dict[str, Any]], deployment: str) -> list[dict[str, Any]]:
        """Return those rows that belong to a deployment, or all."""
        return [row for row in rows if deployment in (ALL, row["deployment"])]


def take(status: ServeStatus, names: Mapping[str, str], ended: str = "") -> Snapshot:
    """Make a snapshot.

    Parameters
    ----------
    status : ServeStatus
        With what workers told.
    names : mapping
        Names of all workers by address.
    ended : str
        Why there is no controller any more.
    """
    told = {id: counts for worker in status.workers for id, counts in worker.replicas.items()}
    levels: dict[str, Levels] = {}
    replicas = []
    for app, application in status.applications.items():
        for name, deployment in application.deployments.items():
            id = f"{app}/{name}"
            rows = _replicas(id, deployment, names, told)
            replicas += rows
            levels[id] = Levels(
                running=deployment.in_flight,
                queued=deployment.queued,
                ready=sum(row["state"] == "ready" for row in rows),
                wanted=deployment.target,
            )
    return Snapshot(
        deployments=list(levels),
        levels=levels,
        replicas=replicas,
        batches=_batches(status.workers),
        models=_models(status.workers),
        proxies=[_proxy(row) for row in status.proxies],
        trouble=_trouble(status, names, ended),
        url=status.url,
    )


def _replicas(
    id: str, deployment: DeploymentStatus, names: Mapping[str, str], told: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    rows = []
    for replica in deployment.replicas:
        counts = told.get(replica.id, {})
        rows.append(
            {
                "deployment": id,
                "replica": replica.id,
                "state": replica.state,
                "worker": names.get(replica.worker, replica.worker),
                "address": replica.worker,
                "escaped": quote(replica.worker, safe=""),
                "running": replica.in_flight,
                "queued": replica.queued,
                "answered": counts.get("answered", 0),
                "failed": counts.get("failed", 0),
                "dropped": counts.get("dropped", 0),
                "wasted": round(counts.get("seconds_wasted", 0.0), 2),
                "note": replica.message,
            }
        )
    return rows


def _batches(workers: Iterable[WorkerStatus]) -> list[dict[str, Any]]:
    """Return one row for each method of each replica."""
    return [
        {"deployment": _deployment(replica), "replica": replica, "method": method, **counts}
        for worker in workers
        for replica, methods in worker.batches.items()
        for method, counts in methods.items()
    ]


def _models(workers: Iterable[WorkerStatus]) -> list[dict[str, Any]]:
    return [
        {"deployment": _deployment(replica), "replica": replica, "model": model}
        for worker in workers
        for replica, models in worker.models.items()
        for model in models
    ]


def _deployment(replica: str) -> str:
    return replica.rpartition("/")[0]


def _proxy(proxy: ProxyStatus) -> dict[str, Any]:
    return {
        "node": proxy.node or "scheduler's",
        "slot": proxy.slot,
        "pid": proxy.pid or "",
        "state": proxy.state,
        "restarts": proxy.restarts,
    }


def _trouble(status: ServeStatus, names: Mapping[str, str], ended: str) -> list[str]:
    if ended:
        goes_on = "Replicas and proxies go on with what they have, and nothing is replaced any more"
        return [f"The controller has ended: {ended}. {goes_on}. See the scheduler's log, and restart the scheduler."]
    told = [status.message] if status.message else []
    if not status.applications:
        told.append("Nothing is deployed. Deploy an application with serve.run(app), or dask serve run module:app.")
    elif not names:
        told.append("There are no workers. Start some: dask worker SCHEDULER-ADDRESS, or cluster.scale(2).")
    if not status.url and not status.message:
        told.append("HTTP is not served; handles work. Start the proxies with serve.start().")
    for name, application in status.applications.items():
        # What is deploying waits for something only where it says so.
        if application.status in ("failed", "unhealthy") or (application.message and names):
            told.append(f"Application {name} is {application.status}: {_cause(application)}")
    return told


def _cause(application: ApplicationStatus) -> str:
    """Return the first line of the message, of an error in user code also the last one of its traceback."""
    lines = application.message.strip().splitlines()
    cause = lines[:1]
    if len(lines) > 1 and lines[0].endswith(":"):
        cause.append(lines[-1].strip())
    told = " ".join(cause)
    return " ".join(filter(None, [told if len(told) <= LONGEST else f"{told[:LONGEST]}...", "See dask serve status."]))


def by_worker(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how many replicas each worker has in each state, by the worker's address, in the order of their names."""
    counts: Counter[tuple[str, str]] = Counter()
    workers = {}
    for row in rows:
        counts[row["address"], row["state"]] += 1
        workers[row["address"]] = {"worker": row["worker"], "escaped": row["escaped"]}
    for address, row in workers.items():
        row.update({state: counts[address, state] for state in STATES})
    return dict(sorted(workers.items(), key=lambda item: _in_order(item[1]["worker"])))


def _in_order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (1 << 62, name)
