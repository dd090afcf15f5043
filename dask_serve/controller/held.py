"""Dask keys that the controller holds: the data that bound arguments refer to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["HeldKeys"]

#: The name under which they are held.
HOLDER = "dask-serve"


class HeldKeys:
    """The keys that are held at present."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held: set[str] = set()

    def forget(self) -> None:
        """Dask has forgotten all tasks."""
        self._held.clear()

    def hold(self, wanted: set[str]) -> bool:
        """Hold these keys and no others; return whether some of them are not known yet."""
        gone = self._held - wanted
        if gone:
            self._held -= gone
            self._scheduler.client_releases_keys(list(gone), client=HOLDER)
        # A key may come later than the application: it travels on another connection.
        known = {key for key in wanted - self._held if key in self._scheduler.tasks}
        if known:
            self._held |= known
            self._scheduler.client_desires_keys(known, client=HOLDER)
        return bool(wanted - self._held)
