"""What all operations of the controller have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..exceptions import ServeError

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["install", "operation"]

Op = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


def operation(method: Op) -> Op:
    """Return errors that callers can mend as data: the scheduler would log and pickle them."""

    @functools.wraps(method)
    async def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await method(*args, **kwargs)
        except ServeError as error:
            return {"error": [type(error).__name__, str(error)]}

    return answer


def install(scheduler: Scheduler, *owners: object) -> None:
    """Have the scheduler answer with the ``serve_...`` methods of ``owners``."""
    for owner in owners:
        for name in dir(type(owner)):
            if name.startswith("serve_"):
                scheduler.handlers[name] = getattr(owner, name)
