"""What the dashboard asks of the controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..controller.events import Event
    from ..controller.status import ServeStatus

__all__ = ["Source"]


class Source(Protocol):
    """The controller as the dashboard sees it. None of it waits for anything."""

    @property
    def ended(self) -> str:
        """Why there is no controller any more; empty while there is one."""

    def status(self) -> ServeStatus:
        """Return what runs, what workers told with their last heartbeats included."""

    def names(self) -> Mapping[str, str]:
        """Return the names of all workers by address."""

    def heartbeats(self) -> Iterable[tuple[str, float, Mapping[str, Any]]]:
        """Return a name of each worker's process, how many seconds ago it told, and its counts by deployment."""

    def events(self) -> list[Event]:
        """Return the decisions that are remembered, the oldest first."""

    def line_of(self, kind: str) -> str:
        """Return to which line of the time line a kind of decision belongs."""
