"""LitServe as one of the systems; runs in ``.venv-peers/litserve``. ``... litserve PORT`` is the server."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import litserve

from benchmarks.peers.interface import answer
from benchmarks.peers.served import Served, served


class Echo(litserve.LitAPI):  # type: ignore[misc]
    """Answers JSON with JSON."""

    def setup(self, device: str) -> None:
        """There is no model."""

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Return what came; the server has parsed it."""
        return {"output": x["input"]}


def opened() -> AbstractContextManager[Served]:
    """Start the server with its own defaults."""
    description = f"LitServe {version('litserve')}, one worker process, one server process"
    return served(description, lambda port: [sys.executable, "-m", __spec__.name, str(port)], "/predict")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        # The file would be written into the repository.
        litserve.LitServer(Echo()).run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
    else:
        answer(opened)
