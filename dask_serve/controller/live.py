"""What changes in the status with each heartbeat: loads, memory, models, errors. It is no news to those who watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ..policy.desired import deployment_id
from .status import (
    ApplicationStatus,
    DeploymentStatus,
    ErrorStatus,
    LoadStatus,
    ReplicaStatus,
    ServeStatus,
    WorkerStatus,
)

if TYPE_CHECKING:
    from distributed.scheduler import WorkerState

__all__ = ["filled_in"]

_replace = msgspec.structs.replace


def filled_in(
    status: ServeStatus,
    workers: Mapping[str, WorkerState],
    loads: dict[str, LoadStatus],
    errors: Callable[[str], list[ErrorStatus]],
    waiting: Mapping[str, float],
) -> ServeStatus:
    """Return the status with what the workers told last.

    Parameters
    ----------
    status : ServeStatus
    workers : mapping
        Dask's workers by address.
    loads : dict
        Of the deployments that follow their load.
    errors : callable
        Returns the last errors of a deployment.
    waiting : mapping
        How many requests wait at the proxies, by deployment, as far as they tell the controller.
    """
    told = {address: worker.metrics["serve"] for address, worker in workers.items() if worker.metrics.get("serve")}

    def replica(one: ReplicaStatus) -> ReplicaStatus:
        worker = workers.get(one.worker)
        if worker is None:
            return one
        serve = told.get(one.worker, {})
        counts = serve.get("replicas", {}).get(one.id, {})
        waiting = int(counts.get("waiting", 0))
        return _replace(
            one,
            in_flight=max(int(counts.get("running", 0)) - waiting, 0),
            queued=waiting,
            memory=int(worker.metrics.get("memory") or 0),
            models=list(serve.get("models", {}).get(one.id, ())),
        )

    def deployment(id: str, one: DeploymentStatus) -> DeploymentStatus:
        replicas = [replica(other) for other in one.replicas]
        return _replace(
            one,
            replicas=replicas,
            in_flight=sum(other.in_flight for other in replicas),
            queued=sum(other.queued for other in replicas) + _at_routers(id, one, told, loads, waiting),
            errors=errors(id),
        )

    def application(app: str, one: ApplicationStatus) -> ApplicationStatus:
        return _replace(
            one, deployments={name: deployment(deployment_id(app, name), it) for name, it in one.deployments.items()}
        )

    return _replace(
        status,
        applications={app: application(app, one) for app, one in status.applications.items()},
        workers=[WorkerStatus(address=address, **serve) for address, serve in told.items()],
        loads=loads,
    )


def _at_routers(
    id: str, one: DeploymentStatus, told: dict[str, Any], loads: dict[str, LoadStatus], waiting: Mapping[str, float]
) -> int:
    """Return how many requests wait at routers, those of sessions included: each tells some of the replicas, or all."""
    if id in loads:
        return round(loads[id].queued)
    counts = [told.get(other.worker, {}).get("replicas", {}).get(other.id, {}) for other in one.replicas]
    return max(round(waiting.get(id, 0.0)), *(int(count.get("wanted", 0)) for count in counts), 0)
