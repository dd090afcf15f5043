"""The models that one loader of a replica has loaded: each once, the least recently used ones make room.

A request holds what it got until it is answered, and what is held is not unloaded. A request that needs room while all
is held waits, unless it holds a model itself: of two that wait for each other one has to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from ..context import RequestContext, request_context
from ..exceptions import RequestCancelledError, RequestTimeoutError
from ..policy.models import to_unload
from .host import Host

__all__ = ["Models", "ModelsSettings"]

logger = logging.getLogger("dask_serve.multiplex")

#: A thread of a replica waits for room for at most so many seconds: others may need that thread to get done.
PATIENCE = 5.0
#: Who waits for room looks again after so many seconds. Normally it is told.
AGAIN = 1.0
#: Seconds that the unload hooks have together when the replica ends.
AT_THE_END = 1.0


class ModelsSettings:
    """How many models, how large together, and how they are let go.

    Parameters
    ----------
    most, max_bytes : int or None
        None: without limit.
    size_of : callable
        Returns a model's bytes.
    unload : callable or None
        Called with a model that goes, in place of its own method ``unload``.
    """

    __slots__ = ("max_bytes", "most", "size_of", "unload")

    def __init__(
        self,
        most: int | None,
        max_bytes: int | None,
        size_of: Callable[[Any], int],
        unload: Callable[[Any], Any] | None,
    ) -> None:
        self.most = most
        self.max_bytes = max_bytes
        self.size_of = size_of
        self.unload = unload


class Model:
    """One model, from the first request for it until it is unloaded."""

    __slots__ = (
        "admitted",
        "claimed",
        "error",
        "id",
        "nbytes",
        "ready",
        "traceback",
        "users",
        "value",
        "waiters",
        "wanted",
    )

    def __init__(self, id: str, nbytes: int) -> None:
        self.id = id
        #: As it was when it was loaded before; 0 while not known.
        self.nbytes = nbytes
        self.value: Any = None
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self.ready = False
        #: Somebody loads it.
        self.claimed = False
        #: It has its room.
        self.admitted = False
        #: The requests that hold it. One that lives on in a task of user code, after it was answered, may never give
        #: it back.
        self.users: weakref.WeakSet[RequestContext] = weakref.WeakSet()
        #: Code that works for no request asked for it: whether it waits still is not known.
        self.wanted = False
        self.waiters: list[Callable[[], object]] = []

    @property
    def in_use(self) -> bool:
        """A request holds it, or waits for it."""
        return bool(self.users) or not self.ready


class Models:
    """Loads, keeps and lets go. From any thread.

    Parameters
    ----------
    name : str
        Of the loader.
    is_async : bool
        The loader is a coroutine function.
    settings : ModelsSettings
    host : Host or None
        The replica; None outside of one.
    """

    def __init__(self, name: str, is_async: bool, settings: ModelsSettings, host: Host | None) -> None:
        self.name = name
        self.settings = settings
        self._is_async = is_async
        self._host = host
        self._lock = threading.Lock()
        #: The least recently used first.
        self._models: dict[str, Model] = {}
        self._sizes: dict[str, int] = {}
        #: There are more than there may be, as all others were in use.
        self._over = False
        #: Called once when a model was given back, or one has gone.
        self._hopeful: list[Callable[[], object]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def names(self) -> tuple[list[str], list[str]]:
        """Return the ids of the models that are there, and of those that come."""
        with self._lock:
            models = list(self._models.values())
        return [model.id for model in models if model.ready], [model.id for model in models if not model.ready]

    # ------------------------------------------------------------------ callers

    async def get(self, load: Callable[[str], Any], id: str) -> Any:
        """Return a model, loaded if need be, on the running loop."""
        loop = asyncio.get_running_loop()
        while True:
            model, mine = self._find(id)
            if model.ready:
                return model.value
            if mine:
                task = loop.create_task(self._load(load, model))
                # Whoever began it may be cancelled; others wait for it.
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            waiter: asyncio.Future[None] = loop.create_future()
            self._when_done(model, partial(_tell, loop, waiter))
            await waiter
            if not _is_left(model):
                return self._outcome(model)

    def get_blocking(self, load: Callable[[str], Any], id: str) -> Any:
        """Return a model, loaded by this thread if nobody else loads it."""
        while True:
            model, _ = self._find(id)
            if model.ready:
                return model.value
            if self._claim(model):
                self._load_here(load, model)
            else:
                gate = threading.Event()
                self._when_done(model, gate.set)
                self._wait_in_thread(gate, f"model {id!r} was being loaded")
            if not _is_left(model):
                return self._outcome(model)

    def _outcome(self, model: Model) -> Any:
        if model.error is not None:
            # Others raise the same: each as it came from the loader.
            raise model.error.with_traceback(model.traceback)
        return model.value

    def _wait_in_thread(self, gate: threading.Event, why: str, most: float | None = None) -> None:
        """Wait, ``most`` seconds, as long as the request has time and somebody wants it."""
        request = request_context.get()
        if request is None:
            gate.wait(most)
            return
        request.note(gate, gate.set)
        try:
            left = None if request.deadline is None else max(0.0, request.deadline - time.monotonic())
            ends = most if left is None or (most is not None and most < left) else left
            if not gate.wait(ends) and ends == left and left is not None:
                raise RequestTimeoutError(f"the deadline passed while {why}")
            if request.cancelled:
                raise RequestCancelledError(f"request {request.request_id} was cancelled")
        finally:
            request.forget(gate)

    def _find(self, id: str) -> tuple[Model, bool]:
        """Return a model that is there or comes, held by this request; and whether it is new."""
        request = request_context.get()
        with self._lock:
            model = self._models.pop(id, None)
            new = model is None
            if model is None:
                model = Model(id, self._sizes.get(id, 0))
            # The most recently used is the last.
            self._models[id] = model
            if request is None:
                model.wanted = True
            elif request not in model.users:
                model.users.add(request)
                leases = request.leases
                if leases is None:
                    leases = request.leases = {}
                leases[self, id] = partial(self._give_back, model)
        if new:
            self._changed()
        return model, new

    def _give_back(self, model: Model, request: RequestContext) -> None:
        with self._lock:
            model.users.discard(request)
            unload = self._surplus() if self._over else []
            hopeful, self._hopeful = self._hopeful, []
        for tell in hopeful:
            tell()
        if unload:
            self._changed()
            self._let_go_later(unload)

    def _surplus(self) -> list[Model]:
        """Take out what is more than there may be, and is not in use any more (under the lock)."""
        settings = self.settings
        there = [model for model in self._models.values() if model.admitted]
        unload, fits = to_unload(there, settings.most, settings.max_bytes, fresh=0)
        for model in unload:
            del self._models[model.id]
        self._over = not fits
        return unload

    def _is_unwanted(self, model: Model) -> bool:
        """All requests for a model that is to be loaded are gone: nobody gets it."""
        with self._lock:
            if model.users or model.wanted:
                return False
            if self._models.get(model.id) is model:
                del self._models[model.id]
            return True

    def _when_done(self, model: Model, tell: Callable[[], object]) -> None:
        with self._lock:
            if not model.ready and model.error is None:
                model.waiters.append(tell)
                return
        tell()

    # ------------------------------------------------------------------ loading

    def _claim(self, model: Model) -> bool:
        with self._lock:
            claimed, model.claimed = model.claimed, True
            return not claimed

    async def _load(self, load: Callable[[str], Any], model: Model) -> None:
        """Load a model for coroutines; never raises, but when it is cancelled."""
        try:
            if not self._is_async:
                await self._room_for(model)
                # A thread that comes first, and waits for it, loads it itself.
                await self._in_thread(partial(self._load_unclaimed, load, model))
            elif self._claim(model):
                await self._room_for(model)
                await self._loaded(model, await load(model.id))
        except BaseException as error:
            self._done(model, None, _left_or(error))
            if isinstance(error, asyncio.CancelledError):
                raise

    def _load_unclaimed(self, load: Callable[[str], Any], model: Model) -> None:
        if self._claim(model):
            if self._is_unwanted(model):
                self._done(model, None, _unwanted(model))
            else:
                self._load_here(load, model)

    def _load_here(self, load: Callable[[str], Any], model: Model) -> None:
        """Load a model in this thread; never raises."""
        try:
            give_up = time.monotonic() + PATIENCE
            while True:
                gate = threading.Event()
                unload, enough = self._make_room(model, gate.set if time.monotonic() < give_up else None)
                for other in unload:
                    self._let_go(other)
                if enough:
                    break
                self._wait_in_thread(gate, f"model {model.id!r} waited for room, and all others were in use", AGAIN)
            value = load(model.id)
            model.nbytes = self._size_of(value)
            unload = self._make_room(model, None)[0]
            self._done(model, value, None)
            for other in unload:
                self._let_go(other)
        except BaseException as error:  # noqa: BLE001 - those who wait for it get it
            self._done(model, None, _left_or(error))

    async def _room_for(self, model: Model) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiter: asyncio.Future[None] = loop.create_future()
            unload, enough = self._make_room(model, partial(_tell, loop, waiter))
            for other in unload:
                await self._let_go_on_loop(other)
            if enough:
                return
            await asyncio.wait([waiter], timeout=AGAIN)
            if self._is_unwanted(model):
                raise _unwanted(model)

    async def _loaded(self, model: Model, value: Any) -> None:
        model.nbytes = self._size_of(value)
        unload = self._make_room(model, None)[0]
        self._done(model, value, None)
        for other in unload:
            await self._let_go_on_loop(other)

    def _make_room(self, model: Model, hope: Callable[[], object] | None) -> tuple[list[Model], bool]:
        """Take out what makes room for a model; False: that is not enough, and ``hope`` is called when more may be."""
        request = request_context.get()
        settings = self.settings
        with self._lock:
            if model.admitted and hope is not None:
                return [], True
            others = [other for other in self._models.values() if other is not model and other.admitted]
            unload, enough = to_unload(others, settings.most, settings.max_bytes, model.nbytes)
            for other in unload:
                del self._models[other.id]
            # One that holds a model does not wait: it could be what the others wait for.
            holds = request is not None and request.leases is not None and len(request.leases) > 1
            if not enough and hope is not None and not holds and any(other.users for other in others):
                self._hopeful.append(hope)
            else:
                self._over = self._over or not enough
                if not enough and hope is None and not model.admitted:
                    logger.warning("Model %r of %s is one too many: all others are in use", model.id, self.name)
                model.admitted = enough = True
        if unload:
            self._changed()
        return unload, enough

    def _done(self, model: Model, value: Any, error: BaseException | None) -> None:
        with self._lock:
            if model.ready or model.error is not None:
                return
            model.value = value
            model.error = error
            model.traceback = None if error is None else error.__traceback__
            model.ready = error is None
            waiters, model.waiters = model.waiters, []
            if error is None:
                self._sizes[model.id] = model.nbytes
            elif self._models.get(model.id) is model:
                # The next request tries again.
                del self._models[model.id]
            hopeful, self._hopeful = self._hopeful, []
        self._changed()
        for tell in [*waiters, *hopeful]:
            tell()

    def _size_of(self, value: Any) -> int:
        if self.settings.max_bytes is None:
            return 0
        return int(self.settings.size_of(value))

    def _changed(self) -> None:
        if self._host is not None:
            self._host.on_models()

    # ------------------------------------------------------------------ unloading

    def _hook(self, model: Model) -> Callable[[], Any] | None:
        value, model.value = model.value, None
        if self.settings.unload is not None:
            return partial(self.settings.unload, value)
        own = getattr(value, "unload", None)
        return own if callable(own) else None

    def _let_go(self, model: Model) -> None:
        """Unload a model in this thread; its last reference is dropped here, unless user code keeps one."""
        hook = self._hook(model)
        if hook is None:
            return
        try:
            made = hook()
            if inspect.isawaitable(made):
                loop = None if self._host is None else self._host.loop
                if loop is None:
                    asyncio.run(_await(made))
                else:
                    asyncio.run_coroutine_threadsafe(_await(made), loop).result()
        except Exception:
            logger.exception("Model %r of %s could not be unloaded", model.id, self.name)

    def _let_go_later(self, models: Sequence[Model]) -> None:
        """Unload models, not in this thread, which may have other things to do."""

        async def let_go() -> None:
            for model in models:
                await self._let_go_on_loop(model)

        if self._host is None:
            for model in models:
                self._let_go(model)
            return
        letting_go = let_go()
        try:
            asyncio.run_coroutine_threadsafe(letting_go, self._host.loop)
        except RuntimeError:  # the loop has ended, and took them with it
            letting_go.close()

    async def _let_go_on_loop(self, model: Model) -> None:
        hook = self._hook(model)
        if hook is None:
            return
        try:
            if inspect.iscoroutinefunction(hook.func if isinstance(hook, partial) else hook):
                await hook()
            else:
                made = await self._in_thread(hook)
                if inspect.isawaitable(made):
                    await made
        except Exception:
            logger.exception("Model %r of %s could not be unloaded", model.id, self.name)

    async def close(self) -> None:
        """The replica ends: unload what is there."""
        with self._lock:
            models, self._models = list(self._models.values()), {}
        hooks = [self._at_the_end(model) for model in models if model.ready]
        if hooks:
            _, late = await asyncio.wait([asyncio.ensure_future(hook) for hook in hooks], timeout=AT_THE_END)
            if late:
                logger.warning("%d models of %s were not unloaded in time", len(late), self.name)

    async def _at_the_end(self, model: Model) -> None:
        hook = self._hook(model)
        # The pool has stopped.
        with contextlib.suppress(Exception):
            made = hook() if hook is not None else None
            if inspect.isawaitable(made):
                await made

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        context = contextvars.copy_context()
        run = partial(context.run, function)
        if self._host is not None:
            return await self._host.pool.run(run)
        return await asyncio.get_running_loop().run_in_executor(None, run)


class _Left(Exception):
    """The request that loaded a model has ended, and with it the load; others load it again."""


def _is_gone(request: RequestContext | None) -> bool:
    if request is None:
        return False
    return request.cancelled or (request.deadline is not None and time.monotonic() >= request.deadline)


def _left_or(error: BaseException) -> BaseException:
    """Return why a load failed: what it raised, or that its own request has ended."""
    if isinstance(error, (RequestCancelledError, RequestTimeoutError)) and _is_gone(request_context.get()):
        left = _Left()
        left.__cause__ = error
        return left
    return error


def _is_left(model: Model) -> bool:
    """Whether this request has to load a model again, as who did that has left."""
    error = model.error
    if not isinstance(error, _Left):
        return False
    if _is_gone(request_context.get()):
        assert error.__cause__ is not None
        raise error.__cause__
    return True


def _unwanted(model: Model) -> RequestCancelledError:
    return RequestCancelledError(f"nobody waits for model {model.id!r} any more: it was not loaded")


async def _await(made: Any) -> Any:
    return await made


def _tell(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    def tell() -> None:
        if not waiter.done():
            waiter.set_result(None)

    # Nobody waits on a closed loop.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tell)
