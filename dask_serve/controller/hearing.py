"""Operations by which replicas, workers, proxies and sessions tell the controller how they are."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigError
from .operations import operation

if TYPE_CHECKING:
    from .plugin import Controller

__all__ = ["Hearing"]

logger = logging.getLogger("dask_serve.controller")


class Hearing:
    """Hears what others report; its operations are handlers of the scheduler.

    Parameters
    ----------
    controller : Controller
        Who is to know.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def serve_report(self, replica: str, event: str, **info: Any) -> dict[str, Any]:
        """Hear from a replica."""
        known = self._controller.registry.replicas.get(replica)
        if known is None:
            logger.debug("replica %s, which is not known (any more), reports %s", replica, event)
        elif event == "ready":
            self._controller.tunnels.learn(info["process"], info["door"], known.worker)
            self._controller.reconciler.reported_ready(known, info["door"], info["process"])
        elif event == "failed":
            self._controller.reconciler.reported_failed(known, info["error"])
        elif event == "unhealthy":
            self._controller.reconciler.reported_unhealthy(known, info["message"])
        elif event == "health":
            self._controller.reconciler.reported_health(known, info["message"])
        elif event == "draining":
            self._controller.reconciler.reported_draining(known)
        elif event == "stopped":
            self._controller.reconciler.ended(known)
        else:
            logger.warning("replica %s reports %r, which this version does not know", replica, event)
        return {}

    async def serve_backlogs(
        self, source: str, number: int, queued: dict[str, float], owner: str = ""
    ) -> dict[str, Any]:
        """Hear how many requests wait at a process's routers."""
        self._controller.scaling.waits(source, number, queued, owner)
        return {}

    async def serve_counts(
        self, source: str, counts: dict[str, Any], worker: str = "", epoch: str = "", ended: bool = False
    ) -> dict[str, Any]:
        """Hear what a worker that leaves, or a proxy elsewhere, has counted; the answer has this controller's epoch.

        What a proxy counted is taken only from those who know that epoch: the rest was told to the controller before.
        """
        if worker:
            self._controller.measures.worker_told(source, counts)
        elif epoch == self._controller.epoch:
            self._controller.measures.proxy_told(source, counts)
            if ended:
                self._controller.measures.proxy_ended(source)
        return {"epoch": self._controller.epoch}

    def on_load(self, running: dict[str, float], worker: str, **_: Any) -> None:
        """Hear how many requests run at a worker's replicas."""
        self._controller.scaling.runs(worker, running)

    async def serve_error(self, **report: Any) -> None:
        """Hear what user code raised."""
        self._controller.errors.add(**report)

    async def serve_leaving(self, worker: str, patience: float) -> dict[str, Any]:
        """Hear that a worker is closing; answer when its replicas have replacements, or after ``patience`` seconds."""
        await self._controller.leaving.replace([worker], patience, no_place=0.2)
        return {}

    @operation
    async def serve_drain(self, worker: str, stay: bool = False) -> dict[str, Any]:
        """Bring a worker, by address or name, to hold no replicas, and keep it so; ``stay`` takes it back."""
        there = self._controller.scheduler.workers
        address = next((one for one, state in there.items() if worker in (one, str(state.name))), None)
        if address is None:
            known = ", ".join(sorted(self._controller.scheduler.workers)) or "none"
            raise ConfigError(f"there is no worker {worker!r}; workers: {known}")
        if stay:
            self._controller.leaving.stay([address])
            return {"worker": address, "left": []}
        return {"worker": address, "left": [replica.id for replica in await self._controller.leaving.empty([address])]}
