"""Documents are deployed by a process of their own: the controller imports no user code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from ..exceptions import ConflictError, ServeError, StartTimeoutError
from .process import environment

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["Deployer", "Mistake", "Outcome", "Task"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds within which the scheduler must answer its child.
CONNECT_WITHIN = 30.0
#: Bytes of the longest answer.
LONGEST = 16 * 2**20


class Task(Struct, frozen=True, kw_only=True):
    """What a child is to do.

    Attributes
    ----------
    document : str
        YAML or JSON.
    name : str
        Of the document, for messages.
    scheduler : str
        Address.
    security : dict
        Dask's certificates; empty: none.
    prune, dry_run : bool
        As of ``dask serve deploy``.
    http : bool
        Whether the document's options of proxies are meant too.
    since : float or None
        Leave out what was deployed after that time, in seconds since 1970.
    """

    document: str
    name: str
    scheduler: str = ""
    security: dict[str, Any] = {}
    prune: bool = False
    dry_run: bool = False
    http: bool = True
    since: float | None = None
    connect_timeout: float = CONNECT_WITHIN


class Mistake(Struct, frozen=True):
    """One of the mistakes in a document."""

    line: int
    column: int
    field: str
    message: str


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a child did.

    Attributes
    ----------
    changes : list of str
        What changed, or would change, in words.
    versions, before : dict
        Versions of the applications, now and before.
    deleted, kept : list of str
        Applications that were deleted, and those that were left as they are because they are newer.
    url : str
        Where HTTP is served.
    error, message : str
        The class of the error, and what it says; empty: there was none.
    problems : list of Mistake
        What is wrong with the document.
    """

    changes: list[str] = []
    versions: dict[str, int] = {}
    before: dict[str, int] = {}
    deleted: list[str] = []
    kept: list[str] = []
    url: str = ""
    error: str = ""
    message: str = ""
    problems: list[Mistake] = []


class Deployer:
    """Runs the child processes, one at a time.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Theirs.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = asyncio.Lock()
        self._children: set[asyncio.subprocess.Process] = set()

    async def run(self, task: Task, timeout: float, *, queue: bool = False) -> Outcome:
        """Do what ``task`` says.

        Parameters
        ----------
        task : Task
            Address and certificates are put in here.
        timeout : float
            Seconds after which the child is killed.
        queue : bool
            Wait for the child that runs, if one does.

        Raises
        ------
        ConflictError
            One runs.
        StartTimeoutError
            It took longer than ``timeout``.
        ServeError
            It died.
        """
        if self._lock.locked() and not queue:
            raise ConflictError("another document is being deployed by this scheduler: try again when that is done")
        if self._scheduler.address.startswith("inproc://"):
            raise ServeError(
                "this scheduler is reached from within its own process only: deploy with serve.run() there, or start "
                "it with `dask scheduler`"
            )
        async with self._lock:
            return await self._run(task, timeout)

    async def _run(self, task: Task, timeout: float) -> Outcome:
        task = msgspec.structs.replace(
            task, scheduler=self._scheduler.address, security=_credentials(self._scheduler.security)
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dask_serve.cli.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._children.add(child)
        try:
            output = await asyncio.wait_for(self._talk(child, task), timeout)
            code = child.returncode
        except asyncio.TimeoutError:
            raise StartTimeoutError(
                f"{task.name} was not deployed within {timeout:g} s: do its modules take so long to be imported? "
                "serve.rest.timeout in Dask's configuration of the scheduler is the limit"
            ) from None
        finally:
            _kill(child)
            self._children.discard(child)
        try:
            return msgspec.json.decode(output, type=Outcome)
        except msgspec.DecodeError:
            raise ServeError(
                f"the process that was to deploy {task.name} ended with exit code {code}; the scheduler's log has what "
                "it said"
            ) from None

    async def _talk(self, child: asyncio.subprocess.Process, task: Task) -> bytes:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(ConnectionError):
            child.stdin.write(msgspec.json.encode(task))
            await child.stdin.drain()
        child.stdin.close()
        output = b""
        while len(output) < LONGEST and (part := await child.stdout.read(2**16)):
            output += part
        await child.wait()
        return output

    def close(self) -> None:
        """Kill what runs."""
        for child in self._children:
            _kill(child)


def _kill(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _credentials(security: Any) -> dict[str, Any]:
    from .proxies import certificates

    found = certificates(security)
    if found is None:
        return {}
    given = {
        "tls_ca_file": found.ca,
        "tls_client_cert": found.certificate,
        "tls_client_key": found.key,
        "tls_ciphers": found.ciphers,
        "require_encryption": bool(security.require_encryption),
    }
    return {name: value for name, value in given.items() if value is not None}
