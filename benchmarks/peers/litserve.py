"""LitServe as one of the systems; runs in ``.venv-peers/litserve``. ``... litserve PORT`` is the server."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import litserve

from benchmarks.peers.interface import answer
from benchmarks.peers.models import BATCHES, CASE, SLEEP, SleepingModel, seconds_of
from benchmarks.peers.served import Served, served


class Echo(litserve.LitAPI):  # type: ignore[misc]
    """Answers JSON with JSON."""

    def setup(self, device: str) -> None:
        """There is no model."""

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Return what came; the server has parsed it."""
        return {"output": x["input"]}


class Sleeping(litserve.LitAPI):  # type: ignore[misc]
    """Takes its time."""

    def setup(self, device: str) -> None:
        """Make the model."""
        self.model = SleepingModel()

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Answer with the model."""
        return {"output": self.model.predict(x["input"])}


class Batched(litserve.LitAPI):  # type: ignore[misc]
    """Answers many at a time."""

    def setup(self, device: str) -> None:
        """There is no model."""

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what came."""
        time.sleep(seconds_of(x))
        return [{"output": each["input"]} for each in x]


def made(case: str) -> litserve.LitAPI:
    """Return what is served."""
    if case == BATCHES:
        return Batched(max_batch_size=64)
    return Sleeping() if case == SLEEP else Echo()


def opened() -> AbstractContextManager[Served]:
    """Start the server with its own defaults."""
    batches = ", max_batch_size=64" if os.environ.get(CASE) == BATCHES else ""
    description = f"LitServe {version('litserve')}, one worker process, one server process{batches}"
    return served(description, lambda port: [sys.executable, "-m", __spec__.name, str(port)], "/predict")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        # The file would be written into the repository.
        server = litserve.LitServer(made(os.environ.get(CASE, "")))
        server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
    else:
        answer(opened)
