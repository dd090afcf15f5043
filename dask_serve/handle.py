"""Calling deployments from Python."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable
from threading import get_ident
from typing import Any

from distributed import Client, Worker
from distributed.core import Status
from msgspec import UNSET, UnsetType

from .context import request_context
from .exceptions import ConfigError, NotRunningError, PayloadError, ServeError
from .policy.desired import deployment_id
from .response import Assigned, DeploymentResponse
from .routing.router import Router
from .routing.session import Session
from .routing.state import Outcome, RefState
from .session.arguments import Arguments
from .session.peers import current_client, current_worker
from .wire import payloads

__all__ = ["DeploymentHandle"]

#: States of a Dask worker in which it is connected.
WORKS = (Status.running, Status.paused)

#: Request ids are unique by this prefix, made anew in each process, and a count.
_prefix = os.urandom(6).hex()
_count = itertools.count()


def _new_request_id() -> str:
    return f"{_prefix}-{next(_count):x}"


def _after_fork() -> None:
    global _prefix
    _prefix = os.urandom(6).hex()


os.register_at_fork(after_in_child=_after_fork)


class DeploymentHandle:
    """Calls a deployment; obtained from `serve.run`, `serve.get_app_handle`, `Deployment.get_handle`, or bound into a
    constructor.

    Works in any thread, in any event loop, in replicas and in Dask tasks, and can be pickled. Equal handles have the
    same target and options.

    Parameters
    ----------
    app_name, deployment_name : str
    address : str, optional
        Address of the scheduler whose cluster it belongs to; None: the cluster where it is used.
    method_name : str, default "__call__"
        What ``remote`` calls.
    sync : bool, default True
        False: ``await handle.remote()`` is the ref; for use in a running event loop, which then carries the requests
        itself.
    request_timeout_s : float or None
        Deadline of each request in seconds; passed on to the calls that the request makes in turn.
    retries_on_loss : int, default 0
        How often a request may be sent again when its replica is lost while it runs. Only for calls that may run twice.
    on_exit : callable, optional
        Called at the end of a ``with`` block.
    """

    def __init__(
        self,
        app_name: str,
        deployment_name: str,
        address: str | None = None,
        *,
        method_name: str = "__call__",
        sync: bool = True,
        request_timeout_s: float | None = None,
        retries_on_loss: int = 0,
        on_exit: Callable[[], Any] | None = None,
        client: Client | None = None,
    ) -> None:
        self.app_name = app_name
        self.deployment_name = deployment_name
        self._address = address
        self._method = method_name
        self._sync = sync
        self._timeout = request_timeout_s
        self._retries = retries_on_loss
        self._on_exit = on_exit
        self._client = client
        self._id = deployment_id(app_name, deployment_name)
        # What the last call found: the session, and with a loop of its own that loop, its router and its thread (in
        # one tuple, because loops in several threads may share the handle).
        self._session: Session | None = None
        self._here: tuple[asyncio.AbstractEventLoop, Router, int] | None = None
        self._methods: dict[str, DeploymentHandle] = {}

    # ------------------------------------------------------------------ identity

    def _target(self) -> tuple[Any, ...]:
        options = (self._method, self._sync, self._timeout, self._retries)
        return (self.app_name, self.deployment_name, self._address, *options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeploymentHandle) and self._target() == other._target()

    def __hash__(self) -> int:
        return hash(self._target())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, self._target()

    def __repr__(self) -> str:
        method = "" if self._method == "__call__" else f".{self._method}"
        return f"<DeploymentHandle {self._id}{method}>"

    # ------------------------------------------------------------------ options

    def options(
        self,
        *,
        method_name: str | UnsetType = UNSET,
        sync: bool | UnsetType = UNSET,
        request_timeout_s: float | UnsetType | None = UNSET,
        retries_on_loss: int | UnsetType = UNSET,
        **unknown: Any,
    ) -> DeploymentHandle:
        """Return a handle with other options; those not given are kept.

        Raises
        ------
        ConfigError
            An option does not exist, or has a value out of its range.
        """
        if unknown:
            raise ConfigError(
                f"handle.options() has no option {next(iter(unknown))!r}; "
                "it has: method_name, sync, request_timeout_s, retries_on_loss"
            )
        timeout = self._timeout if isinstance(request_timeout_s, UnsetType) else request_timeout_s
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"request_timeout_s = {timeout!r} is not valid: give seconds above 0, or None")
        retries = self._retries if isinstance(retries_on_loss, UnsetType) else retries_on_loss
        if not isinstance(retries, int) or retries < 0:
            raise ConfigError(f"retries_on_loss = {retries!r} is not valid: it is a whole number, 0 or more")
        return DeploymentHandle(
            self.app_name,
            self.deployment_name,
            self._address,
            method_name=self._method if isinstance(method_name, UnsetType) else method_name,
            sync=self._sync if isinstance(sync, UnsetType) else sync,
            request_timeout_s=timeout,
            retries_on_loss=retries,
            client=self._client,
        )

    def __getattr__(self, name: str) -> DeploymentHandle:
        if name.startswith("_"):
            raise AttributeError(f"handles call public methods only, and {name!r} is private")
        handle = self._methods.get(name)
        if handle is None:
            handle = self._methods[name] = self.options(method_name=name)
        return handle

    # ------------------------------------------------------------------ calling

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the deployment.

        Returns at once. What goes wrong, an argument that cannot be pickled included, is told by the ref.

        Returns
        -------
        DeploymentResponse
            The ref; with ``sync=False`` an awaitable of it.
        """
        session = self._session
        if session is None or session.closed:
            session = self._connect()
        here = self._here
        # A loop that runs in this thread is the one that runs here; before Python 3.12 asking asyncio costs a system
        # call.
        if here is None or here[2] != get_ident() or not here[0].is_running():
            here = self._find_router(session)
        context = request_context.get()
        if context is None:
            request_id, timeout = _new_request_id(), self._timeout
        else:
            request_id, timeout = context.request_id, self._remaining(context.deadline)
        state = RefState(self._method, (), request_id)
        state.retries = self._retries
        ref = DeploymentResponse(session, state, _why_not_to_block)
        arguments: Arguments | None = None
        parts = payloads.dumps_plain(args, kwargs)
        if parts is None:
            arguments = Arguments(session, state, timeout)
            try:
                parts = payloads.dumps((args, kwargs), arguments.reducers)
            except PayloadError as error:
                what = f"{_culprit(args, kwargs)} of a call of {self._id!r}, method {self._method!r}, {error}"
                state.settle("error", Outcome(error=("PayloadError", what)))
                return ref if self._sync else Assigned(ref)
        state.parts = parts
        if here is not None:
            loop, router, thread = here
            state.home, state.thread = loop, thread
            ref._cancel = lambda: _on_loop(loop, _cancel, router, state, arguments)
            if arguments:
                arguments.start(lambda left: router.submit(state, left, None))
            else:
                router.submit(state, timeout, None)
        else:
            engine, fabric = session.engine()
            id = self._id
            ref._cancel = lambda: engine.put(_cancel_at, fabric, id, state, arguments)
            if arguments:
                engine.put(arguments.start, lambda left: _submit(fabric, id, state, left))
            else:
                engine.put(_submit, fabric, id, state, timeout)
        return ref if self._sync else Assigned(ref)

    def _remaining(self, deadline: float | None) -> float | None:
        """Return the seconds that a call may take: its own, and no more than the request has that makes it."""
        if deadline is None:
            return self._timeout
        remaining = max(1e-3, deadline - time.monotonic())
        return remaining if self._timeout is None else min(remaining, self._timeout)

    def _find_router(self, session: Session) -> tuple[asyncio.AbstractEventLoop, Router, int] | None:
        """Return the running loop, its router and its thread, or None where the background loop carries the request."""
        loop = _running_loop()
        if not self._sync and loop is None:
            raise ServeError(
                f"{self!r} was made with sync=False: call remote() inside a running event loop, "
                "or get a handle with sync=True"
            )
        if loop is None or (self._sync and not session.in_worker and not session.is_asynchronous):
            return None
        here = self._here = loop, session.fabric(loop).router(self._id), get_ident()
        return here

    def _connect(self) -> Session:
        """Find the connection to the cluster that this handle belongs to."""
        self._here = None
        worker = current_worker()
        if worker is not None and self._address in (None, worker.scheduler.address):
            session = Session.of(worker)
        else:
            session = Session.of(self._find_owner())
        self._session = session
        return session

    def _find_owner(self) -> Client | Worker:
        candidates = [self._client, current_client(), *list(Client._instances)]
        for client in candidates:
            if client is None or client.status != "running" or client.scheduler is None:
                continue
            if self._client is client or self._address in (None, client.scheduler.address):
                return client
        # A thread that user code started in a replica or a task.
        for worker in list(Worker._instances):
            if worker.status in WORKS and self._address in (None, worker.scheduler.address):
                return worker
        where = "" if self._address is None else f" at {self._address}"
        raise NotRunningError(
            f"{self!r} belongs to the cluster{where}, and no open Dask client is connected to it here: make one with "
            f"distributed.Client({self._address or '<scheduler address>'!r})"
        )

    # ------------------------------------------------------------------ the end of a with block

    def __enter__(self) -> DeploymentHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._on_exit is not None:
            self._on_exit()


def _unpickle(  # noqa: PLR0917
    app: str, deployment: str, address: str | None, method: str, sync: bool, timeout: float | None, retries: int
) -> DeploymentHandle:
    return DeploymentHandle(
        app,
        deployment,
        address,
        method_name=method,
        sync=sync,
        request_timeout_s=timeout,
        retries_on_loss=retries,
    )


def _culprit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Name the argument that cannot be pickled."""
    for name, value in [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]:
        try:
            payloads.dumps(value)
        except PayloadError:
            return f"{name} ({type(value).__name__})"
    return "an argument"


def _submit(fabric: Any, id: str, state: RefState, timeout: float | None) -> None:
    fabric.router(id).submit(state, timeout, None)


def _cancel_at(fabric: Any, id: str, state: RefState, arguments: Arguments | None) -> None:
    _cancel(fabric.router(id), state, arguments)


def _cancel(router: Router, state: RefState, arguments: Arguments | None) -> None:
    """Cancel a call wherever it is by now (on its router's loop)."""
    if not (arguments is not None and arguments.cancel()) and not state.done():
        router.cancel(state)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call a function on a loop, at once where that is the one that runs here."""
    if loop is _running_loop():
        function(*args)
    else:
        # A loop that is closed has ended its calls.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, *args)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _why_not_to_block() -> str | None:
    """Blocking a replica's event loop would block every request that it runs, perhaps the one that is waited for."""
    if _running_loop() is None or current_worker() is None:
        return None
    return "the event loop of this replica"
