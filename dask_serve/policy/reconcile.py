"""From what should run and what runs to what is to be done next.

A pure function, called again after every event: what it returns is done at once or found missing the next time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import ceil, floor

from msgspec import Struct

from .lifecycle import State

__all__ = [
    "ATTEMPTS",
    "Attempts",
    "Plan",
    "Reconfigure",
    "Seen",
    "Start",
    "Stop",
    "Want",
    "has_failed",
    "plan",
    "share",
]

#: Failed starts in a row after which a revision is given up: at once where another one stands by, otherwise when none
#: of its replicas is ready.
ATTEMPTS = 3


def share(value: float, replicas: int, *, up: bool) -> int:
    """Return how many replicas a number (int) or a fraction (float) of ``replicas`` means, rounded up or down."""
    if isinstance(value, int):
        return value
    return ceil(value * replicas) if up else floor(value * replicas)


class Want(Struct, frozen=True, kw_only=True):
    """The desired state of one deployment."""

    revision: str
    replicas: int
    #: Token of the options that change in place.
    settings: bytes = b""
    #: How many replicas an update may run beyond ``replicas``.
    surge: int = 1
    #: How many fewer than ``replicas`` may be ready during an update that has no room to surge.
    unavailable: int = 0
    #: A revision that served stands by: this one is given up though some of its replicas are ready.
    retreat: bool = False


class Seen(Struct, frozen=True, kw_only=True):
    """One replica, as observed. Those in an end state need not be listed."""

    id: str
    deployment: str
    revision: str
    state: State
    settings: bytes = b""
    #: Its worker is about to go: it serves until its replacement is ready.
    leaving: bool = False


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
    #: By deployment: when a start that failed is tried again.
    wake_at: dict[str, float]
    #: Deployments whose desired revision cannot be started.
    failed: frozenset[str]


def has_failed(attempts: Attempts | None, ready: int, retreat: bool = False) -> bool:
    """Tell whether a revision with so many ready replicas is given up."""
    if attempts is None or not attempts.final or attempts.failures < ATTEMPTS:
        return False
    return ready == 0 or retreat


def plan(
    desired: Mapping[str, Want],
    observed: Iterable[Seen],
    attempts: Mapping[tuple[str, str], Attempts],
    now: float,
    crowded: Collection[str] = (),
) -> Plan:
    """Return the next actions.

    Parameters
    ----------
    desired : mapping
        What is wanted, by deployment id. Replicas of other deployments are stopped.
    observed : iterable of Seen
        All replicas of the deployments in question, the oldest first.
    attempts : mapping
        Failed starts in a row by (deployment id, revision).
    now : float
        The time, on the clock of `Attempts.last`.
    crowded : collection of str
        Deployments whose new replicas find no place because their old ones hold it.
    """
    by_deployment: dict[str, list[Seen]] = {name: [] for name in desired}
    for replica in observed:
        by_deployment.setdefault(replica.deployment, []).append(replica)
    actions: list[Action] = []
    failed = set()
    wake_at = {}
    for name, replicas in by_deployment.items():
        want = desired.get(name)
        if want is None:
            actions += [Stop(r.id) for r in replicas if r.state in ("starting", "ready")]
            continue
        tried = attempts.get((name, want.revision))
        ready = sum(r.state == "ready" and r.revision == want.revision for r in replicas)
        if has_failed(tried, ready, want.retreat):
            # Nothing new can be started. What still serves, serves on; what tries to start is in vain.
            failed.add(name)
            actions += [Stop(r.id) for r in replicas if r.state == "starting"]
            continue
        todo, missing = _deployment(want, replicas, name in crowded)
        actions += todo
        if missing and tried is not None and tried.again_at > now:
            wake_at[name] = tried.again_at
        else:
            actions += [Start(name, want.revision)] * missing
    return Plan(actions, wake_at, frozenset(failed))


def _deployment(want: Want, replicas: list[Seen], crowded: bool) -> tuple[list[Action], int]:
    """Return what to do for one deployment, and how many replicas to start."""
    actions: list[Action] = []
    living = [r for r in replicas if r.state in ("starting", "ready")]
    current = [r for r in living if r.revision == want.revision and not r.leaving]
    ready = [r for r in current if r.state == "ready"]
    starting = [r for r in current if r.state == "starting"]
    # All others are to go. Only what is ready has a use still: one for each new replica that is not ready yet.
    old = [r for r in living if r.revision != want.revision or r.leaving]
    actions += [Stop(r.id) for r in old if r.state == "starting"]
    serving = sorted((r for r in old if r.state == "ready"), key=lambda r: not r.leaving)
    missing = want.replicas - len(current)

    stop = max(len(serving) - max(want.replicas - len(ready), 0), 0)
    if missing > 0 and (crowded or not want.surge):
        # No way up: down, then, as far as it is allowed. What drains already will make room.
        leaving_room = sum(r.state == "draining" for r in replicas) + stop
        spare = len(ready) + len(serving) - stop - max(want.replicas - want.unavailable, 0)
        stop += max(min(missing - leaving_room, spare, len(serving) - stop), 0)
    actions += [Stop(r.id) for r in serving[:stop]]
    serving = serving[stop:]

    if missing < 0:
        # Those that do not serve yet go first, then the youngest.
        surplus = (ready + starting)[missing:]
        actions += [Stop(r.id) for r in surplus]
        ready = [r for r in ready if r not in surplus]
    actions += [Reconfigure(r.id) for r in ready if r.settings != want.settings]
    # A worker that leaves does not wait until there is room.
    staying = sum(not r.leaving for r in serving)
    room = want.replicas + want.surge - staying - len(current) if staying else missing
    return actions, max(min(missing, room), 0)
