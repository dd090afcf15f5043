"""Results on their way out: what cannot leave a replica is told with its repair."""

from __future__ import annotations

from typing import Any

from distributed import Future

from ..exceptions import PayloadError
from ..response import DeploymentResponse, returning
from ..session.assigned import Assigned
from ..wire import payloads
from ..wire.frames import Buffer

__all__ = ["dump_item", "dump_result", "is_stream", "refuse_futures"]

#: Dask futures are pickled as a class of this module.
_MODULE = Future.__module__.encode()


def is_stream(value: object) -> bool:
    """Tell whether something is a generator, or an iterator of another kind."""
    return hasattr(type(value), "__anext__") or hasattr(type(value), "__next__")


def dump_result(value: Any) -> list[Buffer]:
    """Serialise what a method returned, as `dump_item` does."""
    try:
        return dump_item(value)
    except PayloadError:
        if is_stream(value):
            raise PayloadError(
                "comes in items: call the method with handle.options(stream=True) and iterate over what that returns"
            ) from None
        raise


def dump_item(value: Any) -> list[Buffer]:
    """Serialise what user code gives to its caller.

    Raises
    ------
    PayloadError
        It cannot be pickled, or it is or holds a ref or a Dask future: its value would be freed when the method
        returns, and the caller could not find it.
    """
    returning.active = True
    try:
        parts = payloads.dumps(value)
    finally:
        returning.active = False
    if _MODULE in parts[0]:
        # Something in there may be a future; looking is slower.
        return payloads.dumps(value, lambda kind: refuse_futures if kind is Future else None)
    return parts


def refuse_futures(value: Any) -> Any:
    """Raise `PayloadError` for a ref or a Dask future."""
    if isinstance(value, (DeploymentResponse, Assigned)):
        returning.refuse()
    if isinstance(value, Future):
        raise PayloadError(
            "is or holds a Dask future, which means nothing to the caller: return its value, as in "
            "`return future.result()`"
        )
