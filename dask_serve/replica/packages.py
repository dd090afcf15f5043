"""Directories that the workers of a host share: packages that pip installed, and files that sessions sent.

Each is made once, by one process, under a lock that the system gives back when the process ends; those who use it hold
the same lock together, and what nobody used for a month is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import dask

from ..exceptions import ServeError

__all__ = ["INSTALL_TIMEOUT", "Packages", "cache_directory", "locked"]

#: Seconds that pip may take, and that others wait for it.
INSTALL_TIMEOUT = 600.0
#: Seconds without use after which a directory is removed.
UNUSED = 30 * 86400.0
#: Lines of pip's output that an error has.
LINES = 12

_DONE = "complete"


def cache_directory() -> Path:
    """Return where environments of this host lie; it is made, for this user only.

    Raises
    ------
    ServeError
        It cannot be made, or belongs to somebody else, who could put code there.
    """
    chosen = dask.config.get("serve.environments-directory", None)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~") / ".cache")
    path = Path(chosen) if chosen else home / "dask-serve" / "environments"
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = path.stat().st_uid
    except (OSError, RuntimeError) as error:
        raise ServeError(
            f"the directory {path} for environments cannot be made ({error}); set serve.environments-directory in "
            "Dask's configuration of the workers"
        ) from None
    if owner != os.getuid():
        raise ServeError(f"the directory {path} for environments belongs to another user")
    return path


def locked(
    root: Path, key: str, make: Callable[[Path, IO[bytes]], None], timeout: float = INSTALL_TIMEOUT
) -> tuple[Path, IO[bytes]]:
    """Return a directory that is complete, made here if it has to be, and what keeps it from being removed.

    Parameters
    ----------
    root : Path
        `cache_directory`.
    key : str
        Names the content.
    make : callable
        Fills the directory, which is empty. Processes that it starts may inherit the lock.
    timeout : float
        Seconds to wait for another process that makes it.

    Raises
    ------
    ServeError
        Another process has been making it for too long.
    """
    directory = root / key
    lock = (root / f"{key}.lock").open("ab")
    deadline = time.monotonic() + timeout
    while True:
        if (directory / _DONE).exists() and _take(lock, fcntl.LOCK_SH):
            # It may have been removed before there was the lock.
            if (directory / _DONE).exists():
                (directory / _DONE).touch()
                return directory, lock
        elif _take(lock, fcntl.LOCK_EX):
            if not (directory / _DONE).exists():
                _make(directory, lock, make)
                _remove_unused(root)
        elif time.monotonic() > deadline:
            lock.close()
            raise ServeError(f"another process of this host has been making {directory} for {timeout:g} s")
        else:
            time.sleep(0.05)
        fcntl.flock(lock, fcntl.LOCK_UN)


def _make(directory: Path, lock: IO[bytes], make: Callable[[Path, IO[bytes]], None]) -> None:
    # What is left of somebody who did not come to the end.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        make(directory, lock)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        lock.close()
        raise
    (directory / _DONE).touch()


def _take(lock: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unused(root: Path) -> None:
    for done in root.glob(f"*/{_DONE}"):
        with contextlib.suppress(OSError):
            if time.time() - done.stat().st_mtime < UNUSED:
                continue
            with (root / f"{done.parent.name}.lock").open("ab") as lock:
                if _take(lock, fcntl.LOCK_EX):
                    done.unlink()
                    shutil.rmtree(done.parent, ignore_errors=True)


class Packages:
    """What pip installs for an environment, beside what the worker's own Python has.

    Parameters
    ----------
    root : Path
        `cache_directory`.
    requirements : list of str
        Lines of a requirements file.
    variables : dict of str to str
        Environment variables that pip gets too: it may read its own from them.
    """

    def __init__(self, root: Path, requirements: list[str], variables: dict[str, str]) -> None:
        self._root = root
        self._variables = variables
        self._requirements = requirements
        parents = [Path(path) for path in _parents()]
        content = [
            *requirements,
            sys.version,
            sysconfig.get_platform(),
            # What is missing depends on what is there.
            *(f"{path} {path.stat().st_mtime_ns}" for path in parents if path.is_dir()),
        ]
        self.key = "packages-" + hashlib.blake2b("\n".join(content).encode(), digest_size=12).hexdigest()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        #: Where modules are.
        self.site = root / self.key / "lib" / version / "site-packages"

    def install(self) -> IO[bytes]:
        """Have it installed; return what keeps it from being removed. Blocks.

        Raises
        ------
        ServeError
            pip failed, with its last lines, or took too long.
        """
        return locked(self._root, self.key, self._make)[1]

    def _make(self, directory: Path, lock: IO[bytes]) -> None:
        has_pip = importlib.util.find_spec("pip") is not None
        self._run(
            [sys.executable, "-m", "venv", *(["--without-pip"] if has_pip else []), str(directory)], directory, lock
        )
        # A virtual environment of a virtual environment would see only the packages of the first Python.
        (self.site / "_parents.pth").write_text("\n".join(_parents()))
        requirements = directory / "requirements.txt"
        requirements.write_text("\n".join(self._requirements) + "\n")
        python = str(directory / "bin" / "python")
        pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        self._run([python, *pip, "-r", str(requirements)], directory, lock)
        (self.site / "_parents.pth").unlink()

    def _run(self, command: list[str], directory: Path, lock: IO[bytes]) -> None:
        log = directory / "install.log"
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, **self._variables},
                # Nobody begins anew as long as it runs, should this process die.
                pass_fds=(lock.fileno(),),
            )
            try:
                code = process.wait(INSTALL_TIMEOUT)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = -signal.SIGKILL
        if code != 0:
            why = f"exit code {code}" if code >= 0 else f"stopped after {INSTALL_TIMEOUT:g} s"
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LINES:]
            text = "\n  ".join(lines)
            raise ServeError(f"`{' '.join(command[1:4])} {', '.join(self._requirements)}` failed ({why}):\n  {text}")


def _parents() -> list[str]:
    """Return where this Python finds installed packages."""
    return [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
