"""Load over HTTP while something happens: as much as is answered (`Full`), or at a rate (`Open`)."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time

from .load import Load, environment, own_command
from .open_loop import WARM_UP, command

#: Seconds: of a run at most, after which a request counts as hung, and of load before and after what happens.
LONGEST, PATIENCE, MARGIN = 120.0, 25.0, 1.0


class Running:
    """A generator that runs while the block does, a process of its own."""

    command: list[str]
    ends_by: signal.Signals

    def __enter__(self) -> Running:
        # Nobody reads while the block runs: a file holds what a pipe would not.
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=self.said, env=environment())
        time.sleep(WARM_UP + MARGIN)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                time.sleep(MARGIN)
                self.process.send_signal(self.ends_by)
                if code := self.process.wait(PATIENCE + 15.0):
                    raise RuntimeError(f"{' '.join(self.command)} failed with exit code {code}")
                self.said.seek(0)
                self.take(self.said.read())
        finally:
            self.process.kill()
            self.process.wait()
            self.said.close()

    def take(self, out: str) -> None:
        """Read the report."""
        raise NotImplementedError


class Full(Running):
    """Some connections, each of which asks again as soon as it is answered; a request that hangs has failed.

    wrk would not tell of those: it counts a time-out when the answer comes.

    Attributes
    ----------
    load : Load
        What the generator saw, once the block ended.
    """

    ends_by = signal.SIGINT

    def __init__(self, url: str, connections: int = 32) -> None:
        self.command = own_command(url, connections, LONGEST)
        self.load: Load

    def __enter__(self) -> Full:
        super().__enter__()
        return self

    def take(self, out: str) -> None:
        """Read the report."""
        self.load = Load(**json.loads(out))


class Open(Running):
    """Requests come at a rate, with ``timeout`` seconds to their deadlines (0: any number).

    Attributes
    ----------
    asked : list of (float, float, int)
        When each request was asked, the seconds that it took, and its status, once the block ended.
    """

    ends_by = signal.SIGTERM

    def __init__(self, url: str, rate: float, timeout: float = 0.0) -> None:
        self.command = command(url, rate, LONGEST, timeout, 1.0, PATIENCE)
        self.asked: list[tuple[float, float, int]] = []

    def __enter__(self) -> Open:
        super().__enter__()
        return self

    def take(self, out: str) -> None:
        """Read the report."""
        found = json.loads(out)
        for status, begun in found["begun"].items():
            self.asked += [(at, took, int(status)) for at, took in zip(begun, found["seconds"][status], strict=True)]

    @property
    def hung(self) -> int:
        """Requests without an answer."""
        return sum(status == 0 for _, _, status in self.asked)

    @property
    def failed(self) -> int:
        """Requests with another answer than 200, or whose connection broke."""
        return sum(status not in (0, 200) for _, _, status in self.asked)

    @property
    def why(self) -> str:
        """The answers that were none."""
        found = sorted({status for _, _, status in self.asked if status != 200})
        return f" (answers {', '.join(map(str, found))})" if found else ""

    def late(self, began: float, ended: float, share: float = 0.99) -> float:
        """Return the seconds that a share of what was asked in a time did not exceed."""
        taken = sorted(took for at, took, _ in self.asked if began <= at < ended)
        return taken[min(int(share * len(taken)), len(taken) - 1)]
