"""From what should run and what runs to what is to be done next.

A pure function, called again after every event: what it returns is done at once or found missing the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil

from msgspec import Struct

from .lifecycle import State

__all__ = ["ATTEMPTS", "Attempts", "Plan", "Reconfigure", "Seen", "Start", "Stop", "Want", "has_failed", "plan"]

#: Failed starts in a row, with no replica of the revision ready, after which a deployment has failed.
ATTEMPTS = 3
#: Share of a deployment's replicas that a rolling update may run beyond the target, at least one.
SURGE = 0.25


class Want(Struct, frozen=True, kw_only=True):
    """The desired state of one deployment."""

    revision: str
    replicas: int
    #: Token of the options that change in place.
    settings: bytes = b""
    #: The revision that served before this one: kept up while this one has failed.
    previous: str | None = None


class Seen(Struct, frozen=True, kw_only=True):
    """One replica, as observed. Those in an end state need not be listed."""

    id: str
    deployment: str
    revision: str
    state: State
    settings: bytes = b""


class Attempts(Struct, frozen=True, kw_only=True):
    """Failed starts in a row of one revision; replicas that were started together count once."""

    failures: int
    #: When the last of them failed.
    last: float
    message: str = ""
    #: False: however often it happens, it is tried again.
    final: bool = True

    @property
    def again_at(self) -> float:
        """When to try again: 0.2, 1, 5, 25, then every 30 s after the last failure."""
        return self.last + min(0.2 * 5.0 ** (min(self.failures, 9) - 1), 30.0)


class Start(Struct, frozen=True):
    """Start one replica of a revision."""

    deployment: str
    revision: str


class Stop(Struct, frozen=True):
    """Drain a replica and let go of it."""

    replica: str


class Reconfigure(Struct, frozen=True):
    """Hand the deployment's present options to a ready replica."""

    replica: str


Action = Start | Stop | Reconfigure


class Plan(Struct, frozen=True):
    """What to do now, and when to look again if nothing happens before."""

    actions: list[Action]
    wake_at: float | None
    #: Deployments whose desired revision cannot be started.
    failed: frozenset[str]


def has_failed(attempts: Attempts | None, ready: int) -> bool:
    """Tell whether a revision with so many ready replicas is given up."""
    return attempts is not None and attempts.final and attempts.failures >= ATTEMPTS and ready == 0


def plan(
    desired: Mapping[str, Want],
    observed: Iterable[Seen],
    attempts: Mapping[tuple[str, str], Attempts],
    now: float,
) -> Plan:
    """Return the next actions.

    Parameters
    ----------
    desired : mapping
        What is wanted, by deployment id. Replicas of other deployments are stopped.
    observed : iterable of Seen
        All replicas, the oldest first.
    attempts : mapping
        Failed starts in a row by (deployment id, revision).
    now : float
        The time, on the clock of `Attempts.last`.
    """
    by_deployment: dict[str, list[Seen]] = {name: [] for name in desired}
    for replica in observed:
        if replica.state in ("starting", "ready"):
            by_deployment.setdefault(replica.deployment, []).append(replica)
    actions: list[Action] = []
    failed = set()
    wakes = []
    for name, replicas in by_deployment.items():
        want = desired.get(name)
        if want is None:
            actions += [Stop(replica.id) for replica in replicas]
            continue
        ready = sum(r.state == "ready" for r in replicas if r.revision == want.revision)
        revision: str | None = want.revision
        if has_failed(attempts.get((name, want.revision)), ready):
            failed.add(name)
            revision = want.previous
            if revision is not None and has_failed(attempts.get((name, revision)), _ready(replicas, revision)):
                revision = None
        if revision is None:
            # Nothing new can be started. What still serves, serves on; what tries to start is in vain.
            actions += [Stop(r.id) for r in replicas if r.state == "starting"]
            continue
        tried = attempts.get((name, revision))
        again_at = tried.again_at if tried is not None else now
        todo, missing = _deployment(name, want, revision, replicas)
        actions += todo
        if missing and again_at > now:
            wakes.append(again_at)
        else:
            actions += [Start(name, revision)] * missing
    return Plan(actions, min(wakes, default=None), frozenset(failed))


def _ready(replicas: list[Seen], revision: str) -> int:
    return sum(r.state == "ready" and r.revision == revision for r in replicas)


def _deployment(name: str, want: Want, revision: str, replicas: list[Seen]) -> tuple[list[Action], int]:
    """Return what to do for one deployment, and how many replicas of ``revision`` to start."""
    actions: list[Action] = []
    current = [r for r in replicas if r.revision == revision]
    ready = [r for r in current if r.state == "ready"]
    old = [r for r in replicas if r.revision != revision]
    # Of the other revisions only what is ready has a use: one for each new replica that is not ready yet.
    serving = [r for r in old if r.state == "ready"]
    actions += [Stop(r.id) for r in old if r.state == "starting"]
    keep = max(want.replicas - len(ready), 0)
    actions += [Stop(r.id) for r in serving[: max(len(serving) - keep, 0)]]

    room = want.replicas + max(1, ceil(SURGE * want.replicas)) - min(len(serving), keep) - len(current)
    missing = want.replicas - len(current)
    if missing < 0:
        # Those that do not serve yet go first, then the youngest.
        starting = [r for r in current if r.state == "starting"]
        surplus = (ready + starting)[missing:]
        actions += [Stop(r.id) for r in surplus]
        ready = [r for r in ready if r not in surplus]
    if revision == want.revision:
        actions += [Reconfigure(r.id) for r in ready if r.settings != want.settings]
    return actions, max(min(missing, room if serving else missing), 0)
