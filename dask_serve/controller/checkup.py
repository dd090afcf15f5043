"""What the controller tells `dask serve doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkup import facts, knock_all

if TYPE_CHECKING:
    from .plugin import Controller

__all__ = ["Checkup"]


class Checkup:
    """Answers what is to be known of the scheduler's process.

    Parameters
    ----------
    controller : Controller
        Of that process.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def serve_checkup(self) -> dict[str, Any]:
        """Return versions, the doors with what keeps this process from reaching them, and the state file."""
        controller = self._controller
        doors = {
            replica.door: replica.worker
            for deployment in controller.views.deployments().values()
            for replica in deployment.replicas
        }
        reached = await knock_all(doors)
        store = controller.editor.store
        return {
            "facts": facts(),
            "doors": [{"door": door, "worker": worker, "why": reached[door]} for door, worker in doors.items()],
            "state_file": "" if store is None else str(store.path),
            "for_crashes": controller.saves_for_crashes,
            "trouble": controller.editor.trouble,
        }
