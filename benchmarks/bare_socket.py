"""What arrays are compared with: their bytes there and back through a loopback TCP socket, and nothing else.

``python -m benchmarks.bare_socket BYTES`` prints its port, takes one caller, and sends back all that it gets.
"""

from __future__ import annotations

import socket
import sys


def receive_into(peer: socket.socket, buffer: bytearray) -> bool:
    """Fill a buffer that is there already; False when the peer has closed."""
    view = memoryview(buffer)
    while view:
        count = peer.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def main() -> None:
    """Serve one caller until it closes."""
    buffer = bytearray(int(sys.argv[1]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with peer:
            while receive_into(peer, buffer):
                peer.sendall(buffer)


if __name__ == "__main__":
    main()
