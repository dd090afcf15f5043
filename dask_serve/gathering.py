"""Waiting for many refs at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent import futures as concurrent
from typing import Any, Literal

from distributed import Future

from .exceptions import ConfigError, NotRunningError
from .response import DeploymentResponse
from .session.containers import LEFT_OUT, collect, or_none, rebuild
from .session.peers import current_client, current_worker
from .session.waiting import patiently, seconds_of, until_cancelled
from .wire.loops import run_on, running_loop

__all__ = ["gather"]

#: That many results that stay in the stores of workers are fetched at a time.
FETCHES = 16


def gather(
    *refs: Any,
    errors: Literal["raise", "skip"] = "raise",
    timeout: float | str | None = None,
    timeout_s: float | None = None,
) -> Any:
    """Wait for refs and return their values.

    Unlike ``client.gather`` this tells the scheduler nothing: values come straight from the replicas. Dask futures
    among the refs are gathered by their client.

    Parameters
    ----------
    *refs
        A ref, or lists, tuples, named tuples, sets and dicts, nested as you like, with refs in them (in dicts: as
        values). What is no ref is returned as it is. Of several arguments the values are returned in a list.
    errors : "raise" or "skip", default "raise"
        "raise": the first failure is raised as soon as it is known, and the other calls go on. "skip": refs that failed
        are left out of lists, tuples, sets and dicts; elsewhere they are None.
    timeout : float or str, optional
        How long to wait, in seconds or as text that Dask parses. It never cancels a call. ``timeout_s`` is an alias.

    Returns
    -------
    object
        The same containers with values. With an asynchronous client, in a coroutine of a replica, and in any loop that
        carries the calls itself (``sync=False``): an awaitable of that. A task that is cancelled while it awaits
        it cancels the calls.

    Examples
    --------
    >>> import dask_serve as serve
    >>> serve.gather([handle.remote(x) for x in range(3)])  # doctest: +SKIP
    [1, 2, 3]
    >>> serve.gather({"a": handle.remote(1), "b": [handle.remote(2)]})  # doctest: +SKIP
    {'a': 2, 'b': [3]}

    To have exceptions instead of values, wait first: ``distributed.wait(refs)``, then ``ref.exception()`` of each.

    Raises
    ------
    TimeoutError
        ``timeout`` has passed.
    Exception
        What the first call that failed raised, as `DeploymentResponse.result` does.
    """
    if errors not in {"raise", "skip"}:
        raise ConfigError(f'serve.gather: errors = {errors!r} is not valid: it is "raise" or "skip"')
    seconds = seconds_of(timeout if timeout_s is None else timeout_s)
    given: Any = refs[0] if len(refs) == 1 else list(refs)
    if isinstance(given, Iterator):
        given = list(given)
    several = len(refs) != 1
    found: list[Any] = []
    collect(given, found)
    gathering = _Gathering(found, errors == "skip")

    def build(values: list[Any]) -> Any:
        left = iter(values)
        if several:
            return [or_none(rebuild(value, left)) for value in given]
        return or_none(rebuild(given, left))

    if gathering.is_awaited():

        async def wait() -> Any:
            return build(await gathering.wait(seconds))

        return wait()
    return build(gathering.wait_in_thread(seconds))


class _Arrival:
    """Refs that are waited for: calls ``wake`` once all values are here, or, if that is enough, when one failed.

    It may do so more than once. Values in the stores of workers are fetched as they come, `FETCHES` at a time: a
    store that is full takes no more calls until some are.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop, optional
        Where to fetch; by default on the engine's.
    """

    def __init__(
        self,
        refs: list[DeploymentResponse],
        any_failure: bool,
        wake: Callable[[], object],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.fetched: list[_Fetched] = []
        self._any_failure = any_failure
        self._wake = wake
        self._loop = loop
        self._left: collections.deque[DeploymentResponse] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching = 0
        self._forgotten = False
        self._count = len(refs)
        # They may be settled in several threads; to take the next number is one step.
        self._arrived = itertools.count(1)
        self._callbacks = [(ref._local, functools.partial(self._on_settled, ref)) for ref in refs]
        for state, callback in self._callbacks:
            state.on_done(callback)

    def _on_settled(self, ref: DeploymentResponse) -> None:
        if not ref.is_elsewhere():
            self._on_arrived(ref._local.status != "finished")
            return
        try:
            loop = self._loop or ref._session.engine()[0].loop
            loop.call_soon_threadsafe(self._fetch, ref)
        except (NotRunningError, RuntimeError) as error:  # the client or the loop is closed
            self._on_fetched(ref, _Failed(error))

    def _on_arrived(self, failed: bool) -> None:
        if next(self._arrived) == self._count or (failed and self._any_failure):
            self._wake()

    def _on_fetched(self, ref: DeploymentResponse, value: Any) -> None:
        self.fetched.append((ref, value))
        self._on_arrived(isinstance(value, _Failed))

    def _fetch(self, ref: DeploymentResponse) -> None:
        self._left.append(ref)
        if self._fetching < FETCHES:
            self._fetching += 1
            task = asyncio.get_running_loop().create_task(self._fetch_some())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fetch_some(self) -> None:
        while self._left and not self._forgotten:
            ref = self._left.popleft()
            try:
                found: Any = await ref.find_stored()
            except Exception as error:  # noqa: BLE001
                found = _Failed(error)
            self._on_fetched(ref, found)
        # In the step that found nothing left: what comes next needs a task of its own.
        self._fetching -= 1

    def forget(self) -> None:
        """Nobody waits any more."""
        self._forgotten = True
        for state, callback in self._callbacks:
            if state.status == "pending":
                state._forget(callback)


class _Gathering:
    """Refs and Dask futures that are waited for together."""

    def __init__(self, found: list[Any], skip: bool) -> None:
        self._found = found
        self._skip = skip
        self._refs: list[DeploymentResponse] = [one for one in found if type(one) is DeploymentResponse]
        self._futures: list[Future] = []
        if len(self._refs) < len(found):
            self._futures = [one for one in found if type(one) is not DeploymentResponse]
        for ref in self._refs:
            ref._read = True

    def is_awaited(self) -> bool:
        """Blocking here would block the loop that brings the values."""
        owners: set[Any] = {ref._session for ref in self._refs}
        if any(session.is_asynchronous for session in owners) or any(one.client.asynchronous for one in self._futures):
            return True
        if running_loop() is None:
            return False
        if current_worker() is not None or any(ref._local.is_at_home() for ref in self._refs):
            return True
        client = None if self._found else current_client()
        return client is not None and bool(client.asynchronous)

    def wait_in_thread(self, seconds: float | None) -> list[Any]:
        """Block until the values are here."""
        deadline = None if seconds is None else time.monotonic() + seconds
        fetched: list[_Fetched] = []
        missing = self._missing()
        if missing:
            event = threading.Event()
            arrival = _Arrival(missing, not self._skip, event.set, None)
            try:
                with until_cancelled(event.set):
                    if not patiently(event.wait, seconds):
                        raise self._too_late(seconds)
            finally:
                arrival.forget()
            fetched = arrival.fetched
        coming = [asyncio.run_coroutine_threadsafe(coroutine, loop) for loop, coroutine in self._of_clients()]
        if coming:

            def wait(timeout: float | None) -> bool:
                return not concurrent.wait(coming, timeout).not_done

            with until_cancelled(*(future.cancel for future in coming)):
                if not patiently(wait, None if deadline is None else max(0.0, deadline - time.monotonic())):
                    for future in coming:
                        future.cancel()
                    raise self._too_late(seconds)
        return self._values([*fetched, *(pair for future in coming for pair in future.result())])

    async def wait(self, seconds: float | None) -> list[Any]:
        """Wait in the running loop until the values are here."""
        try:
            # What calls raised is raised outside: it may be a TimeoutError as well.
            fetched = await asyncio.wait_for(self._arrive(), seconds)
        except asyncio.TimeoutError:
            raise self._too_late(seconds) from None
        except asyncio.CancelledError:
            # Whoever awaits refs and is cancelled does not want the results any more.
            for ref in self._refs:
                ref.cancel()
            raise
        return self._values(fetched)

    async def _arrive(self) -> list[_Fetched]:
        loop = asyncio.get_running_loop()
        fetched: list[_Fetched] = []
        missing = self._missing()
        if missing:
            waiter = loop.create_future()

            def wake() -> None:
                # The loop may have been closed meanwhile.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(lambda: None if waiter.done() else waiter.set_result(None))

            arrival = _Arrival(missing, not self._skip, wake, loop)
            try:
                await waiter
            finally:
                arrival.forget()
            fetched = arrival.fetched
        return [*fetched, *[pair for its, coroutine in self._of_clients() for pair in await run_on(its, coroutine)]]

    def _missing(self) -> list[DeploymentResponse]:
        """Return what has to be waited for: nothing, where a failure is known that will be raised."""
        if self._failed():
            return []
        # One ref may be there several times.
        refs = {id(ref): ref for ref in self._refs}.values()
        return [ref for ref in refs if ref._local.status == "pending" or ref.is_elsewhere()]

    def _failed(self) -> bool:
        return not self._skip and any(ref._local.status in _FAILED for ref in self._refs)

    def _of_clients(self) -> Iterator[tuple[asyncio.AbstractEventLoop, _Fetching]]:
        """Return what gathers the Dask futures, and the loop where it has to run."""
        if self._futures and not self._failed():
            for client in {future.client: None for future in self._futures}:
                its = [future for future in self._futures if future.client is client]
                yield client.loop.asyncio_loop, _gather_futures(client, its, self._skip)

    def _values(self, fetched: list[_Fetched]) -> list[Any]:
        """Return the value of each ref and future, or raise the first failure."""
        of_futures: dict[Future, Any] = {}
        for one, value in fetched:
            if isinstance(value, _Failed):
                if not self._skip:
                    raise value.error
            elif isinstance(one, DeploymentResponse):
                one.decode(*value)
            else:
                of_futures[one] = value
        if self._failed():
            for ref in self._refs:
                if ref._local.status in _FAILED:
                    ref.value()
        if not self._futures and not self._skip:
            return [ref.value() for ref in self._refs]
        values: list[Any] = []
        for one in self._found:
            if type(one) is not DeploymentResponse:
                values.append(of_futures.get(one, LEFT_OUT))
            elif one._local.status in _FAILED or one.is_elsewhere():
                values.append(LEFT_OUT)
            else:
                values.append(one.value())
        return values

    def _too_late(self, seconds: float | None) -> TimeoutError:
        missing = sum(ref._local.status == "pending" for ref in self._refs)
        what = f"{missing} of {len(self._refs)} calls have not ended" if missing else "not all values have come"
        return TimeoutError(f"{what} within {seconds:g} s; the calls go on")


_FAILED = frozenset({"error", "cancelled"})


class _Failed:
    """Stands for a value that could not be had."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


#: A ref with what `DeploymentResponse.decode` takes, or a Dask future with its value; or either with a failure.
_Fetched = tuple[Future, Any]
_Fetching = Coroutine[Any, Any, list[_Fetched]]


async def _gather_futures(client: Any, futures: list[Future], skip: bool) -> list[_Fetched]:
    """Gather Dask futures, on the loop of their client."""
    if skip:
        await asyncio.gather(*[future._state.wait() for future in futures])
        futures = [future for future in futures if future.status == "finished"]
    try:
        return list(zip(futures, await client.gather(futures, asynchronous=True), strict=True))
    except Exception as error:  # noqa: BLE001
        return [(futures[0], _Failed(error))]
