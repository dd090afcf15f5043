"""A session that reaches a scheduler and nothing else, as behind ``kubectl port-forward``.

Run as a program it is that session: in a network namespace of its own, whose only way out is a Unix socket in the file
system, it forwards a port to that socket, connects a Dask client to the port, and does what it is told. The port may
be a gateway's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

#: Makes a network namespace; only root may do so without a user namespace.
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]


def possible() -> bool:
    """Network namespaces can be made here."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def forward(server: socket.socket, dial: Callable[[], socket.socket]) -> None:
    """Connect each caller of a listening socket to what ``dial`` returns, in threads."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = server.accept()
                try:
                    other = dial()
                except OSError:
                    caller.close()
                    continue
                for pair in ((caller, other), (other, caller)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def connect_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def connect_client(port: int) -> Any:
    """Connect to a scheduler."""
    from distributed import Client

    return Client(f"tcp://127.0.0.1:{port}")


class FarSide:
    """That session, seen from the side of the cluster.

    ``connect`` is called there with the forwarded port, and returns the session's client as a context.
    """

    def __init__(self, scheduler: str, directory: Path, connect: Callable[[int], Any] = connect_client) -> None:
        host, _, port = scheduler.rpartition("://")[2].rpartition(":")
        path = str(directory / "way")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen()
        forward(self._server, lambda: socket.create_connection((host, int(port))))
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            self.process = subprocess.Popen(
                [*UNSHARE, sys.executable, __file__, path, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent.parent,)))},
            )
        self.connection.send_bytes(cloudpickle.dumps(connect))

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a function called there with the session's client and the arguments."""
        self.connection.send_bytes(cloudpickle.dumps((function, args)))

    def answer(self, timeout: float = 30.0) -> Any:
        """Return what it returned, or raise what it raised."""
        assert self.connection.poll(timeout), f"no answer from the far side within {timeout} s"
        failed, value = cloudpickle.loads(self.connection.recv_bytes())
        if failed:
            raise value
        return value

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        self.start(function, *args)
        return self.answer()

    def end(self, timeout: float = 15.0) -> None:
        """Let it close its client and exit."""
        self.connection.close()
        try:
            assert self.process.wait(timeout) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self._server.close()


def _raise_loopback() -> None:
    up, get, put = 0x1, 0x8913, 0x8914
    with socket.socket() as sock:
        request = struct.pack("16sH14s", b"lo", 0, b"")
        flags = struct.unpack("16sH14s", fcntl.ioctl(sock, get, request))[1]
        fcntl.ioctl(sock, put, struct.pack("16sH14s", b"lo", flags | up, b""))


def main(path: str, orders: int) -> None:
    _raise_loopback()
    server = socket.create_server(("127.0.0.1", 0))
    forward(server, lambda: connect_unix(path))
    connection = Connection(orders)
    with cloudpickle.loads(connection.recv_bytes())(server.getsockname()[1]) as client:
        while True:
            try:
                function, args = cloudpickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                answer = (False, function(client, *args))
            except BaseException as error:
                answer = (True, error)
            connection.send_bytes(cloudpickle.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
