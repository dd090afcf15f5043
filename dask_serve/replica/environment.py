"""The environment of this process: packages, variables and directories that replicas in it were declared with.

A process has one, from its first replica to its end: what was imported stays imported. What is installed lies in a
directory of its own on the host, where all workers of the host that want the same find it.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ..exceptions import ServeError
from ..policy.environment import Environment
from .code import fetch_code
from .packages import Packages, cache_directory, locked

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["ProcessEnvironment", "prepare"]

logger = logging.getLogger("dask_serve.process")


class ProcessEnvironment:
    """What this process was made to be."""

    lock: ClassVar[threading.Lock] = threading.Lock()
    #: The environment that it has; None: none.
    current: ClassVar[Environment | None] = None
    #: It holds, or held, replicas.
    used: ClassVar[bool] = False
    #: Where directories of sessions are here: pairs of both paths.
    moved: ClassVar[list[tuple[str, str]]] = []
    #: Keep what it uses from being removed.
    holds: ClassVar[list[Any]] = []

    @classmethod
    def told(cls, error: str = "") -> bytes:
        """Return what the controller is told."""
        name = "" if cls.current is None else cls.current.id
        return msgspec.msgpack.encode({"environment": name, "used": cls.used, "error": error})


async def prepare(environment: bytes, worker: Worker) -> bytes:
    """Make this process one that has an environment, if it has no other one; on the worker's loop.

    Returns
    -------
    bytes
        What `dask_serve.controller.environments.Prepared` is decoded from.
    """
    wanted = msgspec.msgpack.decode(environment, type=Environment)
    current = ProcessEnvironment.current
    if current is not None or ProcessEnvironment.used:
        return ProcessEnvironment.told()
    try:
        why_not = _why_not(worker)
        if why_not:
            raise ServeError(why_not)
        files = {archive.key: await _fetch(worker, archive.key) for archive in wanted.archives}
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, _apply, wanted, files)
    except Exception as error:  # noqa: BLE001 - whatever it is, the start of the replica fails with it
        known = isinstance(error, (ServeError, OSError))
        text = str(error) if known else f"{type(error).__name__}: {error}"
        logger.error("The environment %s (%s) could not be prepared: %s", wanted.id, wanted.describe(), text)
        return ProcessEnvironment.told(f"its environment could not be prepared on worker {worker.address}: {text}")
    return ProcessEnvironment.told()


def _why_not(worker: Worker) -> str:
    from distributed import Scheduler

    if Scheduler._instances:
        return (
            "the worker shares its process with the scheduler (processes=False), which the environment would change "
            "too: use workers that are processes of their own"
        )
    return ""


async def _fetch(worker: Worker, key: str) -> bytes:
    reply, files = await fetch_code(lambda part: worker.scheduler.serve_code(revision=key, part=part))
    if files is None:
        raise ServeError(f"the controller has no files {key}: {reply.get('error')}")
    return bytes(memoryview(getattr(files, "data", files)))


def _apply(wanted: Environment, files: dict[str, bytes]) -> None:
    """Do what can fail first, then change the process."""
    with ProcessEnvironment.lock:
        if ProcessEnvironment.current is not None:
            return
        holds: list[Any] = []
        paths: list[str] = []
        moved: list[tuple[str, str]] = []
        root = cache_directory()
        for archive in wanted.archives:
            place = _unpacked(root, archive.key, files[archive.key], holds)
            paths.append(str(place))
            moved.append((archive.origin, str(place if archive is wanted.working_dir else place / archive.name)))
        if wanted.pip:
            packages = Packages(root, wanted.pip, wanted.env_vars)
            holds.append(packages.install())
            _check_loaded(packages.site)
            paths.append(str(packages.site))
        _change(wanted, paths)
        ProcessEnvironment.holds = holds
        ProcessEnvironment.moved = moved
        ProcessEnvironment.current = wanted
        logger.info("This process has the environment %s from now on (%s)", wanted.id, wanted.describe())


def _change(wanted: Environment, paths: list[str]) -> None:
    os.environ.update(wanted.env_vars)
    sys.path[:0] = paths
    importlib.invalidate_caches()
    if wanted.working_dir is not None:
        os.chdir(paths[len(wanted.py_modules)])


def _unpacked(root: Path, key: str, blob: bytes, holds: list[Any]) -> Path:
    """Unpack files once on this host; return where they are."""

    def unpack(directory: Path, _: Any) -> None:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            for entry in archive.infolist():
                made = archive.extract(entry, directory / "files")
                Path(made).chmod(entry.external_attr >> 16)
        (directory / "files").mkdir(exist_ok=True)

    directory, hold = locked(root, key, unpack)
    holds.append(hold)
    return directory / "files"


def _check_loaded(site: Path) -> None:
    """Refuse packages of which this process has loaded others: it would go on with those, or with a mixture."""
    clashes = []
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        for name in _modules_of(distribution):
            module = sys.modules.get(name)
            # Without a file it is a namespace, of which others may have other parts.
            file = getattr(module, "__file__", None)
            if file and not Path(file).is_relative_to(site):
                present = _version_of(distribution.metadata["Name"])
                clashes.append(f"{distribution.metadata['Name']}=={distribution.version} (loaded: {present})")
                break
    if clashes:
        raise ServeError(
            f"its process has loaded other versions already of {', '.join(sorted(clashes))}: Dask, dask_serve or a "
            "preload use them; install that where the workers start"
        )


def _modules_of(distribution: importlib.metadata.Distribution) -> Iterable[str]:
    files = distribution.files or ()
    names = {file.parts[0] if len(file.parts) > 1 else file.name.partition(".")[0] for file in files}
    return sorted(name for name in names if name.isidentifier())


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
