"""mosec as one of the systems; runs in ``.venv-peers/mosec``. ``... mosec --port PORT`` is the server."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import mosec

from benchmarks.peers.interface import answer
from benchmarks.peers.served import Served, served


class Echo(mosec.Worker):  # type: ignore[misc]
    """Answers JSON with JSON."""

    def forward(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return what came; the worker has parsed it."""
        return {"output": data["input"]}


def opened() -> AbstractContextManager[Served]:
    """Start the server with its own defaults."""
    command = [sys.executable, "-m", __spec__.name, "--address", "127.0.0.1", "--port"]
    description = f"mosec {version('mosec')}, one worker process"
    return served(description, lambda port: [*command, str(port)], "/inference")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server = mosec.Server()
        server.append_worker(Echo)
        server.run()
    else:
        answer(opened)
