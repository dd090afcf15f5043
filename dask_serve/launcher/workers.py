"""The host's worker processes: started early, restarted when they die, more of them when asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

from . import python_command

__all__ = ["Growth", "Workers", "restart_delay"]

#: A worker that lived this many seconds starts again at once when it dies.
STEADY_AFTER = 30.0
#: The longest wait in seconds before a worker that keeps dying is started again.
LONGEST_DELAY = 15.0


def restart_delay(failures: int) -> float:
    """Seconds to wait before the restart that follows ``failures`` early deaths in a row."""
    return 0.0 if failures <= 1 else min(0.25 * 2.0 ** (failures - 2), LONGEST_DELAY)


class Growth:
    """Decides how many workers to add for replicas that found no place.

    More workers of the same kind do not help a replica that asks for a GPU which none has. So one is tried, and the
    rest follow when that one made a difference.
    """

    def __init__(self) -> None:
        self._before = 0

    def more(self, unplaced: int) -> int:
        """Return how many workers to start, while ``unplaced`` replicas wait and all workers started so far are up."""
        before, self._before = self._before, unplaced
        if unplaced > before:
            return 1
        return unplaced if unplaced < before else 0


class Workers:
    """Keep a number of worker processes alive.

    Parameters
    ----------
    nthreads : int
        Threads of each worker.
    limit : int
        How many processes there may be at most.
    directory : str
        Where the workers keep their files; the host removes it in the end.
    report : callable
        Called with the fields of an event when a worker ends.
    """

    def __init__(self, *, nthreads: int, limit: int, directory: str, report: Callable[..., None]) -> None:
        self.nthreads = nthreads
        self.limit = limit
        self.directory = directory
        self._report = report
        self._address: str | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._lifelines: dict[int, int] = {}
        self._stop = asyncio.Event()

    def __len__(self) -> int:
        return len(self._keepers)

    def grow(self, wanted: int) -> None:
        """Start workers until there are ``wanted`` of them, or as many as are allowed."""
        while len(self._keepers) < min(wanted, self.limit) and not self._stop.is_set():
            self._keepers.append(asyncio.ensure_future(self._keep(len(self._keepers))))

    def connect(self, address: str) -> None:
        """Tell the waiting processes, and all later ones, where the scheduler listens."""
        self._address = address
        for slot in self._lifelines:
            self._tell(slot)

    def hold(self) -> None:
        """Start no worker any more."""
        self._stop.set()

    async def close(self, timeout: float) -> None:
        """Ask all workers to close, and kill those that did not within ``timeout`` seconds."""
        self.hold()
        self._signal("terminate")
        if not self._keepers:
            return
        _, late = await asyncio.wait(self._keepers, timeout=timeout)
        if late:
            self._signal("kill")
            await asyncio.wait(late)

    def _signal(self, name: str) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                getattr(process, name)()

    async def _keep(self, slot: int) -> None:
        clock = asyncio.get_running_loop().time
        failures = 0
        while not self._stop.is_set():
            began = clock()
            code = await self._run(slot)
            if self._stop.is_set():
                return
            self._report(event="worker-ended", worker=self._name(slot), code=code)
            failures = 1 if clock() - began > STEADY_AFTER else failures + 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), restart_delay(failures))

    async def _run(self, slot: int) -> int:
        """Run one worker process to its end and return its exit code."""
        theirs, ours = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *python_command("dask_serve.launcher.worker", str(theirs)), pass_fds=(theirs,)
            )
            self._processes[slot] = process
            self._lifelines[slot] = ours
            if self._stop.is_set():
                process.terminate()
            elif self._address is not None:
                self._tell(slot)
            return await process.wait()
        finally:
            self._processes.pop(slot, None)
            self._lifelines.pop(slot, None)
            os.close(theirs)
            os.close(ours)

    def _tell(self, slot: int) -> None:
        message: dict[str, Any] = {
            "directory": self.directory,
            "worker": {
                "scheduler_ip": self._address,
                "name": self._name(slot),
                "host": "127.0.0.1",
                "nthreads": self.nthreads,
                # Models are large, and a worker paused or killed at a share of the machine's memory serves nobody.
                "memory_limit": 0,
                "local_directory": tempfile.mkdtemp(prefix=f"{self._name(slot)}-", dir=self.directory),
                "dashboard": False,
            },
        }
        with contextlib.suppress(BrokenPipeError):
            os.write(self._lifelines[slot], json.dumps(message).encode() + b"\n")

    @staticmethod
    def _name(slot: int) -> str:
        return f"worker-{slot}"
