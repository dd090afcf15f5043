"""Calling a deployment with each of many items, so many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from .exceptions import ConfigError, ServeError
from .response import DeploymentResponse
from .routing.patient import PatientState
from .session.assigned import Assigned
from .session.terminal import Bar
from .session.waiting import patiently, until_cancelled

if TYPE_CHECKING:
    from .handle import DeploymentHandle

__all__ = ["RefMap", "patient", "refuse_streams"]

#: So many calls are made and not handed out, unless told otherwise.
WINDOW = 1000
#: Seconds of making calls until refs that have ended are handed out first: the iterable takes its time.
FILLING = 0.1
#: How often a call is made again when its replica is lost, unless the handle says otherwise.
RETRIES = 3


def patient(handle: DeploymentHandle, places: frozenset[str] | None = None) -> DeploymentHandle:
    """Return a handle for calls that take what others leave, wait for as long as it takes, and may run twice.

    Parameters
    ----------
    handle : DeploymentHandle
        What it says itself of ``request_class``, ``request_timeout_s`` and ``retries_on_loss`` holds.
    places : frozenset of str, optional
        Workers to whose replicas calls go where there is a choice.
    """
    refuse_streams(handle)
    options = handle._options
    patient = handle._with(
        msgspec.structs.replace(
            options,
            request_class=options.request_class or "background",
            retries_on_loss=RETRIES if options.retries_on_loss is None else options.retries_on_loss,
        )
    )
    patient._kinds = functools.partial(_make_state, places), DeploymentResponse, Assigned
    return patient


def refuse_streams(handle: DeploymentHandle) -> None:
    """Raise `ConfigError` for a handle whose calls return streams."""
    if handle._options.stream:
        raise ConfigError(
            f"{handle!r} was made with stream=True, and a stream is not one result: call remote() for each item"
        )


def _make_state(places: frozenset[str] | None, method: str, parts: Any, request_id: str) -> PatientState:
    state = PatientState(method, parts, request_id)
    state.prefers = places
    return state


class RefMap:
    """The refs of a map, one for each item; what `DeploymentHandle.map` returns.

    An iterator, and an asynchronous one: ``for ref in handle.map(items)``, in an event loop ``async for``. Each ref has
    ended when it is handed out, so that ``ref.result()`` returns or raises at once. Calls are made while it is iterated
    over, so many ahead. For one thread or task at a time.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        iterables: tuple[Iterable[Any], ...],
        *,
        ordered: bool = True,
        window: int = WINDOW,
        progress: bool = False,
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigError(f"handle.map: window = {window!r} is not valid: it is a whole number from 1")
        for one in iterables:
            if not hasattr(one, "__iter__"):
                raise ConfigError(f"handle.map takes iterables, not a {type(one).__name__}")
        if not iterables:
            raise ConfigError("handle.map takes at least one iterable: the first argument of each call")
        self._remote = patient(handle).remote
        self._items: Iterator[tuple[Any, ...]] | None = zip(*iterables, strict=False)
        self._window = window
        self._ordered = ordered
        #: How many calls are made and not handed out.
        self._out = 0
        self._slow = False
        #: Those in order; where it does not matter those that have not ended (as keys), and those that have.
        self._made: deque[DeploymentResponse] = deque()
        self._pending: dict[DeploymentResponse, None] = {}
        self._done: deque[DeploymentResponse] = deque()
        self._last: DeploymentResponse | None = None
        self._arrived = threading.Event()
        #: Wakes a task that waits.
        self._tell: Callable[[], object] | None = None
        sizes = [len(one) for one in iterables if isinstance(one, Sized)]
        self._bar = Bar(repr(handle), min(sizes) if len(sizes) == len(iterables) else None) if progress else None

    def __repr__(self) -> str:
        return f"<RefMap: {self._out} calls made and not handed out>"

    # ------------------------------------------------------------------ making calls

    def _fill(self) -> bool:
        """Make calls, many at once; False when all refs were handed out."""
        missing = self._window - self._out
        if self._items is not None and 2 * missing >= self._window and not (self._slow and self._is_ready()):
            before, ends = self._out, time.monotonic() + FILLING
            self._slow = False
            for args in itertools.islice(self._items, missing):
                self._make(args)
                if time.monotonic() > ends and self._is_ready():
                    self._slow = True
                    break
            else:
                if self._out - before < missing:
                    self._items = None
        if self._out:
            return True
        self._end()
        return False

    def _is_ready(self) -> bool:
        """Tell whether a ref can be handed out without waiting."""
        if self._ordered:
            return bool(self._made) and self._made[0]._local.status != "pending"
        return bool(self._done)

    def _hand_out(self, ref: DeploymentResponse) -> DeploymentResponse:
        self._out -= 1
        return ref

    def _make(self, args: tuple[Any, ...]) -> None:
        ref = self._remote(*args)
        self._out += 1
        if type(ref) is Assigned:
            ref = ref.ref
        if self._ordered:
            self._made.append(ref)
        else:
            self._last = ref
            self._pending[ref] = None
            ref._local.on_done(functools.partial(self._arrive, ref))
        if self._bar is not None:
            ref._local.on_done(functools.partial(_note, self._bar, ref._local))

    def _arrive(self, ref: DeploymentResponse) -> None:
        """A call has ended, on whatever thread."""
        self._pending.pop(ref, None)
        self._done.append(ref)
        if not self._arrived.is_set():
            self._arrived.set()
        tell = self._tell
        if tell is not None:
            self._tell = None
            # The loop that waited may be closed.
            with contextlib.suppress(RuntimeError):
                tell()

    # ------------------------------------------------------------------ handing out refs

    def __iter__(self) -> RefMap:
        return self

    def __next__(self) -> DeploymentResponse:
        if not self._fill():
            raise StopIteration
        if self._ordered:
            ref = self._made[0]
            if ref._local.status == "pending":
                self._refuse_to_block(ref)
                ref._wait_in_thread(None)
            if not self._out:  # closed meanwhile
                raise StopIteration
            return self._hand_out(self._made.popleft())
        while not self._done:
            self._arrived.clear()
            if not self._out:
                raise StopIteration
            if not self._done:
                self._refuse_to_block(self._last)
                with until_cancelled(self._arrived.set):
                    patiently(self._arrived.wait, None)
        return self._hand_out(self._done.popleft())

    def __aiter__(self) -> RefMap:
        return self

    async def __anext__(self) -> DeploymentResponse:
        if not self._fill():
            raise StopAsyncIteration
        if self._ordered:
            await self._made[0]._local.wait()
            if not self._out:  # closed meanwhile
                raise StopAsyncIteration
            return self._hand_out(self._made.popleft())
        loop = asyncio.get_running_loop()
        while not self._done:
            event = asyncio.Event()
            self._tell = functools.partial(loop.call_soon_threadsafe, event.set)
            if not self._out:
                raise StopAsyncIteration
            if not self._done:
                await event.wait()
        return self._hand_out(self._done.popleft())

    @staticmethod
    def _refuse_to_block(ref: DeploymentResponse | None) -> None:
        assert ref is not None
        why = "the event loop that carries the calls" if ref._local.is_at_home() else ref._blocked()
        if why is not None:
            raise ServeError(f"`for ref in handle.map(...)` would block {why}; use `async for` there")

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Make no more calls, and cancel those whose refs were not handed out. Also at the end of a ``with`` block."""
        self._items = None
        self._out = 0
        for ref in [*self._made, *list(self._pending)]:
            ref.cancel()
        self._made.clear()
        self._pending.clear()
        self._done.clear()
        self._end()

    def _end(self) -> None:
        self._last = None
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> RefMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _note(bar: Bar, state: PatientState) -> None:
    bar.note(state.status != "finished")
