"""User code of replicas in Dask's own profiles: the dashboard's page, ``client.profile()``.

Dask looks every few milliseconds at what the threads of its executor do. It is done with the same timer here, and at
the same distances, so that the times of both compare. Threads are looked at only while requests run; one that waits
for something to do is left out.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .unit import ReplicaUnit

__all__ = ["join_profile"]

#: Where a stack leaves user code for what called it. `distributed.profile` takes suffixes of file names.
_STOP: Any = tuple(
    f"dask_serve/replica/{name}.py"
    for name in ("user", "http", "conversation", "websocket", "streams", "batcher", "batch_streams", "construction")
)
#: Innermost functions of threads that wait: of the pool, of event loops in Python and in C.
_WAITING = {("replica/pool.py", "_work"), ("replica/user.py", "_run_until_stopped"), ("selectors.py", "select")}


def join_profile(worker: Any) -> None:
    """Let a worker's profile have what its replicas run. Nothing happens where profiles are switched off."""
    timer = worker.periodic_callbacks.get("profile")
    if timer is None or getattr(timer, "has_replicas", False):
        return
    dasks_own = timer.callback

    def look() -> None:
        dasks_own()
        sample(worker)

    timer.callback = look
    timer.has_replicas = True


def sample(worker: Any) -> None:
    """Look at what the threads of a worker's replicas do (on the worker's loop)."""
    from .process import ServeProcess

    busy = [unit for unit in ServeProcess.units_of(worker) if unit.core is not None and unit.core.admission.running]
    if not busy:
        return
    from distributed import profile

    frames = sys._current_frames()
    try:
        for unit in busy:
            key = unit.user.deployment
            for ident in _threads(unit):
                frame = frames.get(ident)
                if frame is not None and not _waits(frame):
                    profile.process(frame, None, worker.profile_recent, stop=_STOP)
                    profile.process(frame, None, worker.profile_keys[key], stop=_STOP)
    finally:
        # This one is among them. In a cycle they would keep what user code had, until the collector comes.
        frames.clear()
        frame = None


def _threads(unit: ReplicaUnit) -> list[int]:
    threads = (unit.user.thread, *unit.user.pool.threads)
    return [thread.ident for thread in threads if thread.ident is not None]


def _waits(frame: FrameType) -> bool:
    code = frame.f_code
    return any(code.co_name == name and code.co_filename.endswith(file) for file, name in _WAITING)
