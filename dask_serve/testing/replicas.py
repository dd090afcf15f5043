"""Replicas of this process: the real ones, whose code and arguments are simply here, behind a door without a socket."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import msgspec

from ..config import DeploymentOptions
from ..deployment import Application, methods
from ..exceptions import ConfigError
from ..ingress import ingress_of, routes_of
from ..policy.desired import deployment_id
from ..replica import process as _process  # noqa: F401 - else the first start would wait for it
from ..replica.door import Door, Visitor
from ..replica.unit import ReplicaUnit
from ..routing.fabric import Fabric
from ..routing.table import DeploymentEntry
from ..shipping.graph import Builder, applications_in
from ..wire.within import offer, withdraw
from .peers import Host

__all__ = ["Graph", "InProcessDoor", "Unit", "kept_routes"]


class InProcessDoor(Door):
    """A door that only this process can come to."""

    def start(self) -> None:
        """Let others in. The interpreter's switch interval stays as the tests have it."""
        self._thread.start()
        self.run(self._listen()).result()

    async def _listen(self) -> None:
        self._fabric = Fabric(self.loop, name=f"door-{self.process[:8]}", secret=self._secret)
        self.address = offer(self.process, self.loop, lambda: Visitor(self, self._secret))

    async def _close(self) -> None:
        withdraw(self.process)
        await super()._close()


class Unit(ReplicaUnit):
    """A replica whose class, or function, and arguments are those of the test.

    Attributes
    ----------
    error : BaseException or None
        Why it could not start.
    """

    def __init__(self, spec: dict[str, Any], host: Host, door: Door, code: Callable[[], Any]) -> None:
        super().__init__(spec, host)
        self.error: BaseException | None = None
        self._shared_door = door
        self._code = code

    async def _prepare(self) -> Door:
        try:
            await self._construction.make(self._code(), self._context, lambda: self.options)
        except BaseException as error:
            self.error = error
            raise
        return self._shared_door


class Graph(Builder):
    """The deployments of an application, none of them pickled.

    Attributes
    ----------
    found : dict
        Applications by the name of their deployment.
    """

    def __init__(self, app: str) -> None:
        super().__init__(app)
        self.found: dict[str, Application] = {}

    def _pack(self, application: Application, name: str) -> None:
        self.found[name] = application

    def entries(self) -> list[DeploymentEntry]:
        """Return the deployments of the routing table, all without replicas yet."""
        made = []
        for name, application in self.found.items():
            options = application.deployment.all_options
            made.append(
                DeploymentEntry(
                    id=deployment_id(self.app, name),
                    replicas=[],
                    max_ongoing_requests=options.max_ongoing_requests,
                    max_queued_requests=options.max_queued_requests,
                    request_timeout_s=options.request_timeout_s,
                    methods=methods(application.deployment.func_or_class),
                    body_limit=options.body_limit,
                    retries_on_loss=options.retries_on_loss,
                )
            )
        return made

    def code_of(self, name: str, handle: Callable[[str], Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the class or function of a deployment and its arguments, the applications among them as handles."""
        application = self.found[name]

        def bound(value: Any) -> Any:
            return _with_handles(value, lambda child: handle(self._names[id(child)][1]))

        kwargs = {key: bound(value) for key, value in application.kwargs.items()}
        return application.deployment.func_or_class, tuple(map(bound, application.args)), kwargs

    def unit(self, name: str, number: int, host: Host, *, door: Door, handle: Callable[[str], Any]) -> Unit:
        """Return a replica, which has not begun."""
        options: DeploymentOptions = self.found[name].deployment.all_options
        spec = {
            "id": f"{deployment_id(self.app, name)}/{number}-{host.scheduler.id[:6]}",
            "app": self.app,
            "deployment": name,
            "revision": "testing",
            "options": msgspec.msgpack.encode(options),
            "devices": list(range(-int(-options.gpus // 1))),
            "key": "",
        }
        return Unit(spec, host, door, lambda: self.code_of(name, handle))


# -- applications among arguments --------------------------------------------------------------------------------------


def _with_handles(value: Any, handle: Callable[[Application], Any]) -> Any:
    """Return ``value`` with handles for applications; what holds none is returned as it is, and never copied."""
    if not any(True for _ in applications_in(value)):
        return value
    kept: list[Any] = []
    buffer = io.BytesIO()
    _Copier(buffer, kept, handle).dump(value)
    buffer.seek(0)
    reader = pickle.Unpickler(buffer)
    reader.persistent_load = lambda index: kept[index]  # type: ignore[method-assign]
    return reader.load()


class _Copier(pickle.Pickler):
    """Copies the containers that lead to applications; all else is the same object on the other side."""

    def __init__(self, file: io.BytesIO, kept: list[Any], handle: Callable[[Application], Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._kept = kept
        self._handle = handle

    def persistent_id(self, value: Any) -> int | None:
        """Return where ``value`` is kept; None for containers of applications."""
        if isinstance(value, Application):
            value = self._handle(value)
        elif not isinstance(value, (type, str)) and any(True for _ in applications_in(value)):
            return None
        self._kept.append(value)
        return len(self._kept) - 1


# -- applications of web frameworks ------------------------------------------------------------------------------------


def kept_routes(graph: Graph) -> Callable[[], None]:
    """Return what puts the routes of the user's web applications back: replicas bind them to their instances.

    Raises
    ------
    ConfigError
        Two deployments have the same web application.
    """
    seen: dict[int, str] = {}
    saved: list[tuple[list[Any], list[tuple[Any, dict[str, Any]]]]] = []
    for name, application in graph.found.items():
        ingress = ingress_of(application.deployment.func_or_class)
        if ingress is None or ingress.is_builder:
            continue
        other = seen.setdefault(id(ingress.app), name)
        if other != name:
            raise ConfigError(
                f"deployments {other!r} and {name!r} have the same web application, which serve.testing.run cannot "
                "give to both without a copy: let a function make it, `@serve.ingress(build)`"
            )
        lists = {id(routes): routes for routes, _ in routes_of(ingress.app)}
        saved += [(routes, [(route, copy.copy(vars(route))) for route in routes]) for routes in lists.values()]

    def restore() -> None:
        for routes, before in saved:
            for route, attributes in before:
                vars(route).clear()
                vars(route).update(attributes)
            routes[:] = [route for route, _ in before]

    return restore
