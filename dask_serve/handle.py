"""Calling deployments from Python."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import time
from collections.abc import Callable
from threading import get_ident
from typing import Any, NoReturn, TypeVar

import msgspec
from distributed import Client

from .config import CallOptions
from .context import RequestContext, request_context
from .exceptions import ConfigError, PayloadError, RequestCancelledError, ServeError
from .many import Many
from .options import build_options, change_options
from .policy.desired import deployment_id
from .response import DeploymentResponse
from .routing.calls import AS_DECLARED
from .routing.outcome import Outcome
from .routing.router import Router
from .routing.session import Session
from .routing.state import RefState
from .routing.stream import StreamState
from .session.arguments import Arguments
from .session.assigned import Assigned
from .session.culprit import culprit
from .session.owners import find_owner
from .session.peers import current_worker
from .streaming import AssignedStream, DeploymentResponseGenerator
from .wire import payloads
from .wire.loops import running_loop

__all__ = ["DeploymentHandle"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _takes_options(method: _Method) -> _Method:
    """Let signatures and completion tell which options a method takes."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = CallOptions.__struct_fields__
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=...) for name in names]
    vars(method)["__signature__"] = inspect.Signature([own, *options])
    return method


_DEFAULTS = msgspec.structs.asdict(CallOptions())

#: Options of other systems, and of refs, with what to write here.
_ELSEWHERE = {
    "timeout": "request_timeout_s= is the deadline of the request, ref.result(timeout=) how long you wait for it",
    "timeout_s": "request_timeout_s= is the deadline of the request, ref.result(timeout=) how long you wait for it",
    "retries": "use retries_on_loss=, for calls that may run twice",
    "priority": 'use request_class="background" for what may wait',
    "model_id": "use multiplexed_model_id=",
    "use_new_handle_api": "leave it out: handles are of one kind here",
    "_prefer_local_routing": "leave it out: routers choose by load",
}

#: The state of a call, what stands for its answer, and what is awaited for that.
_REF: tuple[Any, Any, Any] = RefState, DeploymentResponse, Assigned
_STREAM: tuple[Any, Any, Any] = StreamState, DeploymentResponseGenerator, AssignedStream

#: Request ids are unique by this prefix, made anew in each process, and a count.
_prefix = os.urandom(6).hex()
_count = itertools.count()


def _new_request_id() -> str:
    return f"{_prefix}-{next(_count):x}"


def _after_fork() -> None:
    global _prefix
    _prefix = os.urandom(6).hex()


os.register_at_fork(after_in_child=_after_fork)


class DeploymentHandle(Many):
    """Calls a deployment; obtained from `serve.run`, `serve.get_app_handle`, `Deployment.get_handle`, or bound into a
    constructor.

    Works in any thread, in any event loop, in replicas and in Dask tasks, and can be pickled. Equal handles have the
    same target and options.

    Parameters
    ----------
    app_name, deployment_name : str
    address : str, optional
        Address of the scheduler whose cluster it belongs to; None: the cluster where it is used.
    client : distributed.Client, optional
        Through which it calls; by default one that is connected to that cluster.
    on_exit : callable, optional
        Called at the end of a ``with`` block.
    **options
        See `CallOptions`.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Model:
    ...     def predict(self, x):
    ...         return 2 * x
    >>> handle = serve.run(Model.bind())  # doctest: +SKIP
    >>> handle.predict.remote(21).result()  # doctest: +SKIP
    42
    """

    # A public name here is refused as the name of a deployment's method.
    __slots__ = (
        "__weakref__",
        "_address",
        "_background",
        "_client",
        "_cluster",
        "_here",
        "_id",
        "_kinds",
        "_method",
        "_methods",
        "_model_id",
        "_on_exit",
        "_options",
        "_request_id",
        "_retries",
        "_session",
        "_sync",
        "_timeout",
        "app_name",
        "deployment_name",
    )

    def __init__(
        self,
        app_name: str,
        deployment_name: str,
        address: str | None = None,
        *,
        client: Client | None = None,
        on_exit: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        self.app_name = app_name
        self.deployment_name = deployment_name
        self._address = address
        self._client = client
        self._on_exit = on_exit
        self._cluster = ""
        self._id = deployment_id(app_name, deployment_name)
        # What the last call found: the session, and with a loop of its own that loop, its router and its thread (in
        # one tuple, because loops in several threads may share the handle).
        self._session: Session | None = None
        self._here: tuple[asyncio.AbstractEventLoop, Router, int] | None = None
        self._methods: dict[str, DeploymentHandle] = {}
        self._resolve(build_options(CallOptions, options, "a handle") if options else CallOptions())

    def _resolve(self, options: CallOptions) -> None:
        """Take over options in the form in which calls read them."""
        self._options = options
        self._method = options.method_name
        self._sync = options.sync
        self._timeout = options.request_timeout_s
        self._retries = AS_DECLARED if options.retries_on_loss is None else options.retries_on_loss
        self._model_id = options.multiplexed_model_id
        self._background = None if options.request_class is None else options.request_class == "background"
        self._request_id = options.request_id
        self._kinds = _STREAM if options.stream else _REF

    # ------------------------------------------------------------------ identity

    def _target(self) -> tuple[str, str, str | None, CallOptions]:
        return self.app_name, self.deployment_name, self._address, self._options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeploymentHandle) and self._target() == other._target()

    def __hash__(self) -> int:
        return hash(self._target())

    def __reduce__(self) -> tuple[Any, ...]:
        changed = {
            name: value for name, value in msgspec.structs.asdict(self._options).items() if value != _DEFAULTS[name]
        }
        return _unpickle, (self.app_name, self.deployment_name, self._address, changed, self._known_cluster())

    def _known_cluster(self) -> str:
        """Return the scheduler's id, by which it is known where its address is another, as behind a forwarded port."""
        if self._cluster or self._address is None:
            return self._cluster
        if self._session is not None:
            return self._session.cluster
        return "" if self._client is None else Session.of(self._client).cluster

    def __repr__(self) -> str:
        method = "" if self._method == "__call__" else f".{self._method}"
        return f"<DeploymentHandle {self._id}{method}>"

    # ------------------------------------------------------------------ options

    @_takes_options
    def options(self, **changes: Any) -> DeploymentHandle:
        """Return a handle with other options; those not given are kept. `CallOptions` tells what there is.

        Examples
        --------
        >>> patient = handle.options(request_timeout_s=30, retries_on_loss=1)  # doctest: +SKIP
        >>> patient.predict.options(multiplexed_model_id="small").remote(1)  # doctest: +SKIP

        Raises
        ------
        ConfigError
            An option does not exist, or has a value out of its range.
        """
        for name in changes:
            if name in _ELSEWHERE:
                raise ConfigError(f"handle.options() has no option {name!r}: {_ELSEWHERE[name]}")
        return self._with(change_options(self._options, changes, "handle.options()"))

    def _with(self, options: CallOptions) -> DeploymentHandle:
        other = DeploymentHandle(self.app_name, self.deployment_name, self._address, client=self._client)
        other._cluster = self._cluster
        other._resolve(options)
        other._session = self._session
        if other._sync == self._sync:
            other._here = self._here
        return other

    def __getattr__(self, name: str) -> DeploymentHandle:
        if name.startswith("_"):
            raise AttributeError(f"handles call public methods only, and {name!r} is private")
        handle = self._methods.get(name)
        if handle is None:
            handle = self._methods[name] = self._with(msgspec.structs.replace(self._options, method_name=name))
        return handle

    # ------------------------------------------------------------------ calling

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the deployment.

        Returns at once. What goes wrong, an argument that cannot be pickled included, is told by the ref.

        Returns
        -------
        DeploymentResponse or DeploymentResponseGenerator
            The ref, or the stream; with ``sync=False`` an awaitable of it.
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
        background = self._background
        if context is None:
            request_id, timeout = self._request_id or _new_request_id(), self._timeout
            trace = None
        else:
            request_id, timeout = self._request_id or context.request_id, self._remaining(context.deadline, session)
            background = context.background if background is None else background
            trace = context.trace
        make_state, make_ref, assigned = self._kinds
        state = make_state(self._method, (), request_id)
        state.trace = trace
        state.retries = self._retries
        if background:
            state.background = True
        if self._model_id:
            state.model_id = self._model_id
        # A running request waits for it: holding it back for want of room could hold back what makes room. A stream
        # needs none.
        state.urgent = context is not None or state.stream
        ref = make_ref(session, state, _why_not_to_block)
        if context is not None and context.refuses_call(state, self._id):
            state.fail(RequestCancelledError(f"request {request_id} was cancelled: it makes no more calls"))
            return ref if self._sync else assigned(ref)
        arguments: Arguments | None = None
        parts = payloads.dumps_plain(args, kwargs)
        if parts is None:
            arguments = Arguments(session, self._id, state, timeout)
            try:
                parts = arguments.dumps(args, kwargs)
            except PayloadError as error:
                which = culprit(args, kwargs, arguments.reducers)
                what = f"{which} of a call of {self._id!r}, method {self._method!r}, {error}"
                state.settle("error", Outcome(error=("PayloadError", what)))
                return ref if self._sync else assigned(ref)
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
            self._through_engine(session, ref, arguments, timeout)
        if context is not None:
            _belong(ref, context)
        return ref if self._sync else assigned(ref)

    def _through_engine(self, session: Session, ref: Any, arguments: Arguments | None, timeout: float | None) -> None:
        """Let the background loop carry a call."""
        engine, fabric = session.engine()
        id, state = self._id, ref._local
        ref._cancel = lambda: engine.put(_cancel_at, fabric, id, state, arguments)
        if arguments:
            engine.put(arguments.start, lambda left: _submit(fabric, id, state, left))
        else:
            engine.put(_submit, fabric, id, state, timeout)

    def _remaining(self, deadline: float | None, session: Session) -> float | None:
        """Return the seconds that a call may take: its own, and no more than the request has that makes it."""
        timeout = self._timeout
        if deadline is None:
            return timeout
        if timeout is None:
            timeout = session.deadline_of(self._id)
        remaining = max(1e-3, deadline - time.monotonic())
        return remaining if timeout is None else min(remaining, timeout)

    def _find_router(self, session: Session) -> tuple[asyncio.AbstractEventLoop, Router, int] | None:
        """Return the running loop, its router and its thread, or None where the background loop carries the request."""
        loop = running_loop()
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
        session = self._session = Session.of(find_owner(self, self._address, self._cluster, self._client))
        return session

    # ------------------------------------------------------------------ the end of a with block

    def __enter__(self) -> DeploymentHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._on_exit is not None:
            self._on_exit()

    async def __aenter__(self) -> NoReturn:
        raise ServeError("the Dask client is not asynchronous: write `with serve.run(...) as handle:`")

    async def __aexit__(self, *exc: object) -> None:
        """Never called."""


def _unpickle(
    app: str, deployment: str, address: str | None, options: dict[str, Any], cluster: str
) -> DeploymentHandle:
    handle = DeploymentHandle(app, deployment, address, **options)
    handle._cluster = cluster
    return handle


def _belong(ref: DeploymentResponse | DeploymentResponseGenerator, request: RequestContext) -> None:
    """Let a call end with the request that made it. It has left already, so that a cancel cannot come before it."""
    state, cancel = ref._local, ref._cancel
    assert cancel is not None
    state.request = request
    request.note(state, cancel)
    if state.done():
        request.forget(state)


def _submit(fabric: Any, id: str, state: RefState | StreamState, timeout: float | None) -> None:
    fabric.router(id).submit(state, timeout, None)


def _cancel_at(fabric: Any, id: str, state: RefState | StreamState, arguments: Arguments | None) -> None:
    _cancel(fabric.router(id), state, arguments)


def _cancel(router: Router, state: RefState | StreamState, arguments: Arguments | None) -> None:
    """Cancel a call wherever it is by now (on its router's loop)."""
    if not (arguments is not None and arguments.cancel()) and not state.done():
        router.cancel(state)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call a function on a loop, at once where that is the one that runs here."""
    if loop is running_loop():
        function(*args)
    else:
        # A loop that is closed has ended its calls.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, *args)


def _why_not_to_block() -> str | None:
    """Blocking a replica's event loop would block every request that it runs, perhaps the one that is waited for."""
    if running_loop() is None or current_worker() is None:
        return None
    return "the event loop of this replica"
