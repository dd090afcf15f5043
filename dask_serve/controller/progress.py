"""What `serve.run` tells while it waits: a bar that is drawn over itself, or lines in the log."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping

from ..session.terminal import is_watched, write
from .status import ApplicationStatus

__all__ = ["Progress", "draw"]

logger = logging.getLogger("dask_serve")

#: Cells of a bar, of all deployments together.
CELLS = 20
#: States of replicas in the order in which they are drawn, and how; what is missing is drawn as MISSING.
DRAWN = {"ready": "█", "starting": "▒", "draining": "░"}
MISSING = "·"


def draw(application: ApplicationStatus, width: int) -> str:
    """Return one line of at most ``width`` characters: for each deployment a bar, its replicas by state, and why."""
    cells = max(CELLS // max(len(application.deployments), 1), 4)
    parts = []
    for name, deployment in application.deployments.items():
        counts, target = deployment.counts, deployment.target
        told = [f"{counts.get('ready', 0)}/{target} ready"]
        told += [f"{number} {state}" for state, number in counts.items() if state != "ready" and number]
        message = deployment.message.strip().splitlines()
        parts.append(f"{name} {_bar(counts, target, cells)} {', '.join(told)}{f' ({message[-1]})' if message else ''}")
    line = " | ".join(parts)
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def _bar(counts: Mapping[str, int], target: int, cells: int) -> str:
    total = max(target, sum(counts.get(state, 0) for state in DRAWN), 1)
    bar = ""
    done = 0
    for state, cell in DRAWN.items():
        done += counts.get(state, 0)
        bar += cell * (done * cells // total - len(bar))
    return bar + MISSING * (cells - len(bar))


class Progress:
    """Tells on stderr, in a terminal or a notebook, how far a deployment is; elsewhere it logs.

    A terminal and a notebook both take a carriage return for the order to write over the line.
    """

    def __init__(self) -> None:
        self._last = ""
        #: Length of the bar that stands on the present line.
        self._drawn = 0

    def __call__(self, line: str, urgent: bool = False) -> None:
        """Tell a line; an urgent one, on which somebody has to act, is a warning where nobody watches."""
        if line == self._last:
            return
        self._last = line
        if is_watched():
            write(f"{self._gap()}dask_serve: {line}\n")
        else:
            logger.log(logging.WARNING if urgent else logging.INFO, "%s", line)

    def replicas(self, line: str, application: ApplicationStatus, urgent: bool = False) -> None:
        """Draw the bar of an application; where nobody watches, ``line`` says the same in words, if there is one."""
        if not is_watched():
            if line:
                self(line, urgent)
            return
        if urgent:
            self(line, urgent)
        # Carriage returns work within one line only, and the last column wraps in some terminals.
        bar = draw(application, shutil.get_terminal_size().columns - 1)
        write(f"\r{bar}{' ' * (self._drawn - len(bar))}")
        self._drawn = len(bar)

    def end(self) -> None:
        """Leave the bar as it stands."""
        write(self._gap())

    def _gap(self) -> str:
        gap, self._drawn = "\n" if self._drawn else "", 0
        return gap
