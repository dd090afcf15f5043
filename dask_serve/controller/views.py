"""What others see of the registry: the routing table's parts and the status, made anew where something changed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..policy.desired import DeploymentSpec, deployment_id
from ..routing.table import DeploymentEntry, ReplicaEntry, RouteEntry
from .history import told_of
from .reasons import decision, why_it_ends
from .status import ApplicationStatus, AutoscalingStatus, DeploymentStatus, Health, ReplicaStatus, worst

if TYPE_CHECKING:
    from .application import Application
    from .registry import Registry
    from .replica import Replica

__all__ = ["Views"]


class Views:
    """Derives table and status from a registry.

    What did not change is the same object as the last time.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._changed_entries = registry.follow()
        self._entries: dict[str, DeploymentEntry] = {}
        self._changed_statuses = registry.follow()
        self._statuses: dict[str, ApplicationStatus] = {}

    # -- the table

    def deployments(self) -> dict[str, DeploymentEntry]:
        """Return the deployments of the routing table."""
        if self._changed_entries:
            entries = dict(self._entries)
            for id in self._changed_entries:
                found = self._registry.desired(id)
                if found is None:
                    entries.pop(id, None)
                else:
                    entry = self._entry(id, found[1])
                    if entry != entries.get(id):
                        entries[id] = entry
            self._changed_entries.clear()
            self._entries = entries
        return self._entries

    def _entry(self, id: str, spec: DeploymentSpec) -> DeploymentEntry:
        registry, options = self._registry, spec.options
        ready = [
            ReplicaEntry(id=r.id, process=r.process, door=r.door, worker=r.worker)
            for r in registry.of(id)
            if r.state == "ready" and r.worker not in registry.silent
        ]
        return DeploymentEntry(
            id=id,
            replicas=ready,
            max_ongoing_requests=options.max_ongoing_requests,
            max_queued_requests=options.max_queued_requests,
            request_timeout_s=options.request_timeout_s,
            methods=spec.methods,
            failure=registry.failure(id, spec.revision) if id in registry.failed and not registry.ready(id) else None,
            body_limit=options.body_limit,
            retries_on_loss=options.retries_on_loss,
            scales=options.autoscaling_config is not None,
            rows=spec.rows,
        )

    def routes(self) -> list[RouteEntry]:
        """Return the routes of the routing table."""
        return [
            RouteEntry(prefix=application.spec.route_prefix, deployment=deployment_id(name, application.spec.ingress))
            for name, application in self._registry.living()
            if application.spec.route_prefix is not None
        ]

    def applications(self) -> dict[str, str]:
        """Return the ingress deployment ids by application."""
        return {name: deployment_id(name, app.spec.ingress) for name, app in self._registry.living()}

    def silent(self) -> list[str]:
        """Return the processes that are not listed because they do not answer, and may come back."""
        registry = self._registry
        if not registry.silent:
            return []
        return sorted({r.process for worker in registry.silent for r in registry.on_worker(worker) if r.process})

    # -- the status

    def statuses(self) -> dict[str, ApplicationStatus]:
        """Return the status of every application."""
        if self._changed_statuses:
            applications = self._registry.applications
            # Not in place: the last status has it.
            statuses = dict(self._statuses)
            for name in {id.partition("/")[0] for id in self._changed_statuses}:
                if name in applications:
                    statuses[name] = self._application(name, applications[name])
                else:
                    statuses.pop(name, None)
            self._changed_statuses.clear()
            self._statuses = dict(sorted(statuses.items()))
        return self._statuses

    def _application(self, name: str, application: Application) -> ApplicationStatus:
        deployments = {spec.name: self._deployment(name, application, spec) for spec in application.spec.deployments}
        status = worst([deployment.status for deployment in deployments.values()])
        told = [f"{name}: {d.message}" for name, d in deployments.items() if d.message and d.status == status]
        # A deployment that the application had for that update only has no status of its own any more.
        gone = {name: why for name, why in application.taken_back.items() if name not in deployments}
        if gone and not application.deleting:
            status = "failed"
            told += [f"{name}: {_taken_back(0, why)}" for name, why in gone.items()]
        entry = self._registry.history.current(name)
        return ApplicationStatus(
            **({} if entry is None else told_of(entry)),
            status=status,
            message="\n".join(told),
            route_prefix=application.spec.route_prefix,
            ingress=application.spec.ingress,
            deployments=deployments,
        )

    def _deployment(self, app: str, application: Application, spec: DeploymentSpec) -> DeploymentStatus:
        registry = self._registry
        id = deployment_id(app, spec.name)
        replicas = registry.of(id)
        status: Health = "deploying"
        if application.deleting:
            status = "deleting"
        elif id in registry.failed or spec.name in application.taken_back:
            status = "failed"
        elif registry.ready(id, spec.revision) >= registry.least(application, spec):
            if spec.name in application.reached or registry.settled(id, spec):
                status = "running"
        elif spec.name in application.reached:
            status = "unhealthy"
        config = spec.options.autoscaling_config
        target = 0 if application.deleting else registry.target(app, spec)
        return DeploymentStatus(
            status=status,
            revision=spec.revision,
            decision=decision(registry, application, spec, replicas),
            setback=self._setback(id, spec),
            message=self._message(id, application, spec, status, replicas),
            target=target,
            autoscaling=None
            if config is None or application.deleting
            else AutoscalingStatus(
                min_replicas=config.min_replicas, max_replicas=config.max_replicas, why=registry.reasons[id]
            ),
            counts=dict(sorted(Counter(r.state for r in replicas).items())),
            replicas=[
                ReplicaStatus(
                    id=r.id,
                    state=r.state,
                    worker=r.worker,
                    revision=r.spec.revision,
                    message=self._note(r),
                    devices=[device.id for device in r.devices],
                    since=r.since,
                    environment="" if r.spec.environment is None else r.spec.environment.id,
                )
                for r in replicas
            ],
        )

    def _note(self, replica: Replica) -> str:
        if replica.worker in self._registry.silent:
            return "its worker does not answer"
        if replica.worker in self._registry.leaving and replica.state == "ready":
            return "its worker is leaving; it serves until it is replaced"
        if replica.state == "draining" and not replica.message:
            return why_it_ends(self._registry, replica)
        if replica.id in self._registry.moving and replica.state == "ready":
            return "its worker has too few threads; it serves until it is replaced on another"
        return replica.message

    def _setback(self, id: str, spec: DeploymentSpec) -> str:
        tried = self._registry.setbacks.get((id, spec.revision))
        if tried is None:
            return ""
        return tried.message if tried.failures == 1 else f"{tried.message} ({tried.failures} times in a row)"

    def _message(
        self, id: str, application: Application, spec: DeploymentSpec, status: Health, replicas: list[Replica]
    ) -> str:
        registry = self._registry
        ready = registry.ready(id)
        if status == "failed":
            why = application.taken_back.get(spec.name)
            if why is not None:
                return _taken_back(ready, why)
            note = f"{ready} replicas of the previous revision go on serving\n" if ready else ""
            return note + registry.failure(id, spec.revision)
        told = []
        if id in registry.unplaced and status != "deleting":
            number, reason = registry.unplaced[id]
            target = registry.target(application.spec.name, spec)
            told.append(f"{number} of {target} replicas wait for a worker: {reason}")
            if id in registry.crowded and not spec.options.max_unavailable:
                told.append(
                    f"the update waits: the {ready} replicas that serve take what the new ones need. Add a worker, or "
                    "deploy with max_unavailable=1, which lets one stop before its successor starts"
                )
        if status in ("running", "deleting"):
            return "\n".join(told)
        tried = registry.attempts.get((id, spec.revision))
        if tried is not None:
            told.append(f"starting failed {tried.failures} times, trying again: {_last_line(tried.message)}")
        setback = self._setback(id, spec)
        if setback:
            told.append(setback)
        told += [f"{r.id}: {r.message}" for r in replicas if (r.state == "starting" or r.settling) and r.message]
        return "\n".join(told)


def _taken_back(ready: int, why: str) -> str:
    return f"the update was taken back, and {ready} replicas of the previous revision go on serving\n{why}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
