"""Calls of maps over data: nobody waits for a single one of them at a screen."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import ClassVar

from ..wire.frames import Buffer
from ..wire.messages import Reply
from .state import RefState

__all__ = ["PatientState"]


class PatientState(RefState):
    """Waits for as long as it takes, and notes how long it took once it was sent.

    Attributes
    ----------
    seconds : float
        From the moment it was sent until its answer came; 0.0 before.
    quiet : bool
        Its replica had no online requests lately.
    """

    patient: ClassVar[bool] = True

    __slots__ = ("quiet", "seconds")

    def __init__(self, method: str, parts: Sequence[Buffer], request_id: str) -> None:
        super().__init__(method, parts, request_id)
        self.seconds = 0.0
        self.quiet = False

    def on_result(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        if self.sent:
            self.seconds = monotonic() - self.sent
            self.quiet = reply.quiet
        super().on_result(reply, parts)
