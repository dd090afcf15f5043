"""What HTTP is compared with: the same application on one uvicorn process.

``python -m benchmarks.bare_uvicorn FD NAME`` serves an application of `web` on an inherited listening socket, and
prints a line when it accepts.
"""

from __future__ import annotations

import socket
import sys

import uvicorn

from .web import APPS


class Server(uvicorn.Server):
    """Tells its parent that it accepts."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does."""
        await super().startup(sockets)
        print("ready", flush=True)


def main() -> None:
    """Serve on an inherited socket, as a proxy does: uvicorn's ``--fd`` would lose TCP_NODELAY."""
    descriptor, name = sys.argv[1:]
    config = uvicorn.Config(APPS[name], log_level="warning", access_log=False)
    Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main()
