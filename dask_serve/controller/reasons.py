"""Why something is under way: what the status says of decisions that are being carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..policy.desired import DeploymentSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .application import Application
    from .registry import Registry
    from .replica import Replica

__all__ = ["decision", "why_it_ends"]


def decision(registry: Registry, application: Application, spec: DeploymentSpec, replicas: Sequence[Replica]) -> str:
    """Return what is being done about a deployment, and why; empty while nothing is."""
    ending = sum(r.state == "draining" for r in replicas)
    if application.deleting:
        return f"its application is deleted: {_replicas(len(replicas))} to finish what runs there"
    target = registry.target(application.spec.name, spec)
    old = sum(r.state == "ready" and r.spec.revision != spec.revision for r in replicas)
    new = sum(r.state == "ready" and r.spec.revision == spec.revision for r in replicas)
    starting = sum(r.state == "starting" for r in replicas)
    told = []
    if old:
        told.append(
            f"an update to revision {spec.revision[:8]}: {new} of {_replicas(target)} run it, and {old} of "
            "the revision before serve until they are replaced"
        )
    if starting:
        told.append(f"starting {_replicas(starting)}: {target} are wanted{_because(registry, application, spec)}")
    if ending:
        told.append(f"ending {_replicas(ending)}, once what runs there has finished")
    return "; ".join(told)


def why_it_ends(registry: Registry, replica: Replica) -> str:
    """Return why a replica drains."""
    found = registry.desired(replica.deployment)
    application = registry.applications.get(replica.app)
    if found is None or application is None or application.deleting:
        return "it is deleted"
    spec = found[1]
    if replica.spec.revision != spec.revision:
        return f"revision {spec.revision[:8]} takes its place"
    if replica.worker in registry.leaving:
        return "its worker is leaving"
    return f"{registry.target(replica.app, spec)} replicas are wanted{_because(registry, application, spec)}"


def _because(registry: Registry, application: Application, spec: DeploymentSpec) -> str:
    if spec.options.autoscaling_config is None:
        return ""
    why = registry.reasons.get(f"{application.spec.name}/{spec.name}", "")
    return f" ({why})" if why else ""


def _replicas(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"
