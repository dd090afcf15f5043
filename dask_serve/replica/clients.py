"""Dask inside a replica: which client user code gets from ``get_client()``, and what a cancelled request's waits do.

User code runs on threads and a loop that Dask knows nothing of. In a thread (``def`` methods, constructors) it gets the
worker's client, which blocks. A coroutine gets a client that lives on the replica's own loop, since the worker's can
be awaited on the worker's loop only. Functions of Dask that block, such as `dask.compute`, get the one that blocks in
both.

A future that nobody refers to any more is released, and Dask forgets its task. So a cancelled request ends its Dask
work by ending its frames: a coroutine is cancelled anyway, and a thread that waits for results is told here. A future
that the user's object keeps (a table persisted at first use, say) is not harmed, nor is one of another request with the
same key.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from distributed import Client

from ..context import request_context
from ..exceptions import RequestCancelledError
from ..wire.loops import running_loop
from .completed import follow_requests

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Clients"]

logger = logging.getLogger("dask_serve.replica")

#: Seconds that the client of a replica's loop has to close.
CLOSE = 1.0

#: What Dask waits with for results. A cancelled ``def`` begins no such wait any more; anything else (releasing a lock
#: in a ``finally``) it may.
RESULTS = frozenset({"_gather", "_result", "_wait", "_exception"})

_clients: contextvars.ContextVar[Clients | None] = contextvars.ContextVar("dask_serve_clients", default=None)

#: Dask makes two clients where two threads ask for the worker's first one at once.
_making = threading.Lock()


class Clients:
    """The Dask clients of one replica.

    Parameters
    ----------
    worker : distributed.Worker
    loop : asyncio.AbstractEventLoop
        The loop of the replica's coroutines.
    """

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        #: Plain code runs on the loop itself: a constructor, ``reconfigure``.
        self._blocking = False
        self._worker = worker
        self._loop = loop
        self._own: Client | None = None

    def enter(self, context: contextvars.Context) -> None:
        """Let code that runs in ``context`` get its clients here."""
        context.run(_clients.set, self)
        _intercept(self._worker)
        follow_requests()

    def get(self, of_worker: Callable[..., Client], timeout: float | None, asker: str) -> Client:
        """Return the client for the code that runs.

        Parameters
        ----------
        of_worker : callable
            Returns the worker's client.
        asker : str
            The module that asks.
        """
        loop = running_loop()
        if loop is self._worker.loop.asyncio_loop:
            return of_worker(timeout)
        if loop is self._loop and not self._blocking and not asker.startswith("dask."):
            client = self._own
            if client is None or client.status == "closed":
                client = self._own = Client(
                    self._worker.scheduler.address,
                    security=self._worker.security,
                    asynchronous=True,
                    set_as_default=False,
                    direct_to_workers=True,
                    name="replica",
                )
        else:
            with _making:
                client = _without_current(of_worker, timeout)
        _watch(client)
        # What Dask asks for without a worker in mind, `wait` and `as_completed` for one, is the same one.
        if _current_client is not None and asker != "dask.base":
            _current_client.set(client)
        return client

    @contextlib.contextmanager
    def on_the_loop(self) -> Iterator[None]:
        """Plain code runs on the loop itself meanwhile."""
        self._blocking = True
        try:
            yield
        finally:
            self._blocking = False

    def before_cancel(self) -> None:
        """A coroutine of the replica is about to be cancelled (on the loop)."""
        if self._own is not None:
            _hush()

    async def close(self) -> None:
        """Close the loop's own client (on the loop)."""
        client, self._own = self._own, None
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), CLOSE)


try:
    from distributed.client import _current_client
except ImportError:  # pragma: no cover - a private name of distributed
    _current_client = None


def _without_current(of_worker: Callable[..., Client], timeout: float | None) -> Client:
    """Ask for the worker's client; where a current one is set, Dask would take that for the worker's."""
    if _current_client is None:
        return of_worker(timeout)
    token = _current_client.set(None)
    try:
        return of_worker(timeout)
    finally:
        _current_client.reset(token)


def _intercept(worker: Any) -> None:
    """Answer ``get_client()`` in replicas of this worker; elsewhere all is as it was."""
    of_worker = getattr(worker, "_get_client", None)
    if "_get_client" in vars(worker):
        return
    if of_worker is None:  # pragma: no cover - a private name of distributed
        logger.warning(
            "This version of distributed has no Worker._get_client: in replicas get_client() gives what Dask gives in "
            "threads, and cancelled requests do not cancel their Dask work"
        )
        return

    def get_client(timeout: float | None = None) -> Client:
        clients = _clients.get()
        if clients is None:
            return of_worker(timeout)
        return clients.get(of_worker, timeout, _asker())

    worker._get_client = get_client


def _asker() -> str:
    """Name the module that called `distributed.get_client`."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "distributed.worker":
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


# -- waits -------------------------------------------------------------------------------------------------------------


def _watch(client: Any) -> None:
    """Let threads that wait through this client hear that their request was cancelled."""
    if "sync" in vars(client):
        return
    inner = client.sync

    def sync(
        func: Callable[..., Any],
        *args: Any,
        asynchronous: bool | None = None,
        callback_timeout: Any = None,
        **kwargs: Any,
    ) -> Any:
        request = request_context.get()
        if request is None or asynchronous or (asynchronous is None and client.asynchronous):
            return inner(func, *args, asynchronous=asynchronous, callback_timeout=callback_timeout, **kwargs)
        if request.refuses and getattr(func, "__name__", "") in RESULTS:
            raise _told(request.request_id)
        wait = _Wait(client, request.request_id, functools.partial(func, *args, **kwargs))
        request.note(wait, wait.cancel)
        try:
            return inner(wait.run, asynchronous=False, callback_timeout=callback_timeout)
        finally:
            request.forget(wait)
            wait.function = None

    client.sync = sync


class _Wait:
    """A thread of a request that waits for a coroutine on a client's loop.

    Attributes
    ----------
    function : callable or None
        Makes the coroutine. Unset at the end: Dask's own frames may be part of a cycle by then, and futures are among
        its arguments.
    """

    __slots__ = ("_cancelled", "_client", "_request_id", "_task", "function")

    def __init__(self, client: Any, request_id: str, function: Callable[[], Awaitable[Any]]) -> None:
        self.function: Callable[[], Awaitable[Any]] | None = function
        self._client = client
        self._request_id = request_id
        self._cancelled = False
        self._task: asyncio.Task[Any] | None = None

    async def run(self) -> Any:
        """Run on the client's loop."""
        self._task = asyncio.current_task()
        try:
            if not self._cancelled and self.function is not None:
                return await self.function()
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
        finally:
            self._task = None
        raise _told(self._request_id)

    def cancel(self) -> None:
        """End it, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits there
            self._client.loop.asyncio_loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._cancelled = True
        if self._task is not None:
            _hush()
            self._task.cancel()


def _hush() -> None:
    """Take the errors of what a cancelled `gather` leaves behind on this loop, or asyncio would log each of them."""
    for task in asyncio.all_tasks():
        if getattr(task.get_coro(), "__qualname__", "") == "Client._gather.<locals>.wait":
            task.add_done_callback(lambda task: task.cancelled() or task.exception())


def _told(request_id: str) -> RequestCancelledError:
    return RequestCancelledError(f"request {request_id} was cancelled, which waited for Dask here")
