"""Does what the plan says: starts, drains and reconfigures replicas, and hears what became of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec
from dask.utils import format_bytes
from distributed import Client

from ..exceptions import ServeError
from ..policy.lifecycle import ENDS
from ..policy.reconcile import Action, Reconfigure, Start, Stop, plan
from .actors import QUEUED_AFTER, Actors, explain, replica_class
from .balance import Balance
from .events import brief
from .held import HeldKeys
from .notes import Notes
from .places import Places, need_of
from .registry import Registry
from .replica import Replica, settings_of
from .workers import WorkerViews, what_is_missing

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Reconciler"]

logger = logging.getLogger("dask_serve.controller")

#: How often to look again at what raises no event: paused workers, busy task threads, keys under way.
RECHECK = 1.0
#: Seconds that one round may hold the scheduler's loop before it lets others run.
SLICE = 0.004
#: How many deployments are planned in one round.
BATCH = 25
#: Seconds beyond the graceful time before a replica that does not answer is dropped.
DRAIN_GRACE = 2.0


class Reconciler:
    """Brings the observed state to the desired one, in one task.

    Parameters
    ----------
    scheduler : Scheduler
        The scheduler this runs in.
    registry : Registry
        What is desired and observed.
    on_change : callable
        Called after each change of the registry.
    notes : Notes
        Told of each decision.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, on_change: Callable[[], None], notes: Notes) -> None:
        self.scheduler = scheduler
        self.notes = notes
        self.registry = registry
        self.workers = WorkerViews(scheduler, registry)
        self.actors = Actors(scheduler)
        self.places = Places(registry, self.workers, self._spawn, self.wake)
        self.balance = Balance(registry, self.workers, lambda replica: need_of(replica.spec, only_free_threads=True))
        self._on_change = on_change
        self._client: Client | None = None
        self._wake = asyncio.Event()
        #: Deployments to be planned anew, and when to look again at those where something waits.
        self._unplanned = registry.follow()
        self._again: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._keys = HeldKeys(scheduler)

    # -- life

    async def run(self, client: Client) -> None:
        """Reconcile until cancelled; ``client`` owns the actors."""
        self._client = self.actors.client = self.places.client = client
        # A tenth of a second that the scheduler's loop would miss with the first replica.
        await asyncio.get_running_loop().run_in_executor(None, replica_class)
        while True:
            self._wake.clear()
            try:
                wake_at = self._step(time.monotonic())
            except Exception:
                logger.exception("reconciling failed; trying again in %s s", RECHECK)
                wake_at = time.monotonic() + RECHECK
            timeout = None if wake_at is None else wake_at - time.monotonic()
            if timeout is not None and timeout <= 0:
                await asyncio.sleep(0)
                continue
            # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with what it waits for.
            loop = asyncio.get_running_loop()
            timer = None if timeout is None else loop.call_later(timeout, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def wake(self) -> None:
        """Publish what changed and look for what is to be done."""
        self.registry.tidy(self._unplanned)
        self._on_change()
        self._wake.set()

    async def close(self) -> None:
        """End all tasks; replicas go when Dask lets go of them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- events

    def reported_ready(self, replica: Replica, door: str, process: str) -> None:
        """A replica answers from now on."""
        if replica.state in ENDS:
            return
        replica.door, replica.process, replica.message = door, process, ""
        # Dask's own word that the actor stands may come later than its report.
        replica.submitted = True
        if replica.move("ready") == "ready":
            self.registry.attempts.pop((replica.deployment, replica.spec.revision), None)
            self.balance.due = True
        self.wake()

    def reported_failed(self, replica: Replica, error: str) -> None:
        """A replica could not be started, or gave up."""
        if replica.state in ENDS:
            return
        if replica.move("failed") == "failed":
            message = f"replica {replica.id} on worker {replica.worker} failed:\n{error.rstrip()}"
            # The worker's log has the traceback already.
            logger.warning("replica %s on %s failed: %s", replica.id, replica.worker, error.strip().splitlines()[-1:])
            self.registry.count_failure(replica, message, time.monotonic())
            self.notes.failed(replica, error)
            self.workers.note_failure(replica)
            self._release(replica)
        self.wake()

    def reported_unhealthy(self, replica: Replica, reason: str) -> None:
        """A replica is not well: it finishes what it runs, and another takes its place."""
        if replica.state == "ready":
            message = f"replica {replica.id} on worker {replica.worker} was unhealthy: {reason}"
            logger.warning("%s; it is replaced", message)
            self.notes.add("unhealthy", replica.deployment, f"{brief(message)}; it is replaced")
            self.registry.count_setback(replica, message, time.monotonic())
            self.workers.note_failure(replica)
            self.stop(replica)
            replica.message = f"unhealthy: {reason}"
        self.wake()

    def reported_health(self, replica: Replica, message: str) -> None:
        """A replica is busy or stuck, or no longer."""
        if replica.state == "ready":
            replica.message = message
        self.wake()

    def killed_for_memory(self, worker: str, used: int) -> None:
        """A worker is about to be killed, because it uses too much memory."""
        state = self.scheduler.workers.get(worker)
        limit = f" of {format_bytes(state.memory_limit)}" if state is not None and state.memory_limit else ""
        self.workers.doom(worker)
        for replica in self.registry.on_worker(worker):
            if replica.state not in ENDS:
                message = (
                    f"replica {replica.id} is out_of_memory: its worker {worker} was killed when it used "
                    f"{format_bytes(used)}{limit}"
                )
                logger.warning("%s", message)
                self.notes.add("out_of_memory", replica.deployment, f"{message}; it is replaced")
                if replica.move("out_of_memory") == "out_of_memory":
                    self.registry.count_setback(replica, message, time.monotonic())
                self._release(replica)
        self.wake()

    def reported_draining(self, replica: Replica) -> None:
        """A replica stops, of itself when nobody asked: then its worker is about to go."""
        if replica.state in ("starting", "ready"):
            self.workers.doom(replica.worker)
            replica.message = "its worker is closing"
            why = f"replica {replica.id} drains: its worker {replica.worker} closes"
            self.notes.add("stopped", replica.deployment, why)
            replica.move("drain")
        self.wake()

    def ended(self, replica: Replica) -> None:
        """A replica is no more."""
        if replica.state not in ENDS:
            replica.move("stopped")
            self._release(replica)
        self.wake()

    def lost_worker(self, worker: str) -> None:
        """A worker is gone, and its replicas with it."""
        self.workers.forget(worker)
        self.registry.leaving.discard(worker)
        self.registry.silent.discard(worker)
        self.lose(self.registry.on_worker(worker))

    def restarted(self) -> None:
        """Dask has forgotten all tasks and is about to restart all workers."""
        for worker in self.scheduler.workers:
            self.workers.doom(worker)
        self._keys.forget()
        self.lose(list(self.registry.replicas.values()))

    def joined_worker(self, worker: str) -> None:
        """There is a worker that may hold replicas, or will in a moment."""
        self.workers.joined(worker)
        self.workers.environments.came_back()
        self.balance.due = True
        self.registry.touch(*self.registry.unplaced)
        self.wake()

    def lose(self, replicas: list[Replica], why: str = "lost with worker") -> None:
        """Some replicas are no more, or no more to be reckoned with."""
        living = [replica for replica in replicas if replica.state not in ENDS]
        self.notes.lost(living, why)
        for replica in living:
            logger.warning("replica %s is %s %s", replica.id, why, replica.worker)
            replica.move("lost")
            self._release(replica)
        self.wake()

    # -- one round

    def _step(self, now: float) -> float | None:
        registry = self.registry
        balance_at = self.balance.look(now)
        due = self._unplanned | {id for id, at in self._again.items() if at <= now}
        due = set(islice(due, BATCH))
        registry.tidy(due)
        self._unplanned -= due
        late = self._keys.hold(self.registry.keys())
        todo = plan(registry.wanted(due), registry.seen(due), registry.tries(), now, registry.crowded)
        for id in due:
            self._again.pop(id, None)
            self.places.forget(id)
        self._again.update(todo.wake_at)
        self._note_failed(due, todo.failed)
        before = {id: registry.unplaced.pop(id, None) for id in due}
        crowded = registry.crowded & due
        registry.crowded -= due
        done = self._do_all(todo.actions)
        for id, what in before.items():
            if what != registry.unplaced.get(id) or (id in crowded) != (id in registry.crowded):
                registry.touch(id)
            self.notes.placed(id, what)
            if id in registry.unplaced:
                self._again[id] = now + RECHECK
        pending = [r for r in registry.replicas.values() if r.state == "starting" and not r.submitted]
        for replica in pending:
            replica.message = replica.preparing or self.actors.waits_for(replica, now)
        if done and not self._unplanned & registry.unplaced.keys():
            self.workers.tried()
        self._on_change()
        if self._unplanned or not done:
            # What was done, or is still to be done, may have opened or closed a way.
            self._unplanned |= set() if done else due
            return now
        wakes = list(self._again.values())
        if balance_at is not None:
            wakes.append(balance_at)
        if pending:
            wakes.append(now + QUEUED_AFTER)
        if late:
            wakes.append(now + RECHECK)
        return min(wakes, default=None)

    def _note_failed(self, due: set[str], failed: frozenset[str]) -> None:
        registry = self.registry
        before, registry.failed = registry.failed, registry.failed - due | failed
        registry.touch(*(before ^ registry.failed))
        for id in failed:
            # One that failed may have taken the others of its application back with it.
            if id in registry.failed and registry.take_back(id):
                logger.warning("the update of deployment %s failed and is taken back", id)

    def _do_all(self, actions: list[Action]) -> bool:
        """Do what was planned; return whether there was time for all of it."""
        began = time.monotonic()
        stopped: Counter[str] = Counter()
        placed = len(self.registry.replicas)
        done = True
        # The large ones first: the small ones fit into what they leave.
        for number, action in enumerate(sorted(actions, key=self._threads, reverse=True)):
            if number and time.monotonic() - began > SLICE:
                done = False
                break
            if isinstance(action, Stop):
                stopped[self.registry.replicas[action.replica].deployment] += 1
            self._do(action, began)
        # All that was started is at the end; one that failed at once is told of elsewhere.
        started = Counter(r.deployment for r in islice(self.registry.replicas.values(), placed, None))
        self.notes.done(started, stopped)
        return done

    def _threads(self, action: Action) -> int:
        found = self.registry.desired(action.deployment) if isinstance(action, Start) else None
        return 0 if found is None else found[1].options.threads

    def _do(self, action: Action, now: float) -> None:
        if isinstance(action, Start):
            self._start(action, now)
        elif isinstance(action, Stop):
            self.stop(self.registry.replicas[action.replica])
        elif isinstance(action, Reconfigure):
            self._reconfigure(self.registry.replicas[action.replica])

    def _start(self, action: Start, now: float) -> None:
        replica = self.places.find(action, now)
        if replica is None:
            return
        self.registry.add(replica)
        environments = self.workers.environments
        environments.claim(replica)
        if replica.worker in self.workers.equipped and not environments.needs_preparation(replica):
            self._submit(replica)
        else:
            self._spawn(self._ask_and_submit(replica))

    async def _ask_and_submit(self, replica: Replica) -> None:
        assert self._client is not None
        environments, missing = self.workers.environments, ""
        try:
            if replica.worker not in self.workers.equipped:
                missing = await what_is_missing(self._client, replica.worker, environments.learn)
            if not missing and replica.state == "starting" and environments.needs_preparation(replica):
                replica.preparing = f"its environment is being prepared on worker {replica.worker}"
                self.wake()
                missing = await environments.prepare(self._client, replica)
        except (OSError, asyncio.TimeoutError) as error:
            missing = f"worker {replica.worker} does not answer: {error!r}"
        replica.preparing = ""
        if replica.state != "starting":
            return
        if replica.worker not in self.scheduler.workers:
            self.lose([replica])
        elif missing:
            self.reported_failed(replica, missing)
        elif not environments.fits(replica):
            self.lose([replica], "finds another environment than it needs on")
        else:
            self.workers.equipped.add(replica.worker)
            self._submit(replica)

    def _submit(self, replica: Replica) -> None:
        self.actors.submit(replica)
        self._spawn(self._watch(replica))

    async def _watch(self, replica: Replica) -> None:
        """Wait until Dask made the actor; what user code does then is told by `serve_report`."""
        future = replica.future
        # Not `distributed.wait`, which looks for the default client: in the scheduler's process there is none.
        await future._state.wait()
        if replica.future is not future or replica.state in ENDS:
            return
        if future.status == "finished":
            replica.submitted = replica.held = True
            self.workers.bookings.take(replica.worker, replica.booked)
            if replica.state == "starting":
                replica.message = "its constructor runs"
            self.wake()
        elif future.status == "error":
            self.reported_failed(replica, explain(await future.exception(), replica.worker))
        elif replica.worker in self.scheduler.workers:
            # Counted, so that whoever cancels them is not answered with an endless loop of new ones.
            self.reported_failed(replica, f"Dask cancelled its actor: {future.status}")
        else:
            self.lose([replica])

    def stop(self, replica: Replica) -> None:
        """Drain a replica and let go of it."""
        replica.message = ""
        replica.move("drain")
        self._spawn(self._drain(replica))

    async def _drain(self, replica: Replica) -> None:
        limit = replica.spec.options.graceful_shutdown_timeout_s
        if replica.submitted:
            try:
                await self.actors.call(replica, "drain", limit, timeout=limit + DRAIN_GRACE)
            except asyncio.TimeoutError:
                logger.warning("replica %s did not drain within %s s; dropping it", replica.id, limit + DRAIN_GRACE)
            except Exception as error:  # noqa: BLE001 - whatever it is, the replica goes
                if replica.state not in ENDS:
                    logger.warning("replica %s could not be drained: %r", replica.id, error)
        self.ended(replica)

    def _reconfigure(self, replica: Replica) -> None:
        found = self.registry.spec_of(replica.deployment, replica.spec.revision)
        if found is not None:
            replica.spec = found[1]
            # Noted at once: what fails is taken back, or the replica replaced, and not sent again.
            replica.settings = settings_of(replica.spec.options)
            replica.message = "it takes over changed options"
            if not replica.settling:
                replica.settling = True
                self._spawn(self._send_options(replica))

    async def _send_options(self, replica: Replica) -> None:
        """Have a replica take over its options, one after the other when they change meanwhile: the last ones hold."""
        sent, message, failed = None, "", ""
        while sent != replica.settings and replica.state == "ready":
            sent = replica.settings
            options = msgspec.msgpack.encode(replica.spec.options)
            message = failed = ""
            try:
                # `reconfigure` may take as long as a constructor.
                await self.actors.call(replica, "reconfigure", options, timeout=None)
            except ServeError as error:
                failed = str(error)
            except Exception as error:  # noqa: BLE001 - its worker is about to go, or to be found silent
                logger.warning("replica %s could not be reached with changed options: %r", replica.id, error)
                message = f"it could not be reached with changed options: {error!r}"
        replica.settling = False
        if replica.state == "ready":
            replica.message = message
        if failed and replica.state == "ready":
            self._not_reconfigured(replica, failed)
        self.wake()

    def _not_reconfigured(self, replica: Replica, error: str) -> None:
        """User code does not take a new ``user_config``: go back to the one before, or replace the replica."""
        found = self.registry.spec_of(replica.deployment, replica.spec.revision)
        if found is None or settings_of(found[1].options) != replica.settings:
            # Another one of them was faster, or somebody deployed again: it gets other options now.
            return
        why = f"replica {replica.id} on worker {replica.worker} could not be reconfigured:\n{error.rstrip()}"
        if self.registry.take_back(replica.deployment, why):
            logger.warning("the update of deployment %s failed and is taken back", replica.deployment)
        else:
            self.reported_unhealthy(replica, f"it could not be reconfigured:\n{error.rstrip()}")

    # -- inside

    def _release(self, replica: Replica) -> None:
        """Let go of the actor: Dask ends it."""
        self.balance.due = True
        future, replica.future = replica.future, None
        if future is None:
            return
        if replica.held:
            replica.held = False
            self.workers.bookings.give_back(replica.worker, replica.booked)
        # At once: Dask does not retire a worker as long as it knows of an actor there.
        if self.actors.withdraw(replica) or future.done():
            future.release()
        else:
            # Submitted this moment, and not yet known to the scheduler.
            self._spawn(self._withdraw_later(replica, future))

    async def _withdraw_later(self, replica: Replica, future: Any) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(future._state.wait(), RECHECK)
        if not future.done():
            self.actors.withdraw(replica)
        future.release()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
