"""BentoML as one of the systems; runs in ``.venv-peers/bentoml``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from tempfile import TemporaryDirectory

import bentoml

from benchmarks.peers.interface import answer
from benchmarks.peers.models import CASE, SLEEP, SleepingModel
from benchmarks.peers.served import Served, served


@bentoml.service
class Echo:
    """Answers JSON with JSON."""

    @bentoml.api
    async def predict(self, input: int) -> dict[str, int]:  # noqa: A002 - a field of the JSON
        """Return what came; the server has parsed it."""
        return {"output": input}


@bentoml.service
class Sleeping:
    """Takes its time."""

    def __init__(self) -> None:
        self.model = SleepingModel()

    @bentoml.api
    def predict(self, input: int) -> dict[str, int]:  # noqa: A002 - a field of the JSON
        """Answer with the model."""
        return {"output": self.model.predict(input)}


@contextmanager
def opened() -> Iterator[Served]:
    """Start the server with its own defaults."""
    service = "Sleeping" if os.environ.get(CASE) == SLEEP else "Echo"
    command = [sys.executable, "-m", "bentoml", "serve", f"benchmarks.peers.bentoml:{service}", "--host", "127.0.0.1"]
    description = f"BentoML {version('bentoml')}, one worker process"
    with TemporaryDirectory() as home:
        # It tells its makers of every start otherwise, and keeps files in the user's directory.
        os.environ.update(BENTOML_DO_NOT_TRACK="True", BENTOML_HOME=home)
        with served(description, lambda port: [*command, "--port", str(port)], "/predict") as running:
            yield running


if __name__ == "__main__":
    answer(opened)
