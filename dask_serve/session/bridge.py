"""Refs for those who know `concurrent.futures` only."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..response import DeploymentResponse

__all__ = ["Mirror"]


class Mirror(Future[Any]):
    """A `concurrent.futures.Future` that follows a ref; see `DeploymentResponse.as_concurrent_future`."""

    def __init__(self, ref: DeploymentResponse) -> None:
        super().__init__()
        self._ref = ref
        self._told = threading.Lock()
        ref.add_done_callback(self._follow)

    def cancel(self) -> bool:
        """Cancel the request; False when it has ended."""
        if not self._cancelled_here():
            return False
        self._ref.cancel()
        return True

    def _cancelled_here(self) -> bool:
        if not super().cancel():
            return False
        # Only this wakes those who wait, and only once.
        if self._told.acquire(blocking=False):
            self.set_running_or_notify_cancel()
        return True

    def _follow(self, ref: DeploymentResponse) -> None:
        if ref.cancelled():
            self._cancelled_here()
            return
        # It may have been cancelled on this side meanwhile.
        with contextlib.suppress(InvalidStateError):
            try:
                value = ref.take_in_thread(None)
            except BaseException as error:  # noqa: BLE001 - as the standard library's executors do
                self.set_exception(error)
            else:
                self.set_result(value)
