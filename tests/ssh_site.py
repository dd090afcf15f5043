"""An sshd of a test's own: a free port of the loopback interface, keys made for it, none of the user's files."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import wait_until
from processes import free_port
from slurm_site import daemon

__all__ = ["PROGRAMS", "ssh_site"]

#: Debian's packages openssh-server and openssh-client.
PROGRAMS = ("sshd", "ssh-keygen")

CONFIGURATION = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
AllowUsers {user}
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


@contextlib.contextmanager
def ssh_site(directory: Path) -> Iterator[dict[str, Any]]:
    """Start sshd, and give what `asyncssh.connect` needs to log in there."""
    for name in ("host", "user"):
        command = [str(daemon("ssh-keygen")), "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True)
    port = free_port()
    file = directory / "sshd_config"
    file.write_text(CONFIGURATION.format(port=port, directory=directory, user=getpass.getuser()))
    with contextlib.suppress(PermissionError):
        # Without systemd nobody has made it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(daemon("sshd")), "-D", "-e", "-f", str(file)], stderr=log, stdin=subprocess.DEVNULL
        )

    def listens() -> bool:
        assert process.poll() is None, (directory / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        wait_until(listens)
        known = directory / "known_hosts"
        known.write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
        yield {
            "port": port,
            "known_hosts": str(known),
            "client_keys": [str(directory / "user")],
            "config": None,
        }
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)
