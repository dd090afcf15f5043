"""How many replicas a deployment should have, from its load and the time.

Pure: what is remembered from one decision to the next is a `Scale`, the time is an argument. A need for more (or fewer)
replicas has to last for a delay; what is done then is the least (or most) that was needed all the while, so that a
short change of load moves nothing. Constant load leads to one number, which is kept.
"""

from __future__ import annotations

from math import ceil, floor, isfinite
from typing import Any, Literal

from msgspec import Struct

from ..config import AutoscalingConfig
from ..exceptions import ConfigError

__all__ = [
    "SEEN",
    "SETTLED",
    "STEP",
    "Decision",
    "Load",
    "Scale",
    "ScalingContext",
    "Wish",
    "decide",
    "explain",
    "wish_of",
]

#: Between two steps up of an ``upscaling_factor`` below 1, and likewise down, pass at least this many seconds.
STEP = 1.0
#: What processes tell of their load is about right within a second, and roughly at once (`dask_serve.policy.load`); a
#: request that has just gone from one to the other may count in both. So the need for a few more replicas has to last
#: for `SETTLED` seconds, and that for many (more than `FEW` of those there are) for `SEEN`.
SETTLED = 1.2
SEEN = 0.25
FEW = 0.5
#: A load that exceeds what the replicas should have by less than this share of it asks for no more of them.
TOLERANCE = 0.05


class Load(Struct, frozen=True):
    """The requests of a deployment.

    Parameters
    ----------
    running : float
        At its ready replicas.
    queued : float
        At routers, waiting for one.
    """

    running: float = 0.0
    queued: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.running + self.queued


class Wish(Struct, frozen=True):
    """What a policy of the user's asks for, and why."""

    replicas: float
    why: str = ""


class Scale(Struct, frozen=True, kw_only=True):
    """What is remembered between two decisions."""

    #: How many replicas there should be.
    target: int
    #: More (1) or fewer (-1) are needed than that, or neither (0).
    side: Literal[-1, 0, 1] = 0
    #: Since when.
    since: float = 0.0
    #: The least (or most) that was needed since then.
    level: int = 0
    #: When the target was last changed.
    changed: float = float("-inf")


class Decision(Struct, frozen=True, kw_only=True):
    """The outcome."""

    scale: Scale
    #: How many replicas are needed at this moment, within the bounds.
    needed: int
    #: When to decide again if nothing happens before.
    wake_at: float | None = None


class ScalingContext(Struct, frozen=True, kw_only=True):
    """What a policy of the user's is called with."""

    #: Names of the application and the deployment.
    app: str
    deployment: str
    config: AutoscalingConfig
    #: How many replicas there should be, by the last decision, and how many are ready.
    target: int
    ready: int
    #: Requests that run and that wait.
    running: float
    queued: float
    #: Seconds on a clock that never goes back.
    now: float


def decide(config: AutoscalingConfig, scale: Scale, load: Load, now: float, wish: Wish | None = None) -> Decision:
    """Return the next state of a deployment.

    Parameters
    ----------
    config : AutoscalingConfig
        Its options.
    scale : Scale
        What the last decision left.
    load : Load
        Its load.
    now : float
        The time, on the clock of the other times.
    wish : Wish, optional
        What a policy of the user's asks for, in place of what the load needs.
    """
    needed = _needed(config, scale.target, load, wish)
    within = config.clip(scale.target)
    if within != scale.target:
        # The bounds have changed.
        scale = Scale(target=within, changed=now)
    if needed == scale.target:
        if scale.side:
            scale = Scale(target=scale.target, changed=scale.changed)
        return Decision(scale=scale, needed=needed)
    side: Literal[-1, 1] = 1 if needed > scale.target else -1
    if side == scale.side:
        level = min(scale.level, needed) if side > 0 else max(scale.level, needed)
        since = scale.since
    else:
        level, since = needed, now
    scale = Scale(target=scale.target, side=side, since=since, level=level, changed=scale.changed)
    goal, wake_at = _up(config, scale, now, wish) if side > 0 else _down(config, scale, now)
    if goal == scale.target:
        return Decision(scale=scale, needed=needed, wake_at=wake_at)
    if side < 0 and level == 0 and goal:
        # The time without requests counts on.
        scale = Scale(target=goal, side=-1, since=since, level=0, changed=now)
    else:
        scale = Scale(target=goal, changed=now)
    return Decision(scale=scale, needed=needed, wake_at=now if needed != goal else None)


def _needed(config: AutoscalingConfig, target: int, load: Load, wish: Wish | None) -> int:
    """Return how many replicas are needed, within the bounds."""
    if wish is not None:
        needed = ceil(wish.replicas - 1e-9)
    else:
        each = config.target_ongoing_requests
        needed = ceil(load.total / each - 1e-9)
        if needed > target > 0 and load.total <= target * each * (1 + TOLERANCE):
            needed = target
    if load.total > 0:
        # Whatever a policy says: who has asked is answered.
        needed = max(needed, 1)
    return config.clip(needed)


def _up(config: AutoscalingConfig, scale: Scale, now: float, wish: Wish | None) -> tuple[int, float | None]:
    """Return the next target, or the present one and when that may change."""
    delay = config.upscale_delay_s
    if wish is None:
        delay = max(delay, SETTLED if scale.level - scale.target <= max(1.0, FEW * scale.target) else SEEN)
    due = scale.since if scale.target == 0 else scale.since + delay
    if config.upscaling_factor < 1:
        due = max(due, scale.changed + STEP)
    if now < due:
        return scale.target, due
    more = ceil(config.upscaling_factor * (scale.level - scale.target) - 1e-9)
    return min(scale.target + max(more, 1), config.max_replicas), None


def _down(config: AutoscalingConfig, scale: Scale, now: float) -> tuple[int, float | None]:
    """Return the next target, or the present one and when that may change."""
    zero_delay = config.downscale_to_zero_delay_s
    zero_at = scale.since + (config.downscale_delay_s if zero_delay is None else zero_delay)
    if scale.level == 0 and now >= zero_at:
        return 0, None
    aim = max(scale.level, 1)
    if aim == scale.target:
        return scale.target, zero_at
    due = scale.since + config.downscale_delay_s
    if scale.changed > scale.since:
        # A step was made on the way to zero already.
        due = scale.changed + max(config.downscale_delay_s, STEP)
    elif config.downscaling_factor < 1:
        due = max(due, scale.changed + STEP)
    if now < due:
        return scale.target, due if scale.level else min(due, zero_at)
    fewer = floor(config.downscaling_factor * (scale.target - aim) + 1e-9)
    return scale.target - max(fewer, 1), None


def explain(config: AutoscalingConfig, load: Load, needed: int, wish: Wish | None = None) -> str:
    """Say in words why so many replicas are needed."""
    if wish is not None:
        said = f": {wish.why}" if wish.why else ""
        text = f"the policy asks for {wish.replicas:g}{said}"
        unbounded = ceil(wish.replicas - 1e-9)
    else:
        each = config.target_ongoing_requests
        unbounded = ceil(load.total / each - 1e-9)
        text = f"{load.running:.3g} requests run and {load.queued:.3g} wait; {each:g} to each replica makes {unbounded}"
    if needed > unbounded and needed == config.min_replicas:
        text += f", but min_replicas={needed}"
    elif needed < unbounded and needed == config.max_replicas:
        text += f", but max_replicas={needed}"
    return text


def wish_of(answer: Any, policy: str) -> Wish:
    """Return what a policy's answer means.

    Raises
    ------
    ConfigError
        It is neither a number nor a number and a reason.
    """
    number, why = answer if isinstance(answer, (tuple, list)) and len(answer) == 2 else (answer, "")
    if isinstance(number, (int, float)) and not isinstance(number, bool) and isfinite(number) and isinstance(why, str):
        return Wish(float(number), why)
    raise ConfigError(
        f"the autoscaling policy {policy} returned {answer!r}: it must return a number of replicas, or such a number "
        "and a text that says why"
    )
