"""User code: constructed and called on threads of its own, never on the door's or the worker's.

``async def`` methods share one event loop in one thread; ``def`` methods run on a pool of ``threads`` threads.
Arguments are unpickled and results pickled on those threads too, so that the door does nothing that takes long.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from .. import exceptions
from ..batching import BatchedFunction, is_batched
from ..context import ReplicaContext, replica_context, request_context
from ..exceptions import (
    ArgumentsError,
    MethodNotFoundError,
    PayloadError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
)
from ..ingress import ingress_of
from ..wire import payloads
from ..wire.loops import new_event_loop
from ..wire.mailbox import Mailbox, Outbox
from ..wire.messages import Attachment, Kind
from .clients import Clients
from .door import Door
from .execution import Answer, Execution
from .host import Host, enter_host
from .http import HttpAdapter
from .ingress import Lifespan
from .ingress import build as build_app
from .pool import Pool
from .results import dump_result
from .streams import serve_stream

__all__ = ["UserCode"]

#: An answer waits for the end of the loop's tick, to leave with others, unless none has left for this many seconds: the
#: code that runs next in the same tick may take as long.
PROMPT = 0.002

#: Between so many requests at a time half a tick's answers leave early: fewer are not worth two writes, and more keep
#: both sides busy by themselves.
MANY, HOSTS = 24, 256

logger = logging.getLogger("dask_serve.replica")

#: Seconds that cancelled coroutines have to clean up when the replica ends.
CLEAN_UP = 1.0


class UserCode:
    """The user's object and the threads that run it.

    Parameters
    ----------
    id : str
        The replica's id.
    threads : int
        Size of the pool for ``def`` methods.
    context : contextvars.Context
        What every request starts from: the worker, the replica.
    gather : coroutine function
        Fetches the value of one Dask key to this worker.
    inline_below : int
        Results of at least this many bytes stay in the process's store, smaller ones travel in the answer.
    """

    def __init__(
        self,
        id: str,
        threads: int,
        context: contextvars.Context,
        gather: Callable[[Any], Coroutine[Any, Any, Any]],
        inline_below: int,
    ) -> None:
        self.id = id
        self.loop = new_event_loop()
        self.instance: Any = None
        #: Results of at least this many bytes stay in the process's store.
        self.inline_below = inline_below
        #: Clients are shown the tracebacks of user code.
        self.debug = False
        self.gather = gather
        #: The Dask clients of user code.
        self.clients: Clients | None = None
        self._pool = Pool(threads, f"{id}-def")
        self._context = context
        #: What batched methods and multiplexed models run on.
        self.host = Host(self.loop, self._pool)
        context.run(enter_host, self.host)
        self._inbox = Mailbox(self.loop, self._on_mail, context)
        self._methods: dict[str, tuple[Callable[..., Any], bool] | None] = {}
        #: Answers of this tick of the loop.
        self._answers: list[tuple[Execution, Answer]] = []
        #: When answers last left.
        self._flushed = 0.0
        self._door: Door | None = None
        #: The ASGI application of the user's class, and what it has for its requests.
        self.app: ASGIApp | None = None
        self.state: dict[str, Any] = {}
        self._lifespan: Lifespan | None = None
        self._http: HttpAdapter | None = None
        self._thread = threading.Thread(target=self._run, name=f"{id}-user", daemon=True)
        self._main: Callable[[], Any] | None = None
        self._stopping = threading.Lock()

    # ------------------------------------------------------------------ life

    def start(self, main: Callable[[], Any]) -> None:
        """Start the thread; ``main`` is a coroutine function that runs first on its loop (construction)."""
        self._main = main
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        assert self._main is not None
        main = self._main

        def begin() -> None:
            self.loop.create_task(main())

        try:
            self.loop.call_soon(begin, context=self._context)
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self._clean_up())
            # The user's object is let go on its own thread: its __del__ may expect it.
            self.instance = None
            self._context.run(_forget_instance)
            self._methods.clear()
            self._http = self.app = self._lifespan = None
            self.loop.close()

    async def _clean_up(self) -> None:
        """Cancel what still runs. User code that does not let itself be cancelled cannot keep the thread."""
        lifespan = self._lifespan
        pending = asyncio.all_tasks() - {asyncio.current_task(), None if lifespan is None else lifespan.task}
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=CLEAN_UP)
        if pending:
            logger.warning("User code of replica %s goes on after it was cancelled; it is dropped", self.id)
        await self.host.close()
        if lifespan is not None:
            await lifespan.stop()
        if self.clients is not None:
            await self.clients.close()
        try:
            await asyncio.wait_for(self.loop.shutdown_asyncgens(), CLEAN_UP)
        except asyncio.TimeoutError:
            logger.warning("Generators of replica %s do not end; they are dropped", self.id)

    def stop(self) -> None:
        """End the threads; what runs on them is cancelled (a ``def`` that runs cannot be). From any thread."""
        if not self._stopping.acquire(blocking=False):
            # A second stop would end the cleaning up.
            return
        self._pool.stop()
        # It may have ended already.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)

    def join(self, timeout: float) -> bool:
        """Wait for the user thread to end; False when user code still holds it."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def construct(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Make the user's object (on the user loop). A function deployment is its own object."""
        if inspect.isclass(target) and inspect.iscoroutinefunction(init := target.__init__):
            instance = target.__new__(target, *args, **kwargs)
            await init(instance, *args, **kwargs)
            self.instance = instance
        elif inspect.isclass(target):
            self.instance = await self.construction(partial(target, *args, **kwargs), wait=False)
        else:
            self.instance = target

    async def construction(self, make: Callable[[], Any], wait: bool = True) -> Any:
        """Call what makes something of user code's own, with the Dask client of threads; ``wait`` for a coroutine."""
        with self.clients.on_the_loop() if self.clients is not None else contextlib.nullcontext():
            made = make()
        return await made if wait and inspect.isawaitable(made) else made

    async def enter_replica(self, replica: ReplicaContext) -> None:
        """The user's object is there: build its application, if it has one, and let that start (on the user loop)."""
        self._context.run(replica_context.set, replica)
        ingress = ingress_of(type(self.instance))
        if ingress is not None:
            # In the context that requests have.
            self.app = await self._spawn(build_app(ingress, self))
            self._lifespan = self._context.copy().run(Lifespan, self.app)
            await self._lifespan.start()
            self.state = self._lifespan.state

    async def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await self._context.copy().run(self.loop.create_task, coroutine)

    def open(self, door: Door) -> None:
        """Everything is there: requests may come."""
        self._door = door
        self._starts = Outbox(door.loop, self._inbox)
        self._told = Outbox(self.loop, door.mailbox)
        self._http = HttpAdapter(self)

    def method(self, name: str) -> tuple[Callable[..., Any], bool]:
        """Return a public method and whether it is a coroutine function.

        Raises
        ------
        MethodNotFoundError
            There is none; the message lists those there are.
        """
        found = self._methods.get(name)
        if found is None:
            function = self._find(name)
            if not callable(function):
                what = f"no method {name!r}" if function is None else f"{name!r}, a {_kind(function)} and no method"
                raise MethodNotFoundError(f"{self._deployment} has {what}; it has: {', '.join(self.public_methods())}")
            call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
            # A call waits for its batch on the loop, whatever runs the batch.
            is_async = inspect.iscoroutinefunction(call) or is_batched(function)
            found = self._methods[name] = (function, is_async)
        return found

    def _find(self, name: str) -> Any:
        """Return what the user's object has under a name; properties are not evaluated."""
        if name != "__call__" and name.startswith("_"):
            return None
        if isinstance(self.instance, BatchedFunction):
            return self.instance.bound() if name == "__call__" else None
        if inspect.isfunction(self.instance):
            return self.instance if name == "__call__" else None
        static = inspect.getattr_static(self.instance, name, None)
        return static if isinstance(static, property) else getattr(self.instance, name, None)

    @property
    def _deployment(self) -> str:
        """Who this is, for errors."""
        return f"deployment {self.id.rsplit('/', 1)[0]!r}"

    def public_methods(self) -> list[str]:
        """Names that handles can call."""
        if inspect.isfunction(self.instance) or isinstance(self.instance, BatchedFunction):
            return ["__call__"]
        names = [name for name in dir(type(self.instance)) if not name.startswith("_")]
        names = [name for name in names if callable(getattr(type(self.instance), name, None))]
        return ["__call__", *names] if callable(self.instance) else names

    # ------------------------------------------------------------------ from the door

    def begin(self, execution: Execution) -> None:
        """Run an admitted request."""
        call = execution.call
        if call.http is None and not call.attachments and not call.stream:
            method = self._methods.get(call.method)
            if method is not None and not method[1]:
                # A known `def`: nothing is to be done for it on the user loop.
                self._pool.submit(self._run_blocking, execution, method[0], self._context.copy())
                return
        self._starts.put((self._start, execution))

    def cancel(self, execution: Execution) -> None:
        """Cancel a request that runs."""
        self._starts.put((self._cancel, execution))

    def widen(self, execution: Execution, nbytes: int) -> None:
        """The caller has consumed ``nbytes`` of a streamed answer."""
        if execution.outflow is not None:
            execution.outflow.widen(nbytes)

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Let a coroutine of the user loop go on."""
        self._starts.put((_wake, waiter))

    def _on_mail(self, mail: tuple[Callable[[Any], None], Any]) -> None:
        mail[0](mail[1])

    def _start(self, execution: Execution) -> None:
        call = execution.call
        if execution.cancelled:
            self._answer(execution, _CANCELLED)
        elif call.http is not None:
            assert self._http is not None
            execution.task = self.loop.create_task(self._http.serve(execution))
        elif call.stream:
            execution.task = self.loop.create_task(serve_stream(self, execution))
        else:
            try:
                function, is_async = self.method(call.method)
            except Exception as error:  # noqa: BLE001 - a `__getattr__` of the user may raise anything
                self._answer(execution, self.answer_for(execution, error))
                return
            if is_async or call.attachments:
                execution.task = self.loop.create_task(self._run_async(execution, function, is_async))
            else:
                self._pool.submit(self._run_blocking, execution, function, self._context.copy())

    def _cancel(self, execution: Execution) -> None:
        if execution.on_cancel is not None:
            execution.on_cancel.set()
        if execution.inflow is not None:
            execution.inflow.wake()
        task = execution.task
        if task is not None and not task.done():
            if self.clients is not None:
                self.clients.before_cancel()
            task.cancel()

            def answered(task: asyncio.Task[None]) -> None:
                # Cancelled before its first step, it never got to the point where it answers.
                if task.cancelled():
                    self._answer(execution, _CANCELLED)

            task.add_done_callback(answered)
        context = execution.user_context
        if context is not None:
            context.cancel(refuse=execution.blocking)

    # ------------------------------------------------------------------ running

    async def _run_async(self, execution: Execution, function: Callable[..., Any], is_async: bool) -> None:
        try:
            call = execution.call
            self.enter(execution)
            values = await self._fetch_all(execution) if call.attachments else ()
            if is_async:
                args, kwargs = self._arguments(execution, values)
                answer = self._result(await function(*args, **kwargs))
            else:
                answer = await self.in_pool(lambda: self._blocking_answer(execution, function, values))
        except BaseException as error:  # noqa: BLE001
            answer = self.answer_for(execution, error)
        self._answer(execution, answer)

    def _run_blocking(self, execution: Execution, function: Callable[..., Any], context: contextvars.Context) -> None:
        try:
            answer = context.run(self._blocking_answer, execution, function, ())
        except BaseException as error:  # noqa: BLE001
            answer = self.answer_for(execution, error)
        assert self._door is not None
        core = execution.core
        self._door.answer(core, [(execution, answer)], core.admission.running <= 1)

    def _blocking_answer(self, execution: Execution, function: Callable[..., Any], values: Sequence[Any]) -> Answer:
        self.enter(execution, blocking=True)
        args, kwargs = self._arguments(execution, values)
        return self._result(function(*args, **kwargs))

    def enter(self, execution: Execution, blocking: bool = False) -> None:
        """User code begins, or goes on in a thread of the pool (``blocking``): set its context.

        Raises
        ------
        asyncio.CancelledError, RequestTimeoutError
            It makes no sense any more: the request waited for its thread or its loop.
        """
        context = execution.context()
        execution.blocking = blocking
        execution.begun = True
        # Who cancels sets the flag first and then looks at what was set here: one of the two sees the other.
        if execution.cancelled:
            raise asyncio.CancelledError
        if execution.deadline is not None and time.monotonic() >= execution.deadline:
            raise RequestTimeoutError(
                f"the deadline passed while the request waited in replica {self.id}; it was not executed"
            )
        request_context.set(context)

    async def in_pool(self, function: Callable[[], Any]) -> Any:
        """Run a function on the pool, in a copy of the present context."""
        context = contextvars.copy_context()
        return await self._pool.run(lambda: context.run(function))

    def _arguments(self, execution: Execution, values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        try:
            args, kwargs = payloads.loads(execution.parts, values)
        except Exception as error:
            raise PayloadError(
                f"the arguments of {execution.call.method!r} could not be unpickled in replica {self.id}: "
                f"{type(error).__name__}: {error}"
            ) from error
        execution.parts = ()
        return args, kwargs

    def _result(self, value: object) -> Answer:
        try:
            parts = dump_result(value)
        except PayloadError as error:
            raise PayloadError(f"the result of replica {self.id}, a {type(value).__name__}, {error}") from error
        nbytes = payloads.size_of(parts)
        if nbytes < self.inline_below:
            return Answer(Kind.RESULT, parts)
        assert self._door is not None
        return Answer(Kind.RESULT, stored=self._door.store.put(parts), nbytes=nbytes)

    async def _fetch_all(self, execution: Execution) -> list[Any]:
        """Get the values of refs and Dask futures among the arguments, straight from the processes that hold them."""
        attachments = execution.call.attachments
        inline = list(execution.parts[len(execution.parts) - sum(other.parts for other in attachments) :])
        values: list[Any] = []
        elsewhere: dict[int, Attachment] = {}
        for number, attachment in enumerate(attachments):
            if attachment.parts:
                values.append(payloads.loads(inline[: attachment.parts]))
                del inline[: attachment.parts]
            else:
                values.append(None)
                elsewhere[number] = attachment
        if elsewhere:
            fetched = await asyncio.gather(*map(self._fetch, elsewhere.values()))
            for number, value in zip(elsewhere, fetched, strict=True):
                values[number] = value
        return values

    async def _fetch(self, attachment: Attachment) -> Any:
        if attachment.key is not None:
            return await self.gather(_as_key(attachment.key))
        assert self._door is not None
        fetched = self._door.run(self._door.fetch(attachment.process, attachment.door, attachment.name))
        return payloads.loads(await asyncio.wrap_future(fetched))

    # ------------------------------------------------------------------ answers

    def answer_for(self, execution: Execution, error: BaseException) -> Answer:
        """Turn what was raised into an answer, and log what user code has to know of."""
        if isinstance(error, asyncio.CancelledError):
            return _CANCELLED
        if execution.cancelled:
            if not isinstance(error, RequestCancelledError):
                logger.info("Request %s, which was cancelled, failed: %r", execution.call.request_id, error)
            _let_go(error)
            return _CANCELLED
        if isinstance(error, RequestError) and not _from_user_code(error):
            return failure(error)
        if isinstance(error, TypeError) and _is_of_the_call(error):
            return failure(self._misfit(execution.call.method, error))
        text, parts = payloads.dump_exception(error)
        logger.error("Request %s failed in replica %s:\n%s", execution.call.request_id, self.id, text)
        return Answer(Kind.ERROR, parts, message=text)

    def _misfit(self, method: str, error: TypeError) -> ArgumentsError:
        try:
            takes = f"; it takes {inspect.signature(self.method(method)[0])}"
        except (TypeError, ValueError):  # of a builtin
            takes = ""
        return ArgumentsError(f"method {method!r} of {self._deployment} cannot be called so: {error}{takes}")

    def _answer(self, execution: Execution, answer: Answer) -> None:
        """Hand an answer to the door, on the user loop: those of one tick together, unless it took long already."""
        answers = self._answers
        answers.append((execution, answer))
        running = execution.core.admission.running
        # One half of many is on its way while the other half runs, or caller and replica would take turns.
        halved = MANY < running < HOSTS and 2 * len(answers) >= running
        if running <= 1 or halved or time.monotonic() - self._flushed > PROMPT:
            self._flush()
        elif len(answers) == 1:
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._flushed = time.monotonic()
            assert self._door is not None
            self._door.answer(answers[0][0].core, answers, True)

    def send(self, execution: Execution, answer: Answer) -> None:
        """Hand over an answer."""
        self._answer(execution, answer)

    def tell(self, mail: Any) -> None:
        """Put something into the door's mailbox, with what else this tick of the user loop brings."""
        self._told.put(mail)

    def tell_at_once(self, mail: Any) -> None:
        """Put something into the door's mailbox, from a thread of the pool."""
        assert self._door is not None
        # Nobody is left who could read it.
        with contextlib.suppress(RuntimeError):
            self._door.mailbox.put(mail)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _forget_instance() -> None:
    """Leave the user's object to its end: what was begun in this context may live on."""
    context = replica_context.get(None)
    if context is not None:
        replica_context.set(context._replace(servable_object=None))


def _let_go(error: BaseException | None) -> None:
    """Empty the dead frames of an error. They may be part of a cycle, and the Dask futures there have to go now."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _as_key(key: Any) -> Any:
    """Return a Dask key as it was before it travelled: its tuples became lists."""
    return tuple(map(_as_key, key)) if isinstance(key, list) else key


def _kind(value: object) -> str:
    return "property" if isinstance(value, property) else type(value).__name__


def _is_of_the_call(error: TypeError) -> bool:
    """It was raised by the step that calls the user's function: no frame of that function has begun."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    frame = None if trace is None else trace.tb_frame
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) in _CALLING


#: Modules and functions that call the functions of users.
_CALLING = {
    (f"{__package__}.user", "_run_async"),
    (f"{__package__}.user", "_blocking_answer"),
    (f"{__package__}.streams", "_stream"),
    (f"{__package__}.streams", "run"),
}


def _from_user_code(error: RequestError) -> bool:
    """A request error that a called deployment answered, and user code let through: it keeps its remote traceback."""
    return isinstance(error.__cause__, payloads.RemoteTraceback)


def failure(error: RequestError) -> Answer:
    """Answer with an error of ours, by its name."""
    name = type(error).__name__
    return Answer(Kind.ERROR, error=name if name in exceptions.__all__ else "RequestError", message=str(error))


_CANCELLED = Answer(Kind.ERROR, error="RequestCancelledError", message="the request was cancelled")
