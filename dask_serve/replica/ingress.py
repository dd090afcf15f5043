"""An ASGI application in a replica: built, its routes bound to the instance, started, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message

from ..context import replica_context
from ..exceptions import ConfigError, ServeError
from ..ingress import Ingress, is_asgi, methods_by_id, owner_of, routes_of
from ..shipping.apps import declaration

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["Lifespan", "build"]

logger = logging.getLogger("dask_serve.replica")

#: Seconds that an application may take to shut down.
SHUTDOWN = 10.0


async def build(ingress: Ingress, user: UserCode) -> ASGIApp:
    """Return the application of a deployment, with those of its routes that are methods bound to the instance."""
    app = ingress.app
    if ingress.is_builder:
        arguments = (user.instance,) if ingress.takes_instance else ()
        with _module_of(ingress.app):
            app = await user.construction(functools.partial(ingress.app, *arguments))
        if not callable(app) or not is_asgi(app):
            raise ConfigError(
                f"the function {getattr(ingress.app, '__name__', ingress.app)!r}, given to @serve.ingress, returned "
                f"{app!r} and no ASGI application"
            )
    app = _whole(app)
    _bind(app, type(user.instance))
    return app  # type: ignore[no-any-return]


_lock = threading.Lock()
#: Modules that stand in for those whose code came by value, and how many builders need each.
_stand_ins: dict[str, int] = {}


@contextlib.contextmanager
def _module_of(builder: Any) -> Iterator[None]:
    """Let frameworks that look up the module of a handler find one, although its code came by value."""
    name = getattr(builder, "__module__", None)
    if not inspect.isfunction(builder) or name is None or (name in sys.modules and name not in _stand_ins):
        yield
        return
    with _lock:
        _stand_ins[name] = _stand_ins.get(name, 0) + 1
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(builder.__globals__)
    try:
        yield
    finally:
        with _lock:
            _stand_ins[name] -= 1
            if not _stand_ins[name]:
                del _stand_ins[name]
                sys.modules.pop(name, None)


def _whole(app: Any) -> Any:
    """Make an application of a router of FastAPI, whose routes need one."""
    routing = sys.modules.get("fastapi.routing")
    if routing is None or not isinstance(app, routing.APIRouter):
        return app
    from fastapi import FastAPI

    whole = FastAPI()
    whole.include_router(app)
    return whole


# -- routes that are methods -------------------------------------------------------------------------------------------


def _bind(app: Any, kind: type) -> None:
    """Give the methods among the routes their ``self``, and drop those of other classes."""
    names = methods_by_id(kind)
    for routes, route in routes_of(app):
        endpoint = getattr(route, "endpoint", None)
        if not callable(endpoint):
            continue
        function = inspect.unwrap(endpoint)
        name = names.get(id(endpoint)) or names.get(id(function))
        if name is not None:
            route.__init__(**{**declaration(route), "endpoint": _view(name, function)})
        elif owner_of(endpoint) is not None:
            # The application is that of another class too.
            routes.remove(route)
    changed = getattr(getattr(app, "router", None), "_mark_routes_changed", None)
    if changed is not None:
        changed()


def _view(name: str, function: Any) -> Callable[..., Any]:
    """Return a function that calls a method of the replica's instance; its signature has no ``self``."""

    def method() -> Any:
        # By name, so that a subclass has its say.
        return getattr(replica_context.get().servable_object, name)

    endpoint: Callable[..., Any]
    call = function if inspect.isroutine(function) else function.__call__
    if inspect.isasyncgenfunction(call):

        async def endpoint(*args: Any, **kwargs: Any) -> Any:
            async with contextlib.aclosing(method()(*args, **kwargs)) as items:
                async for item in items:
                    yield item

    elif inspect.isgeneratorfunction(call):

        def endpoint(*args: Any, **kwargs: Any) -> Any:
            yield from method()(*args, **kwargs)

    elif inspect.iscoroutinefunction(call):

        async def endpoint(*args: Any, **kwargs: Any) -> Any:
            return await method()(*args, **kwargs)

    else:

        def endpoint(*args: Any, **kwargs: Any) -> Any:
            return method()(*args, **kwargs)

    view: Any = functools.wraps(function)(endpoint)
    view.__signature__ = _without_self(function)
    return view  # type: ignore[no-any-return]


def _without_self(function: Any) -> inspect.Signature:
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # noqa: BLE001 - an annotation that only type checkers understand
        signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


# -- life --------------------------------------------------------------------------------------------------------------


class Lifespan:
    """The conversation about an application's start and end.

    Attributes
    ----------
    state : dict
        What the application left there at its start; each request's scope has a copy.
    task : asyncio.Task
        Runs as long as the application does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self._started = False
        self._error: BaseException | None = None
        self.task = asyncio.get_running_loop().create_task(self._converse())

    async def start(self) -> None:
        """Wait until the application has started.

        Raises
        ------
        ServeError
            It said that it could not.
        """
        self._inbox.put_nowait({"type": "lifespan.startup"})
        message = await self._heard.get()
        if message is None:
            # Applications need not know of lifespans; those raise, or return.
            logger.debug("An application takes no lifespan events: %r", self._error)
        elif message["type"] == "lifespan.startup.failed":
            raise ServeError(f"the application could not start: {message.get('message') or 'it did not say why'}")
        else:
            self._started = True

    async def stop(self) -> None:
        """Tell the application that it ends, and wait until it has."""
        if not self._started or self.task.done():
            self.task.cancel()
            return
        self._started = False
        self._inbox.put_nowait({"type": "lifespan.shutdown"})
        try:
            message = await asyncio.wait_for(self._heard.get(), SHUTDOWN)
        except asyncio.TimeoutError:
            logger.warning("An application did not shut down within %g s; it is dropped", SHUTDOWN)
        else:
            if message is None or message["type"] == "lifespan.shutdown.failed":
                logger.error("An application failed to shut down: %s", (message or {}).get("message") or self._error)
        self.task.cancel()

    async def _converse(self) -> None:
        async def send(message: Message) -> None:
            self._heard.put_nowait(message)

        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._inbox.get, send)
        except BaseException as error:  # noqa: BLE001 - told above
            self._error = error
        finally:
            # It says nothing more.
            self._heard.put_nowait(None)
