"""Processes of a real cluster, started by command as people start them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dask_serve

__all__ = ["PACKAGE", "Processes", "free_port", "installed"]

PACKAGE = Path(dask_serve.__file__).parent


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def installed(directory: Path) -> dict[str, str]:
    """Return the environment of processes that find the package as if it were installed, and no test of this checkout.

    Parameters
    ----------
    directory : Path
        Where what they find is put, and what they save.
    """
    site = directory / "site"
    site.mkdir()
    (site / "dask_serve").symlink_to(PACKAGE)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DASK", "PYTEST"))},
        "PYTHONPATH": str(site),
        "XDG_STATE_HOME": str(directory / "state"),
    }


class Processes:
    """Starts commands in a directory of their own, each with a log, and leaves none behind.

    Parameters
    ----------
    directory : Path
        For logs and for what they save.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = installed(directory)

    def dask(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start ``dask COMMAND``."""
        return self.start(name, sys.executable, "-m", "dask", *command, **environment)

    def serve(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start ``dask serve COMMAND``, which only a package that is installed adds to ``dask``."""
        main = "from dask_serve.cli import serve; serve(prog_name='dask serve')"
        return self.start(name, sys.executable, "-c", main, *command, **environment)

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command; its output is appended to the log of that name."""
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.running[name]

    def log(self, name: str) -> str:
        """Return what a process has written so far."""
        return (self.directory / f"{name}.log").read_text()

    def end(self, name: str, timeout: float = 20.0) -> int:
        """End one in order, and return its exit code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout)

    def close(self) -> None:
        """End all of them, in order where they take less than some seconds."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
