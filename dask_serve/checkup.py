"""What `dask serve doctor` asks of each process: its versions, its clock, and whom it can reach."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

__all__ = ["PACKAGES", "facts", "knock", "knock_all"]

#: What has to fit between processes, by the module that has the version.
PACKAGES = ("dask_serve", "dask", "distributed", "msgspec", "cloudpickle", "tornado", "starlette", "uvicorn")
#: Seconds in which a port has to answer.
KNOCK = 2.0


def facts() -> dict[str, Any]:
    """Return what is known of this process; for `distributed.Client.run` too."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "executable": sys.executable,
        "time": time.time(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        # Found by the path only.
        try:
            return str(getattr(importlib.import_module(name), "__version__", "?"))
        except ImportError:
            return ""


async def knock(address: str, timeout: float = KNOCK) -> str:
    """Return why a TCP port cannot be reached from here, or ``""``.

    Parameters
    ----------
    address : str
        ``scheme://host:port``.
    timeout : float
        Seconds.
    """
    host, _, port = address.partition("://")[2].rpartition(":")
    try:
        connecting = asyncio.open_connection(host.strip("[]"), int(port))
        _, writer = await asyncio.wait_for(connecting, timeout)
    except asyncio.TimeoutError:
        return f"it does not answer within {timeout:g} s: a firewall or another network is between"
    except ConnectionRefusedError:
        return "nobody listens there"
    except (OSError, ValueError) as error:
        return str(error)
    writer.close()
    return ""


async def knock_all(addresses: Iterable[str]) -> dict[str, str]:
    """Return what `knock` does, by address."""
    addresses = list(addresses)
    return dict(zip(addresses, await asyncio.gather(*map(knock, addresses)), strict=True))
