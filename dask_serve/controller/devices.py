"""The devices (GPUs) of the workers: asked for when the first replica needs some."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

import cloudpickle

from ..exceptions import ServeError
from ..policy.devices import Device

if TYPE_CHECKING:
    from distributed import Client
    from distributed.scheduler import Scheduler

__all__ = ["WorkerDevices"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that a worker may take to look.
TIMEOUT = 60.0


def _probe() -> Callable[[], Coroutine[None, None, list[tuple[str, int]]]]:
    async def probe() -> list[tuple[str, int]]:
        import asyncio

        from dask_serve.replica.devices import detect_devices

        return await asyncio.get_running_loop().run_in_executor(None, detect_devices)

    return probe


class WorkerDevices:
    """Knows the devices of workers that have told them.

    Parameters
    ----------
    scheduler : Scheduler
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        #: By worker: names and ordinals, as `dask_serve.replica.devices.detect_devices` returns them.
        self._known: dict[str, list[tuple[str, int]]] = {}
        self._asked: set[str] = set()

    def of(self, worker: str, host: str, taken: Mapping[tuple[str, str], float]) -> list[Device] | None:
        """Return a worker's devices, or None where they are not known yet.

        Parameters
        ----------
        taken : mapping
            Shares that replicas have, by host and device.
        """
        known = self._known.get(worker)
        if known is None:
            return None
        return [Device(name, ordinal, 1.0 - taken.get((host, name), 0.0)) for name, ordinal in known]

    @property
    def known(self) -> bool:
        """Some workers have told theirs."""
        return bool(self._known)

    def forget(self, worker: str) -> None:
        """A worker is gone."""
        self._known.pop(worker, None)

    def unasked(self) -> list[str]:
        """Return the workers to `ask`; each is returned once."""
        new = [worker for worker in self._scheduler.workers if worker not in self._known and worker not in self._asked]
        self._asked.update(new)
        return new

    @property
    def being_asked(self) -> bool:
        """Some workers have not answered yet."""
        return bool(self._asked)

    async def ask(self, client: Client, worker: str, missing: Callable[..., Coroutine[Any, Any, str]]) -> None:
        """Ask one worker.

        Parameters
        ----------
        missing : coroutine function
            Tells why a worker cannot hold replicas, if it cannot.
        """
        try:
            devices = await self._ask(client, worker, missing)
        except (OSError, asyncio.TimeoutError, ServeError) as error:
            logger.warning("no GPUs are known on worker %s: %s", worker, error or type(error).__name__)
            devices = []
        finally:
            self._asked.discard(worker)
        if worker in self._scheduler.workers:
            self._known[worker] = devices

    async def _ask(
        self, client: Client, worker: str, missing: Callable[..., Coroutine[Any, Any, str]]
    ) -> list[tuple[str, int]]:
        why_not = await missing(client, worker)
        if why_not:
            raise ServeError(why_not)
        call = client.rpc(worker).run(function=cloudpickle.dumps(_probe()), wait=True)
        answer = await asyncio.wait_for(call, TIMEOUT)
        if answer["status"] != "OK":
            raise ServeError(answer.get("text", answer["status"]))
        return [(str(name), int(ordinal)) for name, ordinal in answer["result"]]
