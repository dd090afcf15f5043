"""Published data sets that requests refer to: looked up by a replica for its user code."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from distributed import Future, get_client
from starlette.exceptions import HTTPException

from .. import exceptions
from ..exceptions import ServeError
from ..policy.references import Reference
from ..session.collections import Parts

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["DataNotFoundError", "DataReferenceError", "DataSets"]

logger = logging.getLogger("dask_serve.replica")

#: Seconds for which a data set is known after it was looked up. Who publishes another one under its name is heard then.
FRESH = 1.0


class DataReferenceError(exceptions.DataReferenceError, HTTPException):
    """The same, as ASGI applications answer it by themselves."""

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, self.status, message)


class DataNotFoundError(exceptions.DataNotFoundError, HTTPException):
    """The same, as ASGI applications answer it by themselves."""

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, self.status, message)


class DataSets:
    """Looks data sets up, on the user loop.

    Parameters
    ----------
    user : UserCode
    allowed : callable
        Returns the names that requests may refer to.
    """

    def __init__(self, user: UserCode, allowed: Callable[[], Collection[str]]) -> None:
        self._user = user
        self._allowed = allowed
        self._known: dict[str, asyncio.Task[Parts]] = {}

    async def values(self, references: Sequence[Reference]) -> list[Any]:
        """Return the values, fetched from the workers that hold them.

        Raises
        ------
        DataNotFoundError
        ServeError
            The cluster has lost one.
        """
        return list(await asyncio.gather(*map(self._value, references)))

    async def futures(self, references: Sequence[Reference]) -> list[Future]:
        """Return futures of the values, of the client of the user loop."""
        return [await self._future(reference) for reference in references]

    async def _value(self, reference: Reference) -> Any:
        future = await self._future(reference)
        try:
            return await self._user.gather(future.key)
        except ServeError:
            # Another one was published while this one was looked up: its data went before it was asked for.
            self._known.pop(reference.dataset, None)
            again = await self._future(reference)
            if again.key == future.key:
                raise
            return await self._user.gather(again.key)

    async def _future(self, reference: Reference) -> Future:
        name = reference.dataset
        if name not in self._allowed():
            # No different from one that does not exist: strangers learn nothing.
            logger.info("A request refers to data set %r, which is not among the option datasets", name)
            raise _not_found(name)
        parts = await self._look_up(name)
        try:
            future = parts.at(reference.place)
        except IndexError:
            if reference.place:
                raise DataNotFoundError(f"data set {name!r} has no part {list(reference.place)}") from None
            message = f'data set {name!r} has parts: name one with "partition" (of an array "block")'
            raise DataReferenceError(message) from None
        if future is None:
            logger.warning("Data set %r is not on the cluster: publish what `client.persist` returned", name)
            raise _not_found(name)
        return future

    async def _look_up(self, name: str) -> Parts:
        task = self._known.get(name)
        if task is None:
            # In a context of its own: the request that comes first may be cancelled, and others wait as well.
            task = self._user.context().run(self._user.loop.create_task, _look_up(name))
            self._known[name] = task
            task.add_done_callback(functools.partial(self._on_found, name))
        return await asyncio.shield(task)

    def _on_found(self, name: str, task: asyncio.Task[Parts]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._forget(name, task)
        else:
            self._user.loop.call_later(FRESH, self._forget, name, task)

    def _forget(self, name: str, task: asyncio.Task[Parts]) -> None:
        if self._known.get(name) is task:
            del self._known[name]


async def _look_up(name: str) -> Parts:
    client = await get_client()
    try:
        data = await client.get_dataset(name)
    except KeyError:
        raise _not_found(name) from None
    return Parts(data)


def _not_found(name: str) -> DataNotFoundError:
    return DataNotFoundError(f"there is no data set {name!r} for requests")
