"""Whether the controller is there, as far as a proxy can tell."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

__all__ = ["AWAY_AFTER", "Presence"]

#: Seconds of silence after which the controller counts as away; it sends a sign of life every second.
AWAY_AFTER = 5.0


class Presence:
    """When the controller was last heard of, and how to tell it something."""

    __slots__ = ("_heard", "gone", "tell")

    def __init__(self) -> None:
        #: Sends a frame of the lifeline, which replaces earlier ones of its kind.
        self.tell: Callable[[bytes, bytes], None] = lambda kind, payload: None
        #: It will not come back: its end of the lifeline is closed.
        self.gone = False
        self._heard = monotonic()

    def heard(self) -> None:
        """It is there."""
        self._heard = monotonic()

    @property
    def away(self) -> str:
        """How long it has been silent, in words; empty while it is there."""
        if self.gone:
            return "the controller is gone"
        silent = monotonic() - self._heard
        return f"the controller is away: nothing was heard of it for {silent:.0f} s" if silent > AWAY_AFTER else ""
