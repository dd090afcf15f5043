"""The file of the desired state: where it is, who may read it, and how an unusable one is set aside."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import dask
from distributed.comm import get_address_host_port
from msgspec import Struct

from ..exceptions import ConfigError

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["StateFile", "claim", "configured", "default_file", "history_length", "set_aside", "why_not_trusted"]

#: What turns it off.
_OFF = ("none", "off", "false", "no", "")


class StateFile(Struct, frozen=True):
    """Where the desired state is saved."""

    #: None: nowhere.
    path: Path | None = None
    #: A scheduler that ends in order removes it.
    for_crashes: bool = False


def configured(given: str | None = None) -> StateFile:
    """Return the file that an option names, or else ``serve.state-file`` of Dask's configuration; ``none`` is none."""
    value = given if given is not None else dask.config.get("serve.state-file", None)
    if value is None or str(value).strip().lower() in _OFF:
        return StateFile()
    return StateFile(Path(str(value)).expanduser().absolute())


def default_file(scheduler: Scheduler, given: str | None = None) -> StateFile:
    """Return the file of a scheduler with the preload: as `configured`, or else one for its host and port.

    A scheduler whose port is any free one has none by default: the next one at that port is another one, and must
    not find what the last one left.
    """
    if given is not None or dask.config.get("serve.state-file", None) is not None:
        return configured(given)
    port, directory = _chosen_port(scheduler), _directory()
    if port is None or directory is None:
        return StateFile()
    return StateFile(directory / f"{socket.gethostname()}-{port}.sqlite", for_crashes=True)


def history_length() -> int:
    """Return how many versions of each application are kept: ``serve.history-length`` of Dask's configuration."""
    value = dask.config.get("serve.history-length", 10)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"serve.history-length = {value!r} is not valid: it is a whole number from 1 on")
    return value


def _chosen_port(scheduler: Scheduler) -> int | None:
    try:
        _, port = get_address_host_port(scheduler.address)
        chosen = [get_address_host_port(address)[1] for address in scheduler._start_address]
    except (ValueError, AttributeError):
        # In-process addresses have no ports.
        return None
    return int(port) if port in chosen else None


def _directory() -> Path | None:
    # Not the directory for temporary files: those are cleared of what has not changed for some days.
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    for path in (home, dask.config.get("temporary-directory", None) or tempfile.gettempdir()):
        directory = Path(path).expanduser() / f"dask-serve-{os.getuid()}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            continue
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    return None


def claim(path: Path) -> None:
    """Make the file where there is none, for its owner only; take rights away from others.

    Raises
    ------
    OSError
        It cannot be made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o055:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def why_not_trusted(path: Path) -> str:
    """Return why the code in the file must not be run, or "": whoever can write it can run code in the workers."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"others may write it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def set_aside(path: Path) -> Path:
    """Rename the file, and what SQLite keeps beside it, so that nobody takes it for the state; return its new name."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    target = path.with_name(f"{path.name}.unusable-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.unusable-{stamp}-{number}")
    path.rename(target)
    for suffix in ("-journal", "-wal", "-shm"):
        # A journal that stays behind would be played into the next file of this name.
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(target.with_name(target.name + suffix))
    return target
