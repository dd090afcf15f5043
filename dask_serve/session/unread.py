"""Outcomes whose refs are gone."""

from __future__ import annotations

import logging

from ..exceptions import RequestCancelledError
from ..routing.outcome import Outcome
from ..routing.session import Session

__all__ = ["Discard"]

logger = logging.getLogger("dask_serve.refs")


class Discard:
    """What happens to an outcome that nobody will read."""

    __slots__ = ("_done", "_read", "_session")

    def __init__(self, session: Session, read: bool) -> None:
        self._session = session
        self._read = read
        self._done = False

    def __call__(self, outcome: Outcome) -> None:
        if self._done:
            return
        self._done = True
        if outcome.stored is not None:
            self._session.release(outcome.stored.process, outcome.stored.name)
        elif not self._read and (outcome.raised is not None or outcome.error is not None):
            if outcome.error is not None and outcome.error[0] == RequestCancelledError.__name__:
                return
            # When the session itself ends, it is the reason of the error.
            if not self._session.closed:
                self._session.later(_log_unread, outcome)


def _log_unread(outcome: Outcome) -> None:
    text = outcome.raised[0] if outcome.raised is not None else ": ".join(outcome.error[:2] if outcome.error else ())
    logger.warning("A call failed, and its ref was dropped before anybody read the error:\n%s", text)
