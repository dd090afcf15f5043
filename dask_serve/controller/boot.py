"""The document that a scheduler starts with."""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec import Struct

from ..exceptions import ServeError
from .child import Deployer, Outcome, Task

__all__ = ["Boot", "BootDocument"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that its modules may take to be imported.
TIMEOUT = 600.0


class BootDocument(Struct, frozen=True, kw_only=True):
    """A document, as it was when the scheduler started.

    Attributes
    ----------
    path : str
        Where it was.
    text : str
        What it says.
    time : float
        When it was changed last, in seconds since 1970.
    http : bool
        Whether its options of proxies have still to be applied.
    trouble : str
        What is wrong with it; empty if nothing is.
    """

    path: str
    text: str = ""
    time: float = 0.0
    http: bool = False
    trouble: str = ""


class Boot:
    """Deploys it once.

    An application that the state file brought back, and that was deployed after the document was changed last, is
    left as it is: somebody wanted it so.

    Parameters
    ----------
    document : BootDocument
        The document.
    deployer : Deployer
        Does it.
    on_change : callable
        Called when ``message`` has changed.
    """

    def __init__(self, document: BootDocument, deployer: Deployer, on_change: Callable[[], None]) -> None:
        #: What went wrong, for the status.
        self.message = document.trouble and f"{document.path} was not deployed: {document.trouble}"
        self._document = document
        self._deployer = deployer
        self._on_change = on_change

    async def run(self) -> None:
        """Deploy it; what goes wrong is logged, and stands in the status. Nobody tries again."""
        document = self._document
        if not document.trouble:
            task = Task(document=document.text, name=document.path, http=document.http, since=document.time)
            try:
                outcome = await self._deployer.run(task, TIMEOUT, queue=True)
            except ServeError as error:
                self.message = str(error)
            else:
                self._tell(outcome)
        if self.message:
            logger.error("%s\nMend it, and deploy it with `dask serve deploy`, or start again", self.message)
            self._on_change()

    def _tell(self, outcome: Outcome) -> None:
        if outcome.error:
            self.message = outcome.message
            return
        names = ", ".join(map(repr, sorted(outcome.versions))) or "no applications"
        logger.info("%s is deployed: %s", self._document.path, names)
        if outcome.kept:
            logger.warning(
                "%s is older than what was saved of %s, which stays as it is; `dask serve deploy` replaces it",
                self._document.path,
                ", ".join(map(repr, outcome.kept)),
            )
