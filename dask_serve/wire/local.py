"""The short way between processes of one machine: a Unix socket beside the door's port, a write costs a quarter there.

The name is derived from the incarnation of the process, in Linux's abstract namespace: nothing lies in a file system,
nothing is left behind, and whoever asks for it on another machine (or in another container) is told at once that it is
not there. Who connects has to prove itself as on the port.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

__all__ = ["connect_locally", "listen_locally", "widen"]

_EXISTS = sys.platform == "linux"

#: Bytes that may be under way in a Unix socket. Linux allows its administrator's limit instead (``wmem_max``, 208 KiB
#: as it comes), and doubles what was asked for, but not what a socket has by default.
_UNDER_WAY = 512 * 1024


def _name(process: str) -> str:
    return f"\0dask-serve-door-{process}"


def listen_locally(process: str) -> socket.socket | None:
    """Return the listening socket of a process's door; None where there is no such thing."""
    if not _EXISTS:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(_name(process))
        sock.setblocking(False)
    except OSError:
        sock.close()
        return None
    return sock


def connect_locally(process: str) -> socket.socket | None:
    """Return a socket connected to the door of a process on this machine; None when it is on another one."""
    if not _EXISTS:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        # Never waits: it is there and has room for one more caller, or it is not.
        sock.connect(_name(process))
    except OSError:
        sock.close()
        return None
    return sock


def widen(sock: Any) -> None:
    """Let more be under way in a Unix socket; others find out by themselves what their way can take.

    With what it has by default writer and reader wait for each other at every piece of a large payload.
    """
    if _EXISTS and sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNDER_WAY)
