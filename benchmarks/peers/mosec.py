"""mosec as one of the systems; runs in ``.venv-peers/mosec``. ``... mosec --port PORT`` is the server."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import mosec

from benchmarks.peers.interface import answer
from benchmarks.peers.models import BATCHES, CASE, seconds_of
from benchmarks.peers.served import Served, served


class Echo(mosec.Worker):  # type: ignore[misc]
    """Answers JSON with JSON."""

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return what came; the worker has parsed it."""
        return {"output": data["input"]}


class Batched(mosec.Worker):  # type: ignore[misc]
    """Answers many at a time."""

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what came."""
        time.sleep(seconds_of(data))
        return [{"output": each["input"]} for each in data]


def opened() -> AbstractContextManager[Served]:
    """Start the server with its own defaults."""
    command = [sys.executable, "-m", __spec__.name, "--address", "127.0.0.1", "--port"]
    batches = ", max_batch_size=64" if os.environ.get(CASE) == BATCHES else ""
    description = f"mosec {version('mosec')}, one worker process{batches}"
    return served(description, lambda port: [*command, str(port)], "/inference")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server = mosec.Server()
        if os.environ.get(CASE) == BATCHES:
            server.append_worker(Batched, max_batch_size=64)
        else:
            server.append_worker(Echo)
        server.run()
    else:
        answer(opened)
