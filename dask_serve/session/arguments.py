"""Refs and Dask futures among the arguments of a call: waited for here, fetched by the replica from where they are.

They are found at any depth, because the pickle of the arguments finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

from distributed import Future

from ..exceptions import PayloadError, RequestCancelledError, RequestTimeoutError, ServeError
from ..response import DeploymentResponse
from ..routing.outcome import Outcome
from ..routing.session import Session
from ..routing.state import RefState
from ..routing.stream import StreamState
from ..wire import payloads
from ..wire.frames import Buffer
from ..wire.loops import run_on
from ..wire.messages import Attachment
from . import web
from .assigned import Assigned
from .collections import future_behind, is_collection_type, recipe

__all__ = ["Arguments"]

logger = logging.getLogger("dask_serve.refs")


class _Failed(Exception):
    """One of the arguments failed, or cannot be had: so does the call, which never runs."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


#: From this many bytes on an argument draws its call to a replica that has it.
ATTRACTS_FROM = 64 * 1024


class Arguments:
    """The refs and futures of one call.

    They are left out of the pickle of the arguments, and waited for on the loop whose router carries the call.

    Parameters
    ----------
    session : Session
    deployment : str
        ``app/deployment`` that is called.
    state : RefState
        The call.
    timeout : float or None
        Seconds until its deadline.
    """

    __slots__ = (
        "_deployment",
        "_due",
        "_kept",
        "_loop",
        "_missing",
        "_session",
        "_state",
        "_submit",
        "_task",
        "_timeout",
        "_timer",
        "_values",
        "_waiting",
    )

    def __init__(self, session: Session, deployment: str, state: RefState | StreamState, timeout: float | None) -> None:
        self._session = session
        self._deployment = deployment
        self._state = state
        self._timeout = timeout
        self._values: list[Any] = []
        #: Collections whose futures the replica only refers to: they must live as long as the call.
        self._kept: list[Any] = []
        #: They are waited for: the call has neither left nor ended.
        self._waiting = False
        #: How many refs have not ended.
        self._missing = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return bool(self._values or self._kept)

    def reducers(self, kind: type) -> payloads.Reducer | None:
        """How the pickle leaves them out."""
        if issubclass(kind, (Future, Assigned)):
            return self._stand_in
        return self._reduce_collection if is_collection_type(kind) else web.reducer_for(kind)

    def _stand_in(self, value: Any) -> tuple[Any, ...]:
        return payloads.attached, (self._number(value.ref if isinstance(value, Assigned) else value),)

    def _number(self, value: Any) -> int:
        # One may occur twice; and where pickle stumbled, cloudpickle comes by once more.
        number = next((i for i, known in enumerate(self._values) if known is value), len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def _reduce_collection(self, collection: Any) -> Any:
        future = future_behind(collection)
        if future is not None:
            return self._stand_in(future)
        reduced = recipe(collection)
        if reduced is None:
            return collection.__reduce_ex__(5)
        self._kept.append(collection)
        return reduced

    def dumps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Buffer]:
        """Serialise the arguments of the call.

        Raises
        ------
        PayloadError
            One of them cannot be pickled.
        """
        plain = payloads.dumps_plain(args, kwargs, {DeploymentResponse: self._number})
        if plain is not None:
            return plain
        self._values.clear()
        return payloads.dumps((args, kwargs), self.reducers)

    # ------------------------------------------------------------------ on the loop that carries the call

    def start(self, submit: Callable[[float | None], None]) -> None:
        """Begin to wait; ``submit`` is called with the seconds that are left once all are there."""
        state = self._state
        state.keep = self._let_go
        if state.done():
            self._let_go()
            return
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._waiting = True
        if self._timeout is not None:
            self._due = time.monotonic() + self._timeout
            self._timer = self._loop.call_later(self._timeout, self._time_out)
        if all(type(value) is DeploymentResponse for value in self._values):
            self._wait_for_refs()
        else:
            self._task = self._loop.create_task(self._attach_all())

    def _wait_for_refs(self) -> None:
        """Wait without a task: a chain of calls is mostly that."""
        pending = [value._local for value in self._values if value._local.status == "pending"]
        self._missing = len(pending)
        for value in self._values:
            value._read = True
            if value._local.status in {"error", "cancelled"}:
                self._fail(value._local.outcome)
                return
        for local in pending:
            local.on_done(functools.partial(self._on_ref, local, get_ident()))
        if not pending:
            self._attach_refs()

    def _on_ref(self, local: RefState, thread: int) -> None:
        """One of the refs has ended, on whatever thread."""
        if get_ident() == thread:
            self._note_ref(local)
        else:
            # A loop that is closed has ended its calls.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._note_ref, local)

    def _note_ref(self, local: RefState) -> None:
        self._missing -= 1
        if not self._waiting:
            return
        if local.status != "finished":
            assert local.outcome is not None
            self._fail(local.outcome)
        elif not self._missing:
            self._attach_refs()

    def _attach_refs(self) -> None:
        """All have ended well; small values travel with the call."""
        outcomes = [value._local.outcome.parts for value in self._values]
        if None in outcomes:
            self._task = self._loop.create_task(self._attach_all())
            return
        state = self._state
        state.attachments = [Attachment(parts=len(parts)) for parts in outcomes]
        state.parts = list(itertools.chain(state.parts, *outcomes))
        self._leave()

    def _leave(self) -> None:
        self._end_wait()
        self._submit(None if self._timeout is None else max(1e-3, self._due - time.monotonic()))

    def _fail(self, outcome: Outcome) -> None:
        self._end_wait()
        self._state.settle("error", outcome)

    def _time_out(self) -> None:
        state, task = self._state, self._task
        self._end_wait()
        if task is not None:
            task.cancel()
        state.fail(
            RequestTimeoutError(
                f"request {state.request_id} reached its deadline after {self._timeout:.3g} s, "
                "waiting for a ref or a Dask future among its arguments"
            )
        )

    def _end_wait(self) -> None:
        self._waiting = False
        self._task = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_go(self) -> None:
        # The call's ref has `self` for as long as it lives, so that it can cancel the call.
        self._values = []
        self._kept = []

    def cancel(self) -> bool:
        """Stop waiting; False when the call has left."""
        if not self._waiting:
            return False
        task = self._task
        self._end_wait()
        if task is not None:
            task.cancel()
        self._state.fail(RequestCancelledError(f"request {self._state.request_id} was cancelled"))
        return True

    async def _attach_all(self) -> None:
        """Wait for Dask futures, and see where large values are."""
        try:
            await self._attach()
        except _Failed as failed:
            if self._waiting:
                self._fail(failed.outcome)
        except asyncio.CancelledError:
            # The loop ends, unless it was ended from here.
            self.cancel()
        except Exception as error:  # noqa: BLE001
            if self._waiting:
                message = f"an argument of {self._state.method!r} could not be had: {error!r}"
                self._fail(Outcome(error=(ServeError.__name__, message)))
        else:
            if self._waiting:
                self._leave()

    async def _attach(self) -> None:
        waiting = [asyncio.ensure_future(self._ready(value)) for value in self._values]
        try:
            ready = await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
        parts = list(self._state.parts)
        for _, inline, _ in ready:
            parts.extend(inline)
        self._state.attachments = [attachment for attachment, _, _ in ready]
        self._state.parts = parts
        self._state.prefers = await self._places([(attachment, nbytes) for attachment, _, nbytes in ready])

    async def _places(self, arguments: Sequence[tuple[Attachment, int]]) -> frozenset[str] | None:
        """Return the processes or workers that hold the largest argument, where it is large and there is a choice."""
        table = self._session.table
        entry = None if table is None else table.deployments.get(self._deployment)
        if entry is None or len(entry.replicas) < 2:
            return None
        sizes = {frozenset([value.process]): nbytes for value, nbytes in arguments if value.process}
        keys = [value.key for value, _ in arguments if value.key is not None]
        if keys:
            sizes.update(await self._keys_on_workers(keys))
        best = max(sizes, key=sizes.__getitem__, default=None)
        return best if best is not None and sizes[best] >= ATTRACTS_FROM else None

    async def _keys_on_workers(self, keys: list[Any]) -> dict[frozenset[str], int]:
        """Ask the scheduler; where it does not answer the call goes anywhere."""
        scheduler = self._session.owner.scheduler

        async def ask() -> Any:
            return await asyncio.gather(scheduler.who_has(keys=keys), scheduler.nbytes(keys=keys, summary=False))

        try:
            who_has, nbytes = await self._session.on_owner(ask())
        except Exception as error:  # noqa: BLE001
            logger.info("The scheduler does not tell where the arguments of %r are: %s", self._state.method, error)
            return {}
        return {frozenset(who_has[key]): nbytes.get(key, 0) for key in keys if who_has.get(key)}

    async def _ready(self, value: Any) -> tuple[Attachment, list[Buffer], int]:
        """Wait for one value; return where the replica finds it, or the value, and its bytes in a store."""
        if not isinstance(value, DeploymentResponse):
            return await self._dask_key(value), [], 0
        value._read = True
        await value._local.wait()
        outcome = value._local.outcome
        assert outcome is not None
        if outcome.parts is not None:
            return Attachment(parts=len(outcome.parts)), list(outcome.parts), 0
        if outcome.stored is None:
            raise _Failed(outcome)
        first = not value._shared
        promoted = value.share()
        if promoted is not None:
            return await self._dask_key(promoted), [], 0
        parts = value._taken_over()
        if parts is not None:
            # Somebody has fetched it just now, and its store had little room left.
            return Attachment(parts=len(parts)), list(parts), 0
        # What takes a result for the first time makes room for others.
        self._state.urgent = self._state.urgent or first
        stored = outcome.stored
        assert stored is not None
        if value._session.address == self._session.address:
            return Attachment(stored.process, stored.door, stored.name), [], stored.nbytes
        # Another cluster's process lets only its own in: the value goes through here.
        parts = (await value._session.fetch(stored.process, stored.door, stored.name)).parts
        return Attachment(parts=len(parts)), list(parts), 0

    async def _dask_key(self, future: Future) -> Attachment:
        client = future.client
        if client is None:
            raise _Failed(_refusal(f"the Dask future {future.key} has no client here"))
        if client.scheduler is None or client.scheduler.address != self._session.address:
            where = "none" if client.scheduler is None else client.scheduler.address
            raise _Failed(
                _refusal(
                    f"the Dask future {future.key} belongs to another cluster ({where}) than the handle "
                    f"({self._session.address}); pass its result"
                )
            )
        await run_on(client.loop.asyncio_loop, future._state.wait())
        if future.status == "error":
            raise _Failed(Outcome(raised=payloads.dump_exception(future._state.exception)))
        if future.status != "finished":
            raise _Failed(
                _refusal(f"the Dask future {future.key} among the arguments is {future.status}; submit its task again")
            )
        return Attachment(key=future.key)


def _refusal(message: str) -> Outcome:
    return Outcome(error=(PayloadError.__name__, message))
