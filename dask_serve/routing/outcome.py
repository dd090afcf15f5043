"""What becomes of a request from Python."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

from msgspec import Struct

from .. import exceptions
from ..exceptions import BackPressureError, RequestCancelledError, RequestError
from ..wire import payloads
from ..wire.frames import Buffer
from ..wire.messages import Failure
from .calls import Outgoing

__all__ = ["Outcome", "PythonCall", "Stored"]


class Stored(NamedTuple):
    """A value that stays in the store of a worker's process."""

    process: str
    door: str
    name: str
    nbytes: int


class Outcome(Struct, frozen=True, gc=False):
    """What became of a request; exactly one field is set."""

    #: The serialised value.
    parts: Sequence[Buffer] | None = None
    #: Where the value is.
    stored: Stored | None = None
    #: An exception of user code: its traceback as text, and itself serialised.
    raised: tuple[str, Sequence[Buffer]] | None = None
    #: An error of ours: name of the class, message; of a refusal the seconds after which to try again.
    error: tuple[str, str] | tuple[str, str, float] | None = None

    def exception(self) -> BaseException | None:
        """Make the exception: a new one each time, so that none is kept alive by its own traceback."""
        if self.raised is not None:
            return payloads.load_exception(*self.raised)
        if self.error is not None:
            kind = getattr(exceptions, self.error[0], RequestError)
            error: BaseException = kind(*self.error[1:])
            return error
        return None


class PythonCall(Outgoing):
    """A request from Python, on its caller's side.

    Attributes
    ----------
    status : "pending", "finished", "error" or "cancelled"
    outcome : Outcome or None
        Set with the status, once nothing more comes.
    home : asyncio.AbstractEventLoop or None
        The router's loop, where that is not the background one, with the thread it runs in: waiters there are woken
        without a detour.
    request : RequestContext or None
        The request in which the call was made: it cancels the call with itself.
    keep : callable or None
        Keeps Dask futures among the arguments alive for as long as the request; called at its end.
    """

    __slots__ = ("home", "keep", "outcome", "request", "status", "thread")

    # Subclasses set them: one more `__init__` would show in each request.
    status: str
    outcome: Outcome | None
    home: asyncio.AbstractEventLoop | None
    thread: int
    request: Any
    keep: Callable[[], None] | None

    def settle(self, status: str, outcome: Outcome) -> bool:
        """Set the outcome; False when it was set already."""
        raise NotImplementedError

    def on_error(self, failure: Failure, parts: Sequence[Buffer]) -> None:
        if failure.error:
            status = "cancelled" if failure.error == "RequestCancelledError" else "error"
            told = (failure.error, failure.message)
            after = failure.retry_after
            self.settle(status, Outcome(error=told if after is None else (*told, after)))
        else:
            self.settle("error", Outcome(raised=(failure.message, parts)))

    def fail(self, error: RequestError) -> None:
        status = "cancelled" if isinstance(error, RequestCancelledError) else "error"
        told = (type(error).__name__, str(error))
        if isinstance(error, BackPressureError):
            self.settle(status, Outcome(error=(*told, error.retry_after_s)))
        else:
            self.settle(status, Outcome(error=told))

    def is_at_home(self) -> bool:
        """The loop that carries the call runs in this thread."""
        return self.home is not None and self.thread == get_ident() and self.home.is_running()

    def _let_go(self) -> None:
        """Let go of what belongs to it while it runs."""
        if self.request is not None:
            self.request.forget(self)
            self.request = None
        keep, self.keep = self.keep, None
        if keep is not None:
            keep()
