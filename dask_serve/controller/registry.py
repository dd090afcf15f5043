"""What the controller knows: desired applications, observed replicas, and the table and status made from them."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import AutoscalingConfig
from ..exceptions import ApplicationNotFoundError, ConfigError
from ..policy.desired import ApplicationSpec, DeploymentSpec, deployment_id
from ..policy.devices import Device
from ..policy.lifecycle import ENDS, Event, State, advance
from ..policy.reconcile import ATTEMPTS, Attempts, Seen, Want
from ..policy.routes import check_free, check_prefix
from ..routing.table import DeploymentEntry, ReplicaEntry, RouteEntry
from .history import History, told_of
from .status import ApplicationStatus, AutoscalingStatus, DeploymentStatus, Health, ReplicaStatus, worst

if TYPE_CHECKING:
    from ..config import DeploymentOptions

__all__ = ["Application", "Registry", "Replica", "settings_of"]

#: Seconds after which a replica that had to be replaced does not put off the next replacement.
FORGOTTEN = 300.0


def settings_of(options: DeploymentOptions) -> bytes:
    """Return a token of the options that a running replica must learn of when they change."""
    if options.autoscaling_config is not None:
        # They report their load; how many of them there are is not their business.
        options = msgspec.structs.replace(options, autoscaling_config=AutoscalingConfig())
    else:
        options = msgspec.structs.replace(options, num_replicas=1)
    return msgspec.msgpack.encode(options)


class Replica:
    """One replica, from the decision to start it to its end."""

    def __init__(self, app: str, spec: DeploymentSpec, worker: str, now: float) -> None:
        suffix = secrets.token_hex(3)
        self.id = f"{app}/{spec.name}/{suffix}"
        #: A fresh key for each: Dask remembers a key that erred.
        self.key = f"serve-{app}-{spec.name}-{suffix}"
        self.app = app
        self.deployment = deployment_id(app, spec.name)
        self.spec = spec
        self.worker = worker
        self.started_at = now
        self.settings = settings_of(spec.options)
        self.state: State = "starting"
        #: Its devices, on the host of its worker.
        self.host = ""
        self.devices: Sequence[Device] = ()
        #: What it takes of its worker's Dask resources; `held`: Dask knows, and must be told when it ends.
        self.booked: Mapping[str, float] = {}
        self.held = False
        #: The Dask future of the actor: it lives as long as this is held.
        self.future: Any = None
        #: True once Dask has made the actor; what it waits for from then on is user code.
        self.submitted = False
        self.door = ""
        self.process = ""
        self.message = ""
        self.ended = asyncio.Event()

    def move(self, event: Event) -> State:
        """Take a move of `dask_serve.policy.lifecycle` and return the new state."""
        self.state = advance(self.state, event)
        if self.state in ENDS:
            self.ended.set()
        return self.state


class Application:
    """One application as desired."""

    def __init__(self, spec: ApplicationSpec) -> None:
        self.spec = spec
        self.deleting = False
        #: Set once another one of the same name has taken its place.
        self.replaced = asyncio.Event()
        #: Deployments that have had all their replicas ready since they were last changed.
        self.reached: set[str] = set()
        #: What served before the present revision, until that one has proved itself.
        self.previous: dict[str, DeploymentSpec] = {}

    @property
    def deployments(self) -> dict[str, DeploymentSpec]:
        """The deployments by name."""
        return {spec.name: spec for spec in self.spec.deployments}


class Registry:
    """The state of the controller; no method of it waits for anything."""

    def __init__(self, history: History | None = None) -> None:
        self.applications: dict[str, Application] = {}
        #: What the applications were before, and who made them so.
        self.history = history or History()
        #: Replicas that have not ended, the oldest first.
        self.replicas: dict[str, Replica] = {}
        self.attempts: dict[tuple[str, str], Attempts] = {}
        #: What befell replicas that had been ready, and put off new ones: memory, health. By (deployment, revision).
        self.setbacks: dict[tuple[str, str], Attempts] = {}
        #: Definitions by revision, opaque to this process.
        self.code: dict[str, Any] = {}
        #: By deployment id: how many replicas found no worker, and why.
        self.unplaced: dict[str, tuple[int, str]] = {}
        #: Ids of the deployments that were given up.
        self.failed: frozenset[str] = frozenset()
        #: Of deployments that follow their load: how many replicas they should have, and why.
        self.targets: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    # -- desired

    def deploy(self, spec: ApplicationSpec, code: Mapping[str, Any]) -> None:
        """Make ``spec`` the desired state of its application, or raise ConfigError and change nothing."""
        self.check(spec, code)
        revisions = {deployment.revision for deployment in spec.deployments}
        self.code.update((revision, blob) for revision, blob in code.items() if revision in revisions)
        before = self.applications.get(spec.name)
        application = Application(spec)
        if before is not None and not before.deleting:
            self._carry_over(before, application)
        else:
            # One of that name before has nothing to do with this one.
            for id in [id for id in self.targets if id.startswith(spec.name + "/")]:
                del self.targets[id], self.reasons[id]
        self.applications[spec.name] = application
        if before is not None:
            before.replaced.set()
        # Who deploys again means: try again.
        for tried in (self.attempts, self.setbacks):
            for key in [key for key in tried if key[0].startswith(spec.name + "/")]:
                del tried[key]
        self.failed = frozenset(id for id in self.failed if not id.startswith(spec.name + "/"))

    def restore(self, spec: ApplicationSpec) -> None:
        """Make ``spec`` desired, which was so for the scheduler before this one."""
        self.applications[spec.name] = Application(spec)

    def delete(self, name: str) -> list[Replica]:
        """Stop wanting an application; return the replicas it still has."""
        application = self.applications.get(name)
        if application is None:
            known = ", ".join(map(repr, sorted(self.applications))) or "none"
            raise ApplicationNotFoundError(f"there is no application {name!r}; applications: {known}")
        application.deleting = True
        return [replica for replica in self.replicas.values() if replica.app == name]

    def spec_of(self, deployment: str, revision: str) -> tuple[str, DeploymentSpec] | None:
        """Return application and spec of one revision of a deployment, the desired or the previous one."""
        for name, application in self.applications.items():
            for spec in (*application.spec.deployments, *application.previous.values()):
                if deployment_id(name, spec.name) == deployment and spec.revision == revision:
                    return name, spec
        return None

    def wanted(self) -> dict[str, Want]:
        """Return the desired state for `dask_serve.policy.reconcile.plan`."""
        wants = {}
        for name, application in self._living():
            for spec in application.spec.deployments:
                previous = application.previous.get(spec.name)
                wants[deployment_id(name, spec.name)] = Want(
                    revision=spec.revision,
                    replicas=self.target(name, spec),
                    settings=settings_of(spec.options),
                    previous=None if previous is None else previous.revision,
                )
        return wants

    def target(self, app: str, spec: DeploymentSpec) -> int:
        """Return how many replicas a deployment should have."""
        config, number = spec.options.autoscaling_config, spec.options.num_replicas
        if config is None:
            assert isinstance(number, int)
            return number
        id = deployment_id(app, spec.name)
        if id not in self.targets:
            # One that had a fixed number keeps it until its load says otherwise.
            there = sum(r.deployment == id and r.state in ("starting", "ready") for r in self.replicas.values())
            self.targets[id] = max(config.start_replicas, there)
            self.reasons[id] = "to begin with"
        return config.clip(self.targets[id])

    def scaled(self) -> dict[str, AutoscalingConfig]:
        """Return the deployments that follow their load, each of which has a target then."""
        found = {}
        for name, application in self._living():
            for spec in application.spec.deployments:
                config = spec.options.autoscaling_config
                if config is not None:
                    self.target(name, spec)
                    if spec.name not in application.reached:
                        # No request is no reason to stop what is to prove that the code works.
                        config = msgspec.structs.replace(config, min_replicas=config.start_replicas)
                    found[deployment_id(name, spec.name)] = config
        for id in self.targets.keys() - found.keys():
            del self.targets[id], self.reasons[id]
        return found

    def _least(self, app: str, application: Application, spec: DeploymentSpec) -> int:
        """Return with how many replicas a deployment runs: those that its load has it start are not missed."""
        config, target = spec.options.autoscaling_config, self.target(app, spec)
        if config is None:
            return target
        return min(target, config.min_replicas if spec.name in application.reached else config.start_replicas)

    def is_extra(self, id: str, spec: DeploymentSpec) -> bool:
        """Whether a deployment can do without another replica, which its load asks for: it should not crowd others."""
        config = spec.options.autoscaling_config
        if config is None:
            return False
        living = [r for r in self.replicas.values() if r.deployment == id and r.state in ("starting", "ready")]
        if any(r.spec.revision != spec.revision for r in living):
            # Those of a rolling update take the threads of the ones that they replace.
            return False
        return len(living) >= max(config.min_replicas, 1)

    def keys(self) -> set[str]:
        """Return the Dask keys that bound arguments refer to."""
        return {key for spec in self._specs() for key in spec.keys}

    # -- observed

    def seen(self) -> list[Seen]:
        """Return the observed state for `dask_serve.policy.reconcile.plan`."""
        return [
            Seen(id=r.id, deployment=r.deployment, revision=r.spec.revision, state=r.state, settings=r.settings)
            for r in self.replicas.values()
        ]

    def on_worker(self, worker: str) -> list[Replica]:
        """Return the replicas that a worker holds."""
        return [replica for replica in self.replicas.values() if replica.worker == worker]

    def count_failure(self, replica: Replica, message: str, now: float) -> None:
        """Count a failed start; replicas that were started before the last failure belong to the same attempt."""
        key = (replica.deployment, replica.spec.revision)
        before = self.attempts.get(key)
        failures = 1
        if before is not None:
            failures = before.failures + (replica.started_at >= before.last)
        self.attempts[key] = Attempts(failures=failures, last=now, message=message)

    def count_setback(self, replica: Replica, message: str, now: float) -> None:
        """Note why a replica has to be replaced; the more often, the later. Long ago counts no more."""
        key = (replica.deployment, replica.spec.revision)
        before = self.setbacks.get(key)
        failures = 1 if before is None or now - before.last > FORGOTTEN else before.failures + 1
        self.setbacks[key] = Attempts(failures=failures, last=now, message=message, final=False)

    def tries(self) -> dict[tuple[str, str], Attempts]:
        """Return what puts off new replicas, for `dask_serve.policy.reconcile.plan`."""
        tries = dict(self.setbacks)
        for key, tried in self.attempts.items():
            setback = tries.get(key)
            if setback is None or tried.failures >= ATTEMPTS or tried.again_at >= setback.again_at:
                tries[key] = tried
        return tries

    def tidy(self) -> None:
        """Note what has been reached, and forget what has ended and the code that nobody needs."""
        self.replicas = {id: replica for id, replica in self.replicas.items() if replica.state not in ENDS}
        busy = {replica.app for replica in self.replicas.values()}
        for name, application in list(self.applications.items()):
            if application.deleting and name not in busy:
                del self.applications[name]
                continue
            for spec in application.spec.deployments:
                if self._ready(deployment_id(name, spec.name), spec.revision) >= self._least(name, application, spec):
                    application.reached.add(spec.name)
                    application.previous.pop(spec.name, None)
            if not application.deleting and len(application.reached) == len(application.spec.deployments):
                self.history.prove(name)
        known = {deployment_id(name, spec.name) for name, a in self._living() for spec in a.spec.deployments}
        self.attempts = {key: tried for key, tried in self.attempts.items() if key[0] in known}
        self.setbacks = {key: tried for key, tried in self.setbacks.items() if key[0] in known}
        needed = {spec.revision for spec in self._specs()} | {r.spec.revision for r in self.replicas.values()}
        self.code = self.history.kept(self.code, needed)

    # -- what others see

    def table_deployments(self) -> dict[str, DeploymentEntry]:
        """Return the deployments of the routing table."""
        entries = {}
        for name, application in self._living():
            for spec in application.spec.deployments:
                id = deployment_id(name, spec.name)
                ready = [
                    ReplicaEntry(id=r.id, process=r.process, door=r.door, worker=r.worker)
                    for r in self.replicas.values()
                    if r.deployment == id and r.state == "ready"
                ]
                entries[id] = DeploymentEntry(
                    id=id,
                    replicas=ready,
                    max_ongoing_requests=spec.options.max_ongoing_requests,
                    max_queued_requests=spec.options.max_queued_requests,
                    request_timeout_s=spec.options.request_timeout_s,
                    methods=spec.methods,
                    failure=self._failure(id, spec) if id in self.failed and not ready else None,
                    body_limit=spec.options.body_limit,
                    retries_on_loss=spec.options.retries_on_loss,
                    scales=spec.options.autoscaling_config is not None,
                )
        return entries

    def table_routes(self) -> list[RouteEntry]:
        """Return the routes of the routing table."""
        return [
            RouteEntry(prefix=application.spec.route_prefix, deployment=deployment_id(name, application.spec.ingress))
            for name, application in self._living()
            if application.spec.route_prefix is not None
        ]

    def table_applications(self) -> dict[str, str]:
        """Return the ingress deployment ids by application."""
        return {name: deployment_id(name, application.spec.ingress) for name, application in self._living()}

    def statuses(self) -> dict[str, ApplicationStatus]:
        """Return the status of every application."""
        return {name: self._application_status(name, app) for name, app in sorted(self.applications.items())}

    # -- inside

    def _living(self) -> Iterable[tuple[str, Application]]:
        return [(name, app) for name, app in self.applications.items() if not app.deleting]

    def _specs(self) -> Iterable[DeploymentSpec]:
        for _, application in self._living():
            yield from application.spec.deployments
            yield from application.previous.values()

    def _ready(self, deployment: str, revision: str | None = None) -> int:
        return sum(
            r.state == "ready" and r.deployment == deployment and revision in (None, r.spec.revision)
            for r in self.replicas.values()
        )

    def check(self, spec: ApplicationSpec, code: Mapping[str, Any]) -> None:
        """Raise ConfigError where ``spec`` cannot be deployed."""
        if not spec.name or "/" in spec.name:
            raise ConfigError(f"application name {spec.name!r} is not valid: it must not be empty nor contain '/'")
        names = [deployment.name for deployment in spec.deployments]
        for name, number in Counter(names).items():
            if number > 1:
                raise ConfigError(f"application {spec.name!r} has {number} deployments named {name!r}")
        if spec.ingress not in names:
            raise ConfigError(f"application {spec.name!r} has no deployment {spec.ingress!r}; it has {names}")
        if spec.route_prefix is not None:
            check_prefix(spec.route_prefix)
            check_free(spec.name, spec.route_prefix, {name: a.spec.route_prefix for name, a in self._living()})
        here = code.keys() | self.code.keys() | self.history.stored
        missing = [d.name for d in spec.deployments if d.revision not in here]
        if missing:
            raise ConfigError(f"the code of {', '.join(missing)} in application {spec.name!r} was not sent")

    def _carry_over(self, before: Application, after: Application) -> None:
        old, new = before.deployments, after.deployments
        for name, spec in new.items():
            if old.get(name) == spec and name in before.reached:
                after.reached.add(name)
            previous = before.previous.get(name)
            if name in old and self._ready(deployment_id(after.spec.name, name), old[name].revision):
                previous = old[name] if old[name].revision != spec.revision else previous
            if previous is not None and previous.revision != spec.revision:
                after.previous[name] = previous

    def _failure(self, id: str, spec: DeploymentSpec) -> str:
        tried = self.attempts.get((id, spec.revision))
        return tried.message if tried is not None else "it could not be started"

    def _application_status(self, name: str, application: Application) -> ApplicationStatus:
        deployments = {
            spec.name: self._deployment_status(name, application, spec) for spec in application.spec.deployments
        }
        status = worst([deployment.status for deployment in deployments.values()])
        told = [f"{name}: {d.message}" for name, d in deployments.items() if d.message and d.status == status]
        entry = self.history.current(name)
        return ApplicationStatus(
            **({} if entry is None else told_of(entry)),
            status=status,
            message="\n".join(told),
            route_prefix=application.spec.route_prefix,
            ingress=application.spec.ingress,
            deployments=deployments,
        )

    def _deployment_status(self, app: str, application: Application, spec: DeploymentSpec) -> DeploymentStatus:
        id = deployment_id(app, spec.name)
        replicas = [r for r in self.replicas.values() if r.deployment == id]
        status: Health = "deploying"
        if application.deleting:
            status = "deleting"
        elif id in self.failed:
            status = "failed"
        elif self._ready(id, spec.revision) >= self._least(app, application, spec):
            status = "running"
        elif spec.name in application.reached:
            status = "unhealthy"
        config = spec.options.autoscaling_config
        target = 0 if application.deleting else self.target(app, spec)
        return DeploymentStatus(
            status=status,
            setback=self._setback(id, spec),
            message=self._deployment_message(id, spec, status, replicas, target),
            target=target,
            autoscaling=None
            if config is None or application.deleting
            else AutoscalingStatus(
                min_replicas=config.min_replicas, max_replicas=config.max_replicas, why=self.reasons[id]
            ),
            counts=dict(sorted(Counter(r.state for r in replicas).items())),
            replicas=[
                ReplicaStatus(
                    id=r.id,
                    state=r.state,
                    worker=r.worker,
                    revision=r.spec.revision,
                    message=r.message,
                    devices=[device.id for device in r.devices],
                )
                for r in replicas
            ],
        )

    def _setback(self, id: str, spec: DeploymentSpec) -> str:
        tried = self.setbacks.get((id, spec.revision))
        if tried is None:
            return ""
        return tried.message if tried.failures == 1 else f"{tried.message} ({tried.failures} times in a row)"

    def _deployment_message(
        self, id: str, spec: DeploymentSpec, status: Health, replicas: list[Replica], target: int
    ) -> str:
        if status == "failed":
            serving = self._ready(id)
            note = f"{serving} replicas of the previous revision go on serving\n" if serving else ""
            return note + self._failure(id, spec)
        told = []
        if id in self.unplaced and status != "deleting":
            number, reason = self.unplaced[id]
            told.append(f"{number} of {target} replicas wait for a worker: {reason}")
        if status in ("running", "deleting"):
            return "\n".join(told)
        tried = self.attempts.get((id, spec.revision))
        if tried is not None:
            told.append(f"starting failed {tried.failures} times, trying again: {_last_line(tried.message)}")
        setback = self._setback(id, spec)
        if setback:
            told.append(setback)
        told += [f"{r.id}: {r.message}" for r in replicas if r.state == "starting" and r.message]
        return "\n".join(told)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
