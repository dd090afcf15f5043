"""How many replicas each deployment should have that follows its load.

Reports of load come as events; the decisions are `dask_serve.policy.autoscaling`'s; what they come to is a number in
the registry, which the reconciler brings about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from ..config import AutoscalingConfig
from ..policy.autoscaling import Decision, Load, Scale, ScalingContext, decide, explain
from ..policy.desired import ApplicationSpec
from ..policy.load import EXPIRES
from .events import Events
from .policies import Policy, load_policy
from .registry import Registry
from .status import LoadStatus

__all__ = ["Scaling"]

#: Seconds between two rounds of decisions, at least, however many reports come.
LEAST = 0.05


class _Report(Struct):
    """What one process told last, and when."""

    at: float
    number: int
    levels: dict[str, float]
    #: Whose end is the end of it too: a client's id or a worker's address.
    owner: str = ""


class _Deployment(Struct):
    """One deployment that follows its load."""

    scale: Scale
    needed: int = 0
    load: Load = Load()
    #: When to decide again.
    wake_at: float | None = None
    policy: Policy | None = None


class Scaling:
    """Decides on numbers of replicas.

    Parameters
    ----------
    registry : Registry
        Its targets are changed here, and nowhere else.
    events : Events
        Gets each change with its reason.
    on_change : callable
        Called when a target has changed.
    """

    def __init__(self, registry: Registry, events: Events, on_change: Callable[[], None]) -> None:
        self._registry = registry
        self._events = events
        self._on_change = on_change
        #: By address of the worker: what runs, by replica.
        self._running: dict[str, _Report] = {}
        #: By router's process and loop: what waits, by deployment.
        self._queued: dict[str, _Report] = {}
        self._deployments: dict[str, _Deployment] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._decided = float("-inf")

    # -- events

    def runs(self, worker: str, running: dict[str, float]) -> None:
        """A worker tells how many requests run at its replicas."""
        self._running[worker] = _Report(time.monotonic(), 0, running)
        self.look()

    def waits(self, source: str, number: int, queued: dict[str, float], owner: str = "") -> None:
        """A process tells how many requests wait at its routers."""
        before = self._queued.get(source)
        # They may overtake each other on their way.
        if before is None or before.number < number:
            self._queued[source] = _Report(time.monotonic(), number, queued, owner)
            self.look()

    def lost(self, owner: str) -> None:
        """What a client or worker told counts no more."""
        self._running.pop(owner, None)
        for source in [source for source, report in self._queued.items() if report.owner == owner]:
            del self._queued[source]
        self.look()

    def look(self) -> None:
        """Something has changed: decide, soon."""
        if self._deployments or self._registry.scaled():
            self._wake(max(self._decided + LEAST, time.monotonic()))

    async def check(self, spec: ApplicationSpec) -> None:
        """Raise ConfigError where a policy of an application cannot be used."""
        for deployment in spec.deployments:
            config = deployment.options.autoscaling_config
            if config is not None and config.policy is not None:
                await asyncio.get_running_loop().run_in_executor(None, load_policy, config.policy)

    def close(self) -> None:
        """Decide no more."""
        if self._timer is not None:
            self._timer.cancel()
        for deployment in self._deployments.values():
            if deployment.policy is not None:
                deployment.policy.close()

    # -- decisions

    def decide(self) -> None:
        """Decide on all deployments, and when to do so again if nothing happens before."""
        self._timer = None
        now = self._decided = time.monotonic()
        configs = self._registry.scaled()
        self._forget(configs, now)
        loads = self._loads()
        changed = False
        for id, config in configs.items():
            target = self._registry.targets[id]
            deployment = self._deployments.setdefault(id, _Deployment(Scale(target=target, changed=now)))
            if deployment.scale.target != target:
                # Another deployment of that name.
                deployment.scale = Scale(target=target, changed=now)
            before, deployment.load = deployment.load, loads.get(id, _NONE)
            self._keep_policy(id, config, deployment, before != deployment.load)
            # Its replicas cannot be started: more of them would not help.
            if id not in self._registry.failed:
                changed = self._decide_on(id, config, deployment, now) or changed
        # Reports that nobody repeats go out of date without an event.
        expiry = min((report.at + EXPIRES for report in self._reports() if report.levels), default=None)
        wakes = [d.wake_at for d in self._deployments.values() if d.wake_at is not None]
        wake_at = min([*wakes, *([] if expiry is None else [expiry])], default=None)
        if wake_at is not None:
            self._wake(max(wake_at, now + LEAST))
        if changed:
            self._on_change()

    def _decide_on(self, id: str, config: AutoscalingConfig, deployment: _Deployment, now: float) -> bool:
        """Decide on one deployment; return whether its target has changed."""
        wish = None if deployment.policy is None else deployment.policy.wish
        before = deployment.scale.target
        decision: Decision = decide(config, deployment.scale, deployment.load, now, wish)
        deployment.scale, deployment.needed, deployment.wake_at = decision.scale, decision.needed, decision.wake_at
        after = decision.scale.target
        if after == before:
            return False
        why = explain(config, deployment.load, decision.needed, wish)
        self._registry.set_target(id, after, f"since {time.strftime('%H:%M:%S')}, because {why}")
        self._events.add("scaled", id, f"{before} → {after} replicas, because {why}")
        return True

    def _keep_policy(self, id: str, config: AutoscalingConfig, deployment: _Deployment, news: bool) -> None:
        """Have the policy asked that the options name, if any."""
        policy = deployment.policy
        if policy is not None and policy.policy != config.policy:
            policy.close()
            policy = deployment.policy = None
        if config.policy is None:
            return
        if policy is None:
            deployment.policy = Policy(config, lambda: self._context(id), self.look)
        elif news:
            policy.ask()

    def _context(self, id: str) -> ScalingContext | None:
        deployment = self._deployments.get(id)
        config = self._registry.scaled().get(id)
        if deployment is None or config is None:
            return None
        app, _, name = id.rpartition("/")
        return ScalingContext(
            app=app,
            deployment=name,
            config=config,
            target=deployment.scale.target,
            ready=self._registry.ready(id),
            running=deployment.load.running,
            queued=deployment.load.queued,
            now=time.monotonic(),
        )

    # -- what is known

    def loads(self) -> dict[str, LoadStatus]:
        """Return load and need of each deployment at this moment."""
        now = time.monotonic()
        scaled = self._registry.scaled()
        return {
            id: LoadStatus(
                running=deployment.load.running,
                queued=deployment.load.queued,
                needed=deployment.needed,
                due_in=None if deployment.wake_at is None else max(0.0, deployment.wake_at - now),
                policy_error="" if deployment.policy is None else deployment.policy.error,
            )
            for id, deployment in self._deployments.items()
            if id in scaled
        }

    def _reports(self) -> list[_Report]:
        return [*self._running.values(), *self._queued.values()]

    def _forget(self, configs: dict[str, Any], now: float) -> None:
        for reports in (self._running, self._queued):
            for source in [source for source, report in reports.items() if report.at + EXPIRES <= now]:
                del reports[source]
        for id in self._deployments.keys() - configs.keys():
            gone = self._deployments.pop(id)
            if gone.policy is not None:
                gone.policy.close()

    def _loads(self) -> dict[str, Load]:
        ready = {r.id: r.deployment for r in self._registry.replicas.values() if r.state == "ready"}
        running: dict[str, float] = {}
        queued: dict[str, float] = {}
        for report in self._running.values():
            for replica, level in report.levels.items():
                deployment = ready.get(replica)
                if deployment is not None:
                    running[deployment] = running.get(deployment, 0.0) + level
        for report in self._queued.values():
            for id, level in report.levels.items():
                queued[id] = queued.get(id, 0.0) + level
        return {id: Load(running.get(id, 0.0), queued.get(id, 0.0)) for id in {*running, *queued}}

    def _wake(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        # Both clocks are the same one, but for other loops than asyncio's own.
        when = loop.time() + (at - time.monotonic())
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self.decide)


_NONE = Load()
