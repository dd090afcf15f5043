"""Results on their way out: what cannot leave a replica is told with its repair."""

from __future__ import annotations

from typing import Any, NoReturn

from distributed import Future

from ..exceptions import PayloadError
from ..response import Assigned, DeploymentResponse
from ..wire import payloads
from ..wire.frames import Buffer

__all__ = ["dump_result", "refuse_futures"]

#: Refs and futures are pickled as the class in this module.
_MODULE = Future.__module__.encode()


def dump_result(value: Any) -> list[Buffer]:
    """Serialise what a method returned.

    Raises
    ------
    PayloadError
        It cannot be pickled, or it is or holds a ref or a Dask future: its value would be freed when the method
        returns, and the caller could not find it.
    """
    refuse_futures(value)
    parts = payloads.dumps(value)
    if _MODULE in parts[0]:
        # Something in there may be one; looking is slower.
        return payloads.dumps(value, dict.fromkeys((Future, DeploymentResponse, Assigned), refuse_futures))
    return parts


def refuse_futures(value: Any) -> Any:
    """Raise `PayloadError` for a ref or a Dask future."""
    if isinstance(value, (DeploymentResponse, Assigned)):
        _refuse("a ref", "`return await handle.remote(...)`, or in a `def` `return handle.remote(...).result()`")
    if isinstance(value, Future):
        _refuse("a Dask future", "`return future.result()` in a `def`")


def _refuse(what: str, repair: str) -> NoReturn:
    raise PayloadError(f"is or holds {what}, which means nothing to the caller: return its value, as in {repair}")
