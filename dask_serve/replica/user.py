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
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from ..context import ReplicaContext, replica_context, request_context
from ..exceptions import (
    PayloadError,
    RequestTimeoutError,
)
from ..ingress import ingress_of
from ..wire import payloads
from ..wire.loops import new_event_loop
from ..wire.mailbox import Mailbox, Outbox
from ..wire.messages import Kind
from .clients import Clients
from .door import Door
from .execution import Answer, Execution
from .failures import CANCELLED, answer_for
from .fetching import fetch_all
from .hooks import finish
from .host import Host, enter_host
from .http import HttpAdapter
from .ingress import Lifespan
from .ingress import build as build_app
from .methods import Methods
from .native import NativeThreads
from .pool import Pool
from .results import dump_result
from .streams import serve_stream

if TYPE_CHECKING:
    from .tracing import ReplicaTraces

__all__ = ["UserCode"]

#: An answer waits for the end of the loop's tick, to leave with others, unless none has left for this many seconds: the
#: code that runs next in the same tick may take as long.
PROMPT = 0.002

#: Between so many requests at a time half a tick's answers leave early: fewer are not worth two writes, and more keep
#: both sides busy by themselves.
HALVES_ABOVE, HALVES_BELOW = 24, 256

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
        #: ``app/deployment``.
        self.deployment = id.rsplit("/", 1)[0]
        self.threads = threads
        self.loop = new_event_loop()
        self.instance: Any = None
        self.methods = Methods(self)
        #: Results of at least this many bytes stay in the process's store.
        self.inline_below = inline_below
        #: Makes spans of requests, where the deployment has ``tracing``.
        self.traces: ReplicaTraces | None = None
        #: Names of the loggers of its code.
        self.loggers: tuple[str, ...] = ()
        #: Clients are shown the tracebacks of user code.
        self.debug = False
        #: What the names of its own modules mean in the arguments of calls.
        self.names: payloads.Names | None = None
        self.gather = gather
        #: The Dask clients of user code.
        self.clients: Clients | None = None
        self.pool = Pool(threads, f"{id}-def")
        #: Called when the user thread has ended, in it.
        self.on_end: Callable[[], None] = lambda: None
        #: Called, in any thread, with a request's id and the traceback of what user code raised.
        self.on_error: Callable[[str, str], object] = lambda request_id, text: None
        self._native = NativeThreads(threads)
        #: Seconds that ``shutdown()`` may take.
        self._patience = CLEAN_UP
        self._context = context
        #: What batched methods and multiplexed models run on.
        self.host = Host(self.loop, self.pool)
        context.run(enter_host, self.host)
        self._inbox = Mailbox(self.loop, self._on_mail, context)
        #: Answers of this tick of the loop.
        self._answers: list[tuple[Execution, Answer]] = []
        #: When answers last left.
        self._flushed = 0.0
        #: The ASGI application of the user's class, and what it has for its requests.
        self.app: ASGIApp | None = None
        self.state: dict[str, Any] = {}
        self._lifespan: Lifespan | None = None
        self._http: HttpAdapter | None = None
        self.thread = threading.Thread(target=self._run, name=f"{id}-user", daemon=True)
        self._main: Callable[[], Any] | None = None
        self._stopping = threading.Lock()

    # ------------------------------------------------------------------ life

    def start(self, main: Callable[[], Any]) -> None:
        """Start the thread; ``main`` is a coroutine function that runs first on its loop (construction)."""
        self._main = main
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        assert self._main is not None
        main = self._main

        def begin() -> None:
            self.loop.create_task(main())

        try:
            self.loop.call_soon(begin, context=self._context)
            self._run_until_stopped()
        finally:
            self.loop.run_until_complete(self._clean_up())
            # The user's object is let go on its own thread: its __del__ may expect it.
            self.instance = None
            self._context.run(_forget_instance)
            self.methods.clear()
            self._http = self.app = self._lifespan = None
            self.loop.close()
            self._native.leave()
            self.on_end()

    def _run_until_stopped(self) -> None:
        """Run the loop. What a task of user code raises or calls does not end it: requests would wait for ever."""
        while True:
            why = "stopped its event loop"
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                why = f"raised {error!r} in its event loop"
            if self._stopping.locked():
                return
            logger.error("User code of replica %s %s; it goes on", self.id, why)

    async def _clean_up(self) -> None:
        """Cancel what still runs; what an application began for itself has until it has shut down."""
        lifespan = self._lifespan
        if lifespan is not None:
            await self._cancel_all({task for task in asyncio.all_tasks() if _is_request(task)})
            await lifespan.stop()
        own = {asyncio.current_task(), None if lifespan is None else lifespan.task}
        await self._cancel_all(asyncio.all_tasks() - own)
        await self.host.close()
        await finish(self, self._patience)
        if self.clients is not None:
            await self.clients.close()
        try:
            await asyncio.wait_for(self.loop.shutdown_asyncgens(), CLEAN_UP)
        except asyncio.TimeoutError:
            logger.warning("Generators of replica %s do not end; they are dropped", self.id)

    async def _cancel_all(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Cancel tasks. User code that does not let itself be cancelled cannot keep the thread."""
        for task in tasks:
            task.cancel()
        if tasks and (await asyncio.wait(tasks, timeout=CLEAN_UP))[1]:
            logger.warning("User code of replica %s goes on after it was cancelled; it is dropped", self.id)

    def stop(self, patience: float = CLEAN_UP) -> None:
        """End the threads; what runs on them is cancelled (a ``def`` that runs cannot be). From any thread.

        ``shutdown()`` of the user's object, if it is a coroutine, has ``patience`` seconds.
        """
        if not self._stopping.acquire(blocking=False):
            # A second stop would end the cleaning up.
            return
        self._patience = patience
        self.pool.stop()
        # It may have ended already.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)

    def join(self, timeout: float) -> bool:
        """Wait for the user thread to end; False when user code still holds it."""
        self.thread.join(timeout)
        return not self.thread.is_alive()

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
        await self.in_pool(self.look_for_libraries)
        ingress = ingress_of(type(self.instance))
        if ingress is not None:
            # In the context that requests have.
            self.app = await self.spawn(build_app(ingress, self))
            self._lifespan = self._context.copy().run(Lifespan, self.app)
            await self._lifespan.start()
            self.state = self._lifespan.state

    async def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await a coroutine in the context that requests have (on the user loop)."""
        return await self.context().run(self.loop.create_task, coroutine)

    def context(self) -> contextvars.Context:
        """Return a copy of what every request starts from."""
        return self._context.copy()

    def on_the_loop(self, function: Callable[[], Any]) -> Any:
        """Call plain user code on the loop itself, with the Dask client of threads (on the user loop)."""
        with self.clients.on_the_loop() if self.clients is not None else contextlib.nullcontext():
            return self.context().run(function)

    def look_for_libraries(self) -> None:
        """See whether BLAS and its like have been loaded, and set their threads. From any thread."""
        if self._native.look():
            self.pool.prepare = self._enter_native
            # It may be about to end.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._native.enter)

    def _enter_native(self) -> None:
        self._native.enter()

    def open(self, door: Door) -> None:
        """Everything is there: requests may come."""
        self.door = door
        self._starts = Outbox(door.loop, self._inbox)
        self._told = Outbox(self.loop, door.mailbox)
        self._http = HttpAdapter(self)

    # ------------------------------------------------------------------ from the door

    def begin(self, execution: Execution) -> None:
        """Run an admitted request."""
        self._begin(execution, self._starts)

    def _begin(self, execution: Execution, starts: Outbox | Mailbox) -> None:
        call = execution.call
        if call.http is None and not call.attachments and not call.stream:
            method = self.methods.get(call.method)
            if method is not None and not method[1]:
                # A known `def`: nothing is to be done for it on the user loop.
                self.pool.submit(self._run_blocking, execution, method[0], self._context.copy())
                return
        starts.put((self._start, execution))

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
            self.send(execution, CANCELLED)
        elif call.http is not None:
            assert self._http is not None
            execution.task = self.loop.create_task(self._http.serve(execution))
        elif call.stream:
            execution.task = self.loop.create_task(serve_stream(self, execution))
        else:
            try:
                function, is_async = self.methods.find(call.method)
            except Exception as error:  # noqa: BLE001 - a `__getattr__` of the user may raise anything
                self.send(execution, answer_for(execution, error))
                return
            if is_async or call.attachments:
                execution.task = self.loop.create_task(self._run_async(execution, function, is_async))
            else:
                self.pool.submit(self._run_blocking, execution, function, self._context.copy())

    def _cancel(self, execution: Execution) -> None:
        if execution.on_cancel is not None:
            execution.on_cancel.set()
        if execution.inflow is not None:
            execution.inflow.cancel()
        task = execution.task
        if task is not None and not task.done():
            if self.clients is not None:
                self.clients.before_cancel()
            task.cancel()

            def answered(task: asyncio.Task[None]) -> None:
                # Cancelled before its first step, it never got to the point where it answers.
                if task.cancelled():
                    self.send(execution, CANCELLED)

            task.add_done_callback(answered)
        context = execution.user_context
        if context is not None:
            context.cancel(refuse=execution.blocking)

    # ------------------------------------------------------------------ running

    async def _run_async(self, execution: Execution, function: Callable[..., Any], is_async: bool) -> None:
        try:
            call = execution.call
            self.enter(execution)
            values = await fetch_all(execution) if call.attachments else ()
            if is_async:
                args, kwargs = self.arguments(execution, values)
                answer = self._result(await function(*args, **kwargs))
            else:
                answer = await self.in_pool(lambda: self._blocking_answer(execution, function, values))
        except BaseException as error:  # noqa: BLE001
            answer = answer_for(execution, error)
        self.send(execution, answer)

    def _run_blocking(self, execution: Execution, function: Callable[..., Any], context: contextvars.Context) -> None:
        try:
            answer = context.run(self._blocking_answer, execution, function, ())
        except BaseException as error:  # noqa: BLE001
            answer = answer_for(execution, error)
        execution.ended = time.monotonic()
        core = execution.core
        successor = core.next_after(execution) if core.waiting and not self.pool.stopped else None
        self.door.answer(core, [(execution, answer)], core.admission.running <= 1)
        if successor is not None:
            # Its loop may have ended.
            with contextlib.suppress(RuntimeError):
                self._begin(successor, self._inbox)

    def _blocking_answer(self, execution: Execution, function: Callable[..., Any], values: Sequence[Any]) -> Answer:
        self.enter(execution, blocking=True)
        args, kwargs = self.arguments(execution, values)
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
        execution.entered = now = time.monotonic()
        if execution.deadline is not None and now + execution.least >= execution.deadline:
            raise RequestTimeoutError(
                f"the request waited in replica {self.id} until too little was left to its deadline "
                f"({execution.deadline - now:.2g} s of at least {execution.least:.2g} s); it was not executed"
            )
        request_context.set(context)
        if self.traces is not None:
            self.traces.enter(execution, context)

    async def in_pool(self, function: Callable[[], Any]) -> Any:
        """Run a function on the pool, in a copy of the present context."""
        context = contextvars.copy_context()
        return await self.pool.run(lambda: context.run(function))

    async def in_pool_as_request(self, function: Callable[[], Any]) -> Any:
        """Run a function on the pool, in the context that requests have."""
        context = self.context()
        return await self.pool.run(lambda: context.run(function))

    def arguments(self, execution: Execution, values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Unpickle the arguments of a call; ``values`` are those that were fetched."""
        try:
            args, kwargs = payloads.loads(execution.parts, values, self.names)
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
        return Answer(Kind.RESULT, stored=self.door.store.put(parts), nbytes=nbytes)

    def send(self, execution: Execution, answer: Answer) -> None:
        """Hand an answer to the door, on the user loop: those of one tick together, unless it took long already."""
        execution.ended = now = time.monotonic()
        answers = self._answers
        answers.append((execution, answer))
        core = execution.core
        running = core.admission.running
        successor = core.next_after(execution) if core.waiting and not self.pool.stopped else None
        # One half of many is on its way while the other half runs, or caller and replica would take turns.
        halved = HALVES_ABOVE < running < HALVES_BELOW and 2 * len(answers) >= running
        if running <= 1 or halved or now - self._flushed > PROMPT:
            self._flush()
        elif len(answers) == 1:
            self.loop.call_soon(self._flush)
        if successor is not None:
            # After the answer: what the loop does next may take long.
            self.context().run(self._start, successor)

    def _flush(self) -> None:
        if self._answers:
            answers, self._answers = self._answers, []
            self._flushed = time.monotonic()
            self.door.answer(answers[0][0].core, answers, True)

    def tell(self, mail: Any) -> None:
        """Put something into the door's mailbox, with what else this tick of the user loop brings."""
        self._told.put(mail)

    def tell_at_once(self, mail: Any) -> None:
        """Put something into the door's mailbox, from a thread of the pool."""
        # Nobody is left who could read it.
        with contextlib.suppress(RuntimeError):
            self.door.mailbox.put(mail)


#: What tasks of requests run.
_REQUESTS = frozenset(run.__code__ for run in (HttpAdapter.serve, UserCode._run_async, serve_stream))


def _is_request(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "cr_code", None) in _REQUESTS


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _forget_instance() -> None:
    """Leave the user's object to its end: what was begun in this context may live on."""
    context = replica_context.get(None)
    if context is not None:
        replica_context.set(context._replace(servable_object=None))
