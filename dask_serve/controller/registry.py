"""What the controller knows: desired applications and observed replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ..config import AutoscalingConfig
from ..exceptions import ApplicationNotFoundError, ConfigError
from ..policy.desired import ApplicationSpec, DeploymentSpec, deployment_id
from ..policy.lifecycle import ENDS
from ..policy.reconcile import ATTEMPTS, Attempts, Seen, Want, share
from ..policy.routes import check_free, check_prefix
from .application import Application
from .history import History
from .replica import Replica, settings_of

__all__ = ["Registry"]

#: Seconds after which a replica that had to be replaced does not put off the next replacement.
FORGOTTEN = 300.0


class Registry:
    """The state of the controller; no method of it waits for anything.

    What is derived from it (table, status, plan) is made anew for those deployments only that have changed.
    """

    def __init__(self, history: History | None = None) -> None:
        self.applications: dict[str, Application] = {}
        #: What the applications were before, and who made them so.
        self.history = history or History()
        #: Replicas that have not ended, the oldest first; the same by deployment and by worker.
        self.replicas: dict[str, Replica] = {}
        self.by_deployment: dict[str, dict[str, Replica]] = {}
        self.by_worker: dict[str, dict[str, Replica]] = {}
        self.attempts: dict[tuple[str, str], Attempts] = {}
        #: What befell replicas that had been ready, and put off new ones: memory, health. By (deployment, revision).
        self.setbacks: dict[tuple[str, str], Attempts] = {}
        #: Definitions by revision, and files of environments by their keys; opaque to this process.
        self.code: dict[str, Any] = {}
        #: By deployment id: how many replicas found no worker, and why.
        self.unplaced: dict[str, tuple[int, str]] = {}
        #: Deployments whose new replicas find no place because their old ones hold it.
        self.crowded: set[str] = set()
        #: Ids of the deployments that were given up.
        self.failed: frozenset[str] = frozenset()
        #: Of deployments that follow their load: how many replicas they should have, and why.
        self.targets: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        #: Workers that are about to go: their replicas serve until they are replaced.
        self.leaving: set[str] = set()
        #: Those of them that can wait until there are free threads elsewhere.
        self.at_leisure: set[str] = set()
        #: Ids of replicas that go where there is more room: they serve until they are replaced.
        self.moving: set[str] = set()
        #: Workers whose doors do not answer: no new requests go there.
        self.silent: set[str] = set()
        #: Processes that were given up though their connections may stand.
        self.given_up: list[str] = []
        #: Called when an update was taken back: application, what was to be, and why.
        self.on_taken_back: Callable[[str, ApplicationSpec, str], None] = lambda name, spec, why: None
        self._followers: list[set[str]] = []
        #: Revisions whose code nobody needs now, and for which it was decided whether to keep it.
        self._spare: set[str] = set()

    # -- changes

    def follow(self) -> set[str]:
        """Return a set into which the ids of changed deployments are put from now on; its owner empties it."""
        follower = set(self.by_deployment) | {id for id, _, _ in self._specs()}
        self._followers.append(follower)
        return follower

    def touch(self, *deployments: str) -> None:
        """Note that something about deployments has changed."""
        for follower in self._followers:
            follower.update(deployments)

    def touch_application(self, name: str) -> None:
        """Note that something about all deployments of an application has changed."""
        # Itself, too: it may have neither replicas nor anything that it should run.
        ids = [name + "/", *(id for id in self.by_deployment if id.startswith(name + "/"))]
        self.touch(*ids, *(id for id, app, _ in self._specs() if app == name))

    def touch_worker(self, worker: str) -> None:
        """Note that something about a worker has changed."""
        self.touch(*{replica.deployment for replica in self.on_worker(worker)}, *self.unplaced)

    def add(self, replica: Replica) -> None:
        """A replica is to be started."""
        replica.changed = self._on_changed
        self.replicas[replica.id] = replica
        self.by_deployment.setdefault(replica.deployment, {})[replica.id] = replica
        self.by_worker.setdefault(replica.worker, {})[replica.id] = replica
        self.touch(replica.deployment)

    def _on_changed(self, replica: Replica) -> None:
        self.touch(replica.deployment)
        if replica.state in ENDS and self.replicas.pop(replica.id, None) is not None:
            for index, key in ((self.by_deployment, replica.deployment), (self.by_worker, replica.worker)):
                del index[key][replica.id]
                if not index[key]:
                    del index[key]
            self.moving.discard(replica.id)
            # There is room now.
            self.touch(*self.unplaced)

    # -- desired

    def deploy(self, spec: ApplicationSpec, code: Mapping[str, Any]) -> None:
        """Make ``spec`` the desired state of its application, or raise ConfigError and change nothing."""
        self.check(spec, code)
        self.replace(spec, code)

    def replace(self, spec: ApplicationSpec, code: Mapping[str, Any]) -> None:
        """Make ``spec``, which was checked, the desired state of its application."""
        needs = {name for deployment in spec.deployments for name in deployment.needs}
        self.code.update((name, blob) for name, blob in code.items() if name in needs)
        before = self.applications.get(spec.name)
        application = Application(spec)
        if before is not None and not before.deleting:
            self._carry_over(before, application)
        else:
            # One of that name before has nothing to do with this one.
            for id in [id for id in self.targets if id.startswith(spec.name + "/")]:
                del self.targets[id], self.reasons[id]
        self._put(application)

    def restore(self, spec: ApplicationSpec) -> None:
        """Make ``spec`` desired, which was so for the scheduler before this one."""
        self._put(Application(spec))

    def _put(self, application: Application) -> None:
        name = application.spec.name
        self.touch_application(name)
        before = self.applications.get(name)
        self.applications[name] = application
        if before is not None:
            before.replaced.set()
        # Who deploys again means: try again.
        for tried in (self.attempts, self.setbacks):
            for key in [key for key in tried if key[0].startswith(name + "/")]:
                del tried[key]
        self.failed = frozenset(id for id in self.failed if not id.startswith(name + "/"))
        self.touch_application(name)

    def take_back(self, id: str, why: str = "") -> bool:
        """A deployment cannot be brought to its desired revision: go back to what served before, if anything did.

        The application goes back as a whole, since its deployments fit each other. With ``why``, the revision is the
        same, and its replicas do not take over the options that change in place.
        """
        name, _, deployment = id.partition("/")
        application = self.applications[name]
        spec = application.deployments.get(deployment)
        if application.before is None or spec is None:
            return False
        standby = application.standby(deployment)
        same = standby is not None and standby.revision == spec.revision
        if same and not (why and standby is not None and settings_of(standby.options) != settings_of(spec.options)):
            # It is not this update that it suffers from.
            return False
        why = why or self.failure(id, spec.revision)
        back = Application(application.before)
        back.taken_back = {deployment: why}
        for other in back.spec.deployments:
            if application.deployments.get(other.name) == other and other.name in application.reached:
                back.reached.add(other.name)
        self._put(back)
        self.on_taken_back(name, application.spec, why)
        return True

    def delete(self, name: str) -> list[Replica]:
        """Stop wanting an application; return the replicas it still has."""
        application = self.applications.get(name)
        if application is None:
            known = ", ".join(map(repr, sorted(self.applications))) or "none"
            raise ApplicationNotFoundError(f"there is no application {name!r}; applications: {known}")
        application.deleting = True
        self.touch_application(name)
        return [replica for replica in self.replicas.values() if replica.app == name]

    def spec_of(self, deployment: str, revision: str) -> tuple[str, DeploymentSpec] | None:
        """Return application and spec of a deployment, if that is its desired revision."""
        for id, name, spec in self._specs():
            if id == deployment and spec.revision == revision:
                return name, spec
        return None

    def wanted(self, deployments: Iterable[str]) -> dict[str, Want]:
        """Return the desired state of some deployments for `dask_serve.policy.reconcile.plan`."""
        wants = {}
        for id in deployments:
            found = self.desired(id)
            if found is None:
                continue
            application, spec = found
            options = spec.options
            number = self.target(application.spec.name, spec)
            surge = share(options.max_surge, number, up=True)
            standby = application.standby(spec.name)
            wants[id] = Want(
                revision=spec.revision,
                replicas=number,
                settings=settings_of(options),
                surge=surge,
                unavailable=max(share(options.max_unavailable, number, up=False), not surge),
                retreat=application.before is not None and (standby is None or standby.revision != spec.revision),
            )
        return wants

    def desired(self, id: str) -> tuple[Application, DeploymentSpec] | None:
        """Return what a deployment should be and its application, if it should be."""
        name, _, deployment = id.partition("/")
        application = self.applications.get(name)
        if application is None or application.deleting:
            return None
        for spec in (*application.spec.deployments, *application.leftovers):
            if spec.name == deployment:
                return application, spec
        return None

    # -- numbers of replicas

    def target(self, app: str, spec: DeploymentSpec) -> int:
        """Return how many replicas a deployment should have."""
        config, number = spec.options.autoscaling_config, spec.options.num_replicas
        if config is None:
            assert isinstance(number, int)
            return number
        id = deployment_id(app, spec.name)
        if id not in self.targets:
            # One that had a fixed number keeps it until its load says otherwise.
            there = sum(r.state in ("starting", "ready") for r in self.of(id))
            self.set_target(id, max(config.start_replicas, there), "to begin with")
        return config.clip(self.targets[id])

    def set_target(self, id: str, number: int, why: str) -> None:
        """Note how many replicas a deployment should have from now on."""
        self.targets[id], self.reasons[id] = number, why
        self.touch(id)

    def scaled(self) -> dict[str, AutoscalingConfig]:
        """Return the deployments that follow their load, each of which has a target then."""
        found = {}
        for id, name, spec in self._specs():
            config = spec.options.autoscaling_config
            if config is not None:
                self.target(name, spec)
                application = self.applications[name]
                if spec.name in application.deployments and spec.name not in application.reached:
                    # No request is no reason to stop what is to prove that the code works.
                    config = msgspec.structs.replace(config, min_replicas=config.start_replicas)
                found[id] = config
        for id in self.targets.keys() - found.keys():
            del self.targets[id], self.reasons[id]
        return found

    def least(self, application: Application, spec: DeploymentSpec) -> int:
        """Return with how many replicas a deployment runs: those that its load has it start are not missed."""
        config, target = spec.options.autoscaling_config, self.target(application.spec.name, spec)
        if config is None:
            return target
        return min(target, config.min_replicas if spec.name in application.reached else config.start_replicas)

    def is_extra(self, id: str, spec: DeploymentSpec) -> bool:
        """Whether a deployment can do without another replica until there are free threads: it should not crowd others.

        That is one more which its load asks for, or one for another that goes on serving elsewhere meanwhile.
        """
        config = spec.options.autoscaling_config
        living = [r for r in self.of(id) if r.state in ("starting", "ready")]
        if any(r.worker in self.at_leisure for r in living):
            return len(living) >= self.target(living[0].app, spec)
        if config is None:
            return False
        if any(r.spec.revision != spec.revision or r.worker in self.leaving for r in living):
            # Those of a rolling update, and those of workers that go, are in place of others.
            return False
        return len(living) >= max(config.min_replicas, 1)

    def keys(self) -> set[str]:
        """Return the Dask keys that bound arguments refer to."""
        return {key for spec in self._all_specs() for key in spec.keys}

    # -- observed

    def seen(self, deployments: Iterable[str]) -> list[Seen]:
        """Return the observed state of some deployments for `dask_serve.policy.reconcile.plan`."""
        return [
            Seen(
                id=r.id,
                deployment=id,
                revision=r.spec.revision,
                state=r.state,
                settings=r.settings,
                leaving=r.worker in self.leaving or r.id in self.moving,
            )
            for id in deployments
            for r in self.of(id)
        ]

    def of(self, deployment: str) -> list[Replica]:
        """Return the replicas of a deployment, the oldest first."""
        return list(self.by_deployment.get(deployment, {}).values())

    def on_worker(self, worker: str) -> list[Replica]:
        """Return the replicas that a worker holds."""
        return list(self.by_worker.get(worker, {}).values())

    def ready(self, deployment: str, revision: str | None = None) -> int:
        """Return how many replicas of a deployment are ready."""
        return sum(r.state == "ready" and revision in (None, r.spec.revision) for r in self.of(deployment))

    def settled(self, id: str, spec: DeploymentSpec) -> bool:
        """Tell whether the replicas that stay have taken over the options that change in place."""
        settings = settings_of(spec.options)
        return all(
            r.settings == settings and not r.settling
            for r in self.of(id)
            if r.state == "ready" and r.spec.revision == spec.revision and r.worker not in self.leaving
        )

    def count_failure(self, replica: Replica, message: str, now: float) -> None:
        """Count a failed start; replicas that were started before the last failure belong to the same attempt."""
        key = (replica.deployment, replica.spec.revision)
        before = self.attempts.get(key)
        failures = 1
        if before is not None:
            failures = before.failures + (replica.started_at >= before.last)
        self.attempts[key] = Attempts(failures=failures, last=now, message=message)
        self.touch(replica.deployment)

    def count_setback(self, replica: Replica, message: str, now: float) -> None:
        """Note why a replica has to be replaced; the more often, the later. Long ago counts no more."""
        key = (replica.deployment, replica.spec.revision)
        before = self.setbacks.get(key)
        failures = 1 if before is None or now - before.last > FORGOTTEN else before.failures + 1
        self.setbacks[key] = Attempts(failures=failures, last=now, message=message, final=False)
        self.touch(replica.deployment)

    def tries(self) -> dict[tuple[str, str], Attempts]:
        """Return what puts off new replicas, for `dask_serve.policy.reconcile.plan`."""
        tries = dict(self.setbacks)
        for key, tried in self.attempts.items():
            setback = tries.get(key)
            if setback is None or tried.failures >= ATTEMPTS or tried.again_at >= setback.again_at:
                tries[key] = tried
        return tries

    def failure(self, id: str, revision: str) -> str:
        """Return why a revision could not be started."""
        tried = self.attempts.get((id, revision))
        return tried.message if tried is not None else "it could not be started"

    def tidy(self, deployments: Iterable[str]) -> None:
        """Note what has been reached by deployments that changed, and forget what nobody needs any more."""
        for name in {id.partition("/")[0] for id in deployments}:
            application = self.applications.get(name)
            if application is not None and not application.deleting:
                self._note_reached(application)
            elif application is not None and not any(id.startswith(name + "/") for id in self.by_deployment):
                del self.applications[name]
                self.touch_application(name)
        self.attempts = {key: tried for key, tried in self.attempts.items() if self.desired(key[0]) is not None}
        self.setbacks = {key: tried for key, tried in self.setbacks.items() if self.desired(key[0]) is not None}
        specs = [*self._all_specs(), *(replica.spec for replica in self.replicas.values())]
        needed = {spec.revision for spec in specs}
        needed.update(*(spec.needs for spec in specs if spec.environment is not None))
        if not self.code.keys() - needed <= self._spare:
            self.code = self.history.kept(self.code, needed)
        self._spare = self.code.keys() - needed

    def _note_reached(self, application: Application) -> None:
        name = application.spec.name
        specs = application.spec.deployments
        for spec in specs:
            id = deployment_id(name, spec.name)
            if spec.name in application.reached or self.ready(id, spec.revision) < self.least(application, spec):
                continue
            if self.settled(id, spec):
                application.reached.add(spec.name)
        if len(application.reached) < len(specs):
            return
        self.history.prove(name)
        if application.before is not None:
            gone = application.leftovers
            application.before = None
            self.touch(*(deployment_id(name, spec.name) for spec in (*specs, *gone)))

    # -- inside

    def living(self) -> Iterable[tuple[str, Application]]:
        """Return the applications that are wanted, with their names."""
        return [(name, app) for name, app in self.applications.items() if not app.deleting]

    def routes(self) -> dict[str, str | None]:
        """Return the route prefix of each application that is wanted."""
        return {name: application.spec.route_prefix for name, application in self.living()}

    def _specs(self) -> Iterable[tuple[str, str, DeploymentSpec]]:
        """Return what should run: id, application and spec."""
        for name, application in self.living():
            for spec in (*application.spec.deployments, *application.leftovers):
                yield deployment_id(name, spec.name), name, spec

    def _all_specs(self) -> Iterable[DeploymentSpec]:
        for _, application in self.living():
            yield from application.spec.deployments
            if application.before is not None:
                yield from application.before.deployments

    def check(
        self, spec: ApplicationSpec, code: Mapping[str, Any], routes: Mapping[str, str | None] | None = None
    ) -> None:
        """Raise ConfigError where ``spec`` cannot be deployed, beside the ``routes`` of applications."""
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
            check_free(spec.name, spec.route_prefix, self.routes() if routes is None else routes)
        here = code.keys() | self.code.keys() | self.history.stored
        missing = [d.name for d in spec.deployments if not here.issuperset(d.needs)]
        if missing:
            raise ConfigError(f"the code of {', '.join(missing)} in application {spec.name!r} was not sent")

    def _carry_over(self, before: Application, after: Application) -> None:
        old, new = before.deployments, after.deployments
        for name, spec in new.items():
            if old.get(name) == spec and name in before.reached:
                after.reached.add(name)
        if before.spec == after.spec:
            after.before = before.before
            return
        # Without requests, none is enough for some.
        ids = {name: deployment_id(after.spec.name, name) for name in old}
        serves = all(
            (self.ready(ids[name], spec.revision) and (name in before.reached or self.settled(ids[name], spec)))
            or not self.least(before, spec)
            for name, spec in old.items()
        )
        # What never served is nothing to go back to.
        after.before = before.spec if serves else before.before
