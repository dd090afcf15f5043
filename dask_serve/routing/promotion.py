"""Promotion: making a real Dask task of a ref, once Dask asks for its key. The first functions here are those tasks.

- A small value travels into the task's graph as bytes, which the scheduler does not open.
- A large value stays where it is. The task prefers that worker, and takes the value from the store of its process;
  anywhere else (work stealing moves tasks within 0.3 s when the holder's threads are busy) it fetches the value
  through the holder's door.
- A request that is still under way has no place yet: it may wait at the router, or be moved. The task gives its thread
  back and waits for the outcome, which the session of the ref tells to the controller.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from distributed import get_worker
from distributed.utils import offload

from ..exceptions import ReplicaLostError
from ..wire import payloads
from .outcome import Outcome, Stored
from .session import Session
from .state import RefState
from .store import Fetched, stores

__all__ = ["raise_outcome", "submit_task", "take_pending", "take_stored", "take_value", "value_of"]

#: Seconds of one question for the outcome of a request that is under way.
POLL = 30.0


def pack_outcome(outcome: Outcome) -> list[Any]:
    """Turn an outcome into what msgpack can carry."""
    raised = None if outcome.raised is None else [outcome.raised[0], [bytes(part) for part in outcome.raised[1]]]
    parts = None if outcome.parts is None else [bytes(part) for part in outcome.parts]
    return [parts, outcome.stored and list(outcome.stored), raised, outcome.error and list(outcome.error)]


def _unpack(packed: Sequence[Any]) -> Outcome:
    parts, stored, raised, error = packed
    return Outcome(parts, stored and Stored(*stored), raised and (raised[0], raised[1]), error and (error[0], error[1]))


def take_value(parts: Sequence[bytes]) -> Any:
    """Be the task of a small value."""
    return payloads.loads([parts[0], *map(bytearray, parts[1:])])


def raise_outcome(packed: Sequence[Any]) -> None:
    """Be the task of a failed request."""
    error = _unpack(packed).exception()
    assert error is not None
    raise error


async def take_stored(process: str, door: str, name: str, nbytes: int, shared: bool = False) -> Any:
    """Be the task of a value in a worker's store; Dask's now: the store lets go of it unless calls share it."""
    session = Session.of(get_worker())
    fetched: Fetched = await asyncio.wrap_future(session.on_engine(_fetch(session, process, door, name)))
    value = await offload(payloads.loads, fetched.parts)
    if not shared:
        session.release(process, name)
    for store in list(stores.values()):
        store.promoted += 1
    return value


async def _fetch(session: Session, process: str, door: str, name: str) -> Fetched:
    # A worker that has not heard from the controller yet has no secret to show to the door.
    fabric = session.engine()[1]
    deadline = time.monotonic() + POLL
    while fabric.table is None and process not in stores and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return await session.fetch(process, door, name)


async def take_pending(key: str, promise: str) -> Any:
    """Be the task of a request that is still under way."""
    worker = get_worker()
    _give_thread_back(worker, key)
    while True:
        reply = await worker.scheduler.serve_outcome(promise=promise, timeout=POLL)
        if not reply or "error" in reply:
            raise ReplicaLostError(f"the outcome of {key} is lost: dask_serve was shut down")
        outcome = reply["outcome"]
        if isinstance(outcome, dict):
            raise ReplicaLostError(f"the outcome of {key} is lost: the session that made the call is gone")
        if outcome is not None:
            break
    settled = _unpack(outcome)
    error = settled.exception()
    if error is not None:
        raise error
    if settled.stored is not None:
        return await take_stored(*settled.stored)
    assert settled.parts is not None
    return take_value(settled.parts)  # type: ignore[arg-type]


def _give_thread_back(worker: Any, key: str) -> None:
    """Free the thread of a coroutine task that waits; `distributed.secede` is for threads only."""
    from distributed.worker_state_machine import SecedeEvent

    event = SecedeEvent(key=key, compute_duration=0.0, stimulus_id=f"serve-secede-{time.time()}")
    worker.loop.add_callback(worker.handle_stimulus, event)


# -- on the side of the ref --------------------------------------------------------------------------------------------


def submit_task(client: Any, session: Session, state: RefState, key: str, shared: bool) -> Any:
    """Make a Dask task of a request.

    Parameters
    ----------
    client : distributed.Client
    session : Session
        That of the ref.
    state : RefState
    key : str
        Of the task.
    shared : bool
        Calls take a stored value too: it stays in the store.

    Returns
    -------
    distributed.Future
    """
    outcome = state.outcome
    if outcome is None:
        promise = uuid.uuid4().hex
        session.tell("serve_promise", promise=promise, client=client.id)
        state.on_done(lambda: session.tell("serve_settle", promise=promise, outcome=pack_outcome(state.settled())))
        future = client.submit(take_pending, key, promise, key=key, pure=False)
    elif outcome.parts is not None:
        future = client.submit(take_value, [bytes(part) for part in outcome.parts], key=key, pure=False)
    elif outcome.stored is not None:
        future = client.submit(
            take_stored,
            *outcome.stored,
            shared,
            key=key,
            pure=False,
            workers=session.worker_of(outcome.stored.process),
            allow_other_workers=True,
        )
    else:
        future = client.submit(raise_outcome, pack_outcome(outcome), key=key, pure=False)
    client.loop.add_callback(_flush_later, client)
    return future


def _flush_later(client: Any) -> None:
    """Let what was promoted go first: `publish_dataset` flushes before it reads the keys of futures.

    Runs on the client's loop.
    """
    buffer = getattr(client.scheduler_comm, "buffer", None)
    if isinstance(buffer, list):
        buffer.sort(key=lambda message: message.get("op") == "publish_flush_batched_send")


async def value_of(future: Any) -> Any:
    """Return a future's value, or raise a new exception (on the loop of its client)."""
    try:
        return await future._result()
    except ReplicaLostError as error:
        raise ReplicaLostError(str(error)) from None
