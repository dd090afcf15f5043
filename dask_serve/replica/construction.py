"""How a replica comes to be: its values fetched, its object made and configured, its application started, warmed up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..exceptions import ServeError
from ..levels import LEVELS, loggers_of
from .dask_keys import gather_keys
from .environment import ProcessEnvironment
from .hooks import Check, warm_up

if TYPE_CHECKING:
    from distributed import Worker

    from ..config import DeploymentOptions
    from ..context import ReplicaContext
    from .user import UserCode

__all__ = ["Construction", "observe"]


class Construction:
    """Makes and configures the user's object. On the user loop.

    Parameters
    ----------
    user : UserCode
    worker : distributed.Worker
    deployment : str
        Its name, for errors.
    on_worker : coroutine function
        Awaits a coroutine on the worker's loop.
    """

    def __init__(
        self,
        user: UserCode,
        worker: Worker,
        deployment: str,
        on_worker: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]],
    ) -> None:
        self._user = user
        self._worker = worker
        self._deployment = deployment
        self._on_worker = on_worker

    async def run(
        self, blob: bytes, keys: list[Any], replica: ReplicaContext, options: Callable[[], DeploymentOptions]
    ) -> None:
        """Do everything that comes before the first request.

        Parameters
        ----------
        blob : bytes
            Code and bound arguments.
        keys : list
            Dask keys that the arguments refer to.
        replica : ReplicaContext
            Without its object.
        options : callable
            Returns the options, which may change meanwhile.
        """
        from ..shipping import code

        values = await self._bound_values(keys) if keys else {}
        target, args, kwargs, modules = code.open_blob(blob, values, moved=ProcessEnvironment.moved)
        self._user.names = modules if modules.names else None
        await self.make((target, args, kwargs), replica, options)

    async def make(
        self,
        code: tuple[Any, tuple[Any, ...], dict[str, Any]],
        replica: ReplicaContext,
        options: Callable[[], DeploymentOptions],
    ) -> None:
        """Do all of that with a class or function and its arguments that are here."""
        target, args, kwargs = code
        self._user.loggers = loggers_of(target)
        await self._user.in_pool(lambda: observe(self._user, replica, options()))
        await self._user.construct(target, args, kwargs)
        if options().user_config is not None:
            await self.reconfigure(options().user_config)
        await self._user.enter_replica(replica._replace(servable_object=self._user.instance))
        await warm_up(self._user)
        check = Check(self._user)
        if check.exists:
            problem = await check.ask(options().health_check_timeout_s)
            if problem is not None:
                raise ServeError(f"the replica is not healthy from the start: {problem}")

    async def reconfigure(self, user_config: Any) -> None:
        """Hand ``user_config`` to the user's object."""
        reconfigure = getattr(self._user.instance, "reconfigure", None)
        if reconfigure is None:
            raise ServeError(
                f"deployment {self._deployment!r} has user_config={user_config!r} but no method "
                "reconfigure(user_config); define one"
            )
        assert self._user.clients is not None
        with self._user.clients.on_the_loop():
            result = reconfigure(user_config)
        if asyncio.iscoroutine(result):
            await result

    async def value_of(self, key: Any) -> Any:
        """Return the value of a Dask key that is an argument of a call."""
        try:
            return (await self._on_worker(gather_keys(self._worker, [key])))[key]
        except KeyError:
            raise ServeError(
                f"the value of the Dask key {key!r}, an argument, is no longer on the cluster; submit its task again"
            ) from None

    async def _bound_values(self, keys: list[Any]) -> dict[Any, Any]:
        try:
            values: dict[Any, Any] = await self._on_worker(gather_keys(self._worker, keys))
        except KeyError as error:
            raise ServeError(f"bound Dask values are no longer on the cluster: {error.args[0]}; deploy again") from None
        return values


def observe(user: UserCode, replica: ReplicaContext, options: DeploymentOptions) -> None:
    """Let a replica's code log from its level on, and make spans or none. From any thread.

    Raises
    ------
    ConfigError
        Spans are asked for, and OpenTelemetry is not installed here.
    """
    if not options.tracing:
        user.traces = None
    elif user.traces is None:
        # What nobody asks for is not loaded.
        from .tracing import ReplicaTraces

        user.traces = ReplicaTraces(replica.replica_id)
    LEVELS.set(replica.replica_id, (replica.app_name, replica.deployment), options.log_level, user.loggers)
