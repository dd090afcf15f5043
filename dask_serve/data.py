"""What requests refer to instead of bringing it."""

from __future__ import annotations

import asyncio
from typing import Any

from .exceptions import ServeError
from .policy.references import BadReferenceError, find, replace
from .replica.host import current_host
from .session.waiting import until_cancelled
from .wire.loops import running_loop

__all__ = ["resolve"]


def resolve(body: Any, *, lazy: bool = False, most: int = 100) -> Any:
    """Put parts of published data sets in the place of references to them.

    A request refers to a part of a persisted collection that was published (``client.publish_dataset``) with
    ``{"ref": {"dataset": "features", "partition": 17}}`` at any depth of its JSON; to a block of an array with
    ``"block": [0, 2]``; to a future, or a collection of one part, with neither. It may do so for the names in the
    option ``datasets`` of the deployment that calls this.

    Parameters
    ----------
    body : object
        What JSON became: dicts, lists and what is in them.
    lazy : bool, default False
        True: Dask futures instead of values. As arguments of another deployment's handle they let the call go to a
        replica where the data is.
    most : int, default 100
        How many different parts one request may refer to.

    Returns
    -------
    object
        The same with values, which come straight from the workers that hold them. They may be shared with others
        on that worker: do not write into them. An awaitable of it in coroutines.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment(datasets=["features"])
    ... class Model:
    ...     async def __call__(self, request):
    ...         body = await serve.resolve(await request.json())
    ...         return float(body["rows"].sum())

    Raises
    ------
    DataReferenceError
        A reference is not valid (400).
    DataNotFoundError
        There is no data set of that name for requests, or it has no such part (404).
    ServeError
        This code does not run in a replica.
    """
    host = current_host()
    if host is None or host.data_sets is None:
        raise ServeError("serve.resolve() works inside a replica only")
    resolving = _resolve(host.data_sets, body, lazy, most)
    loop = running_loop()
    if loop is host.loop:
        return resolving
    future = asyncio.run_coroutine_threadsafe(resolving, host.loop)
    if loop is not None:
        return asyncio.wrap_future(future)
    with until_cancelled(future.cancel):
        return future.result()


async def _resolve(data_sets: Any, body: Any, lazy: bool, most: int) -> Any:
    from .replica.datasets import DataReferenceError

    try:
        found = find(body, most)
        if not found:
            return body
        values = await (data_sets.futures(found) if lazy else data_sets.values(found))
        return replace(body, dict(zip(found, values, strict=True)))
    except BadReferenceError as error:
        raise DataReferenceError(str(error)) from None
