"""What a replica calls of the user's class by itself: ``warm_up``, ``check_health``, ``shutdown`` and ``__del__``."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..exceptions import ServeError

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["Check", "finish", "warm_up"]

logger = logging.getLogger("dask_serve.replica")


def _hook(instance: Any, name: str) -> Callable[[], Any] | None:
    if instance is None or inspect.isfunction(instance):
        return None
    static = inspect.getattr_static(type(instance), name, None)
    return None if static is None or isinstance(static, property) else getattr(instance, name)


# -- the start


async def warm_up(user: UserCode) -> None:
    """Call ``warm_up()``, where requests will run: ``async def`` on the loop, ``def`` on a thread of the pool."""
    hook = _hook(user.instance, "warm_up")
    if hook is None:
        return
    if inspect.iscoroutinefunction(hook):
        await user.spawn(hook())
    else:
        await user.in_pool_as_request(hook)


# -- health


class Check:
    """The ``check_health()`` of one replica.

    An ``async def`` runs on the replica's loop, a ``def`` on a thread of its own, so that a replica whose pool is busy
    still is asked.

    Parameters
    ----------
    user : UserCode
    """

    def __init__(self, user: UserCode) -> None:
        self._user = user
        self._hook = _hook(user.instance, "check_health")
        self._is_async = inspect.iscoroutinefunction(self._hook)
        self._began = False
        self._running: asyncio.Future[Any] | None = None

    @property
    def exists(self) -> bool:
        """The user's class has one."""
        return self._hook is not None

    async def ask(self, timeout: float) -> str | None:
        """Return what is wrong, or None: it is well, or its loop is held up by other code, so that it cannot tell.

        From any event loop but the user's.
        """
        running = self._running
        if running is None or running.done():
            running = self._running = self._begin()
        try:
            answer = await asyncio.wait_for(asyncio.shield(running), timeout)
        except asyncio.TimeoutError:
            if not self._began:
                return None
            if self._is_async:
                # The next one begins anew.
                running.cancel()
            return f"check_health() has not returned within {timeout:g} s"
        except asyncio.CancelledError:
            if running.cancelled():
                return "check_health() was cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - user code
            return f"check_health() raised {type(error).__name__}: {error}"
        return "check_health() returned False" if answer is False else None

    def _begin(self) -> asyncio.Future[Any]:
        hook = self._hook
        assert hook is not None
        self._began = False
        context = self._user.context()
        loop = asyncio.get_running_loop()
        if self._is_async:

            async def call() -> Any:
                self._began = True
                return await hook()

            future = context.run(asyncio.run_coroutine_threadsafe, call(), self._user.loop)
            return asyncio.wrap_future(future)
        self._began = True
        answer: asyncio.Future[Any] = loop.create_future()
        thread = threading.Thread(
            target=_run, args=(hook, context, loop, answer), name=f"{self._user.id}-health", daemon=True
        )
        thread.start()
        return answer


def _run(
    hook: Callable[[], Any], context: contextvars.Context, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any]
) -> None:
    def settle(value: Any, error: BaseException | None) -> None:
        if answer.cancelled():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)
            # Nobody may wait any more.
            answer.exception()

    try:
        outcome: tuple[Any, BaseException | None] = (context.run(hook), None)
    except Exception as error:  # noqa: BLE001 - told where it is awaited
        outcome = (None, error)
    except BaseException as error:  # noqa: BLE001 - SystemExit and its like must not pass through an event loop
        outcome = (None, ServeError(f"{type(error).__name__}: {error}"))
    try:
        loop.call_soon_threadsafe(settle, *outcome)
    except RuntimeError:
        logger.debug("check_health() returned after the end")


# -- the end


async def finish(user: UserCode, patience: float) -> None:
    """Call ``shutdown()`` and then ``__del__()``, each at most once. On the user loop; does not raise."""
    instance = user.instance
    for name in ("shutdown", "__del__"):
        hook = _hook(instance, name)
        if hook is None:
            continue
        if name == "__del__" and not _disarm(instance) and not inspect.iscoroutinefunction(hook):
            # Python will call it.
            continue
        try:
            if inspect.iscoroutinefunction(hook):
                await asyncio.wait_for(user.spawn(hook()), patience)
            else:
                user.on_the_loop(hook)
        except asyncio.TimeoutError:
            logger.warning("%s() of replica %s was cancelled after %.1f s", name, user.id, patience)
        except BaseException:
            logger.exception("%s() of replica %s failed", name, user.id)


def _disarm(instance: Any) -> bool:
    """Keep Python from calling ``__del__`` again when the object goes; False where that cannot be had."""
    kind = type(instance)
    try:
        instance.__class__ = type(kind.__name__, (kind,), {"__slots__": (), "__del__": _nothing})
    except TypeError:
        return False
    return True


def _nothing(self: Any) -> None:
    pass
