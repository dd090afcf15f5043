"""Puts into words what the reconciler does with replicas; many that have the same fate are one event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from .events import brief
from .registry import Registry
from .replica import Replica

__all__ = ["Notes"]


class Notes:
    """Tells of replicas.

    Parameters
    ----------
    registry : Registry
        What is desired and observed.
    add : callable
        Takes kind, subject and text, as `Events.add`.
    """

    def __init__(self, registry: Registry, add: Callable[[str, str, str], None]) -> None:
        self._registry = registry
        self.add = add

    def failed(self, replica: Replica, error: str) -> None:
        """A replica could not be started, or gave up."""
        text = f"replica {replica.id} on worker {replica.worker} failed: {brief(error)}"
        self.add("start_failed", replica.deployment, text)

    def lost(self, replicas: Iterable[Replica], why: str) -> None:
        """Replicas are no more, or no more to be reckoned with; those that drained have no successors anyway."""
        lost = Counter((replica.deployment, replica.worker) for replica in replicas if replica.state != "draining")
        for (deployment, worker), number in lost.items():
            self.add("lost", deployment, f"{_count(number)} {why} {worker}, and replaced")

    def placed(self, deployment: str, before: tuple[int, str] | None) -> None:
        """It was looked for places; ``before`` is what `Registry.unplaced` said."""
        now = self._registry.unplaced.get(deployment)
        if now is not None and (before is None or now[1] != before[1]):
            self.add("unplaced", deployment, f"{_count(now[0])} wait for a worker: {brief(now[1])}")
        elif now is None and before is not None and self._registry.desired(deployment) is not None:
            self.add("placed", deployment, "no replica waits for a worker any more")

    def done(self, started: Mapping[str, int], stopped: Mapping[str, int]) -> None:
        """So many replicas were started and stopped by deployment, as it was planned."""
        for deployment, number in started.items():
            self.add("started", deployment, f"{_count(number)} started, {self._wanted(deployment)}")
        for deployment, number in stopped.items():
            self.add("stopped", deployment, f"{_count(number)} drained, {self._wanted(deployment)}")

    def _wanted(self, deployment: str) -> str:
        found = self._registry.desired(deployment)
        if found is None:
            return "as the deployment is no longer wanted"
        application, spec = found
        number = self._registry.target(application.spec.name, spec)
        return f"as {number} of revision {spec.revision[:8]} {'is' if number == 1 else 'are'} wanted"


def _count(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"
