"""Whether a replica is well: the user's ``check_health``, and whether what it runs goes on. Runs on the door's loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from ..policy.progress import Progress, Sample, Verdict
from .hooks import Check

if TYPE_CHECKING:
    from ..config import DeploymentOptions
    from .core import ReplicaCore
    from .door import Door
    from .user import UserCode

__all__ = ["FAILURES", "Health"]

logger = logging.getLogger("dask_serve.replica")

#: Failures in a row after which a replica is unhealthy.
FAILURES = 3
#: Seconds without progress after which the status tells.
NOTICE = 10.0
#: Seconds between two looks whether there is progress.
LOOK = 2.5


class Health:
    """Watches one replica from its first request to its end.

    Parameters
    ----------
    user : UserCode
    core : ReplicaCore
    door : Door
    options : callable
        Returns the present options.
    report : coroutine function
        Tells the controller an event with its message: ``unhealthy``, once, or ``health`` for what is worth knowing.
    """

    def __init__(
        self,
        user: UserCode,
        core: ReplicaCore,
        door: Door,
        options: Callable[[], DeploymentOptions],
        report: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._user = user
        self._core = core
        self._door = door
        self._options = options
        self._report = report
        self._progress = Progress()
        self._told: tuple[str, bool] | None = None
        self._asked: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin (on the door's loop)."""
        check = Check(self._user)
        kinds = [self._watch_progress()]
        if check.exists:
            kinds.append(self._ask_again_and_again(check))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(coroutine) for coroutine in kinds]

    def stop(self) -> None:
        """End (on the door's loop)."""
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------ what the user's code says

    async def _ask_again_and_again(self, check: Check) -> None:
        failures = 0
        while not self._core.draining:
            await asyncio.sleep(self._options().health_check_period_s)
            problem = await check.ask(self._options().health_check_timeout_s)
            if problem is None:
                failures = 0
                continue
            failures += 1
            logger.warning("Replica %s is not well, %d of %d times: %s", self._core.id, failures, FAILURES, problem)
            if failures >= FAILURES:
                await self._give_up(f"{problem}, {failures} times in a row")
                return

    async def _give_up(self, reason: str) -> None:
        if not self._core.draining:
            await self._report("unhealthy", reason)

    # ------------------------------------------------------------------ whether it gets on

    async def _watch_progress(self) -> None:
        while not self._core.draining:
            limit = self._options().stuck_timeout_s
            await asyncio.sleep(LOOK if limit is None else min(LOOK, limit / 4))
            self._user.look_for_libraries()
            verdict = self._progress.look(self._sample(), NOTICE if limit is None else min(NOTICE, limit))
            await self._tell(verdict)
            if verdict is not None and limit is not None and time.monotonic() - verdict.since >= limit:
                what = "its event loop was blocked" if verdict.part == "loop" else "all its threads were taken"
                await self._give_up(f"{what} for {limit:g} s (stuck_timeout_s); {self._where(verdict)}")
                return

    def _sample(self) -> Sample:
        now = time.monotonic()
        pool = self._user.pool
        waiting = pool.is_awaited
        asked = self._asked
        if asked is None and self._core.admission.running:
            self._asked = now
            # It may be about to end.
            with contextlib.suppress(RuntimeError):
                self._user.loop.call_soon_threadsafe(self._on_sign)
        activity = 0
        loop_cpu = pool_cpu = 0.0
        if waiting or asked is not None:
            activity = pool.begun
            for execution in self._executions():
                if execution.outflow is not None and execution.blocking:
                    activity += execution.outflow.progress
                    # What has to wait for its client is not to blame.
                    waiting = waiting and not execution.outflow.full
            used = _cpu_seconds()
            loop_cpu = used.get(self._user.thread.native_id or 0, 0.0)
            pool_cpu = sum(used.get(thread.native_id or 0, 0.0) for thread in pool.threads)
        return Sample(
            at=now, activity=activity, waiting=waiting, loop_asked=asked, loop_cpu=loop_cpu, pool_cpu=pool_cpu
        )

    def _on_sign(self) -> None:
        # On the user loop, where it tells that the loop runs.
        self._asked = None

    def _executions(self) -> list[Any]:
        return [
            execution
            for connection in self._door.connections
            for execution in connection.executions.values()
            if execution.core is self._core
        ]

    async def _tell(self, verdict: Verdict | None) -> None:
        told = None if verdict is None else (verdict.part, verdict.computes)
        if told == self._told:
            return
        self._told = told
        if verdict is None:
            await self._report("health", "")
            return
        ago = time.monotonic() - verdict.since
        since = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() - ago))
        state = "busy" if verdict.computes else "stuck"
        what = "its event loop is blocked" if verdict.part == "loop" else "all its threads are taken and requests wait"
        message = f"{state} since {since}: {what}; {self._where(verdict)}"
        logger.warning("Replica %s is %s\n%s", self._core.id, message, self._stacks(verdict))
        await self._report("health", message)

    def _where(self, verdict: Verdict) -> str:
        places = sorted({_place(frame) for frame in self._frames(verdict)})
        doing = "computes in" if verdict.computes else "waits in"
        return f"{doing} {' and '.join(places[:3])}" if places else "what held it has just ended"

    def _stacks(self, verdict: Verdict) -> str:
        return "\n".join("".join(traceback.format_stack(frame)) for frame in self._frames(verdict))

    def _frames(self, verdict: Verdict) -> list[FrameType]:
        threads = [self._user.thread] if verdict.part == "loop" else self._user.pool.threads
        frames = sys._current_frames()
        try:
            return [frames[thread.ident] for thread in threads if thread.ident in frames]
        finally:
            # This one is among them: a cycle, which would keep what user code has.
            frames.clear()


def _cpu_seconds() -> dict[int, float]:
    """Return the CPU seconds of the threads of this process by their native id."""
    try:
        return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    except psutil.Error:
        # Not to be had: whatever runs long counts as stuck.
        return {}


def _place(frame: FrameType) -> str:
    """Say where a thread is: the user's function, and where that is by now."""
    stack = traceback.extract_stack(frame)
    depth = max((number for number, entry in enumerate(stack) if _is_ours(entry.filename)), default=-1)
    theirs = [entry for entry in stack[depth + 1 :] if _ASYNCIO not in entry.filename] or stack[-1:]
    first, last = theirs[0], theirs[-1]
    text = f"{first.name} ({first.filename}:{first.lineno})"
    return text if last is first else f"{text}, in {last.name} ({last.filename}:{last.lineno})"


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE)


_PACKAGE = __file__.rpartition("replica")[0]
_ASYNCIO = f"{os.sep}asyncio{os.sep}"
