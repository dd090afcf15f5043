"""The last errors of user code, by deployment, as the replicas tell them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .status import ErrorStatus

if TYPE_CHECKING:
    from .registry import Registry

__all__ = ["Errors"]

#: How many are kept of each deployment.
KEPT = 5


class Errors:
    """What user code raised lately."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._errors: dict[str, deque[ErrorStatus]] = {}

    def add(self, replica: str, time: float, request_id: str, text: str, count: int, **_: object) -> None:
        """Take the report of a replica, which may be of a later version."""
        applications = self._registry.applications
        # Those of applications that are no more go with the next one.
        self._errors = {id: kept for id, kept in self._errors.items() if id.partition("/")[0] in applications}
        deployment = replica.rpartition("/")[0]
        if deployment.partition("/")[0] in applications:
            error = ErrorStatus(time=time, replica=replica, request_id=request_id, traceback=text, count=count)
            self._errors.setdefault(deployment, deque(maxlen=KEPT)).append(error)

    def of(self, deployment: str) -> list[ErrorStatus]:
        """Return those of a deployment, the oldest first."""
        return list(self._errors.get(deployment, ()))
