"""The rows of one partition on their way to the replicas: in a Dask task, piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import Worker, get_worker
from distributed.comm import get_address_host
from distributed.worker import thread_state

from ..exceptions import ReplicaLostError, RequestCancelledError, ScoringError
from ..mapping import patient
from ..policy.pieces import PieceSizes
from ..response import DeploymentResponse
from ..routing.session import Session
from ..wire.loops import running_loop
from . import rows as of_rows
from .waiting import in_dask_task, seceded

if TYPE_CHECKING:
    from ..handle import DeploymentHandle

__all__ = ["Lane", "Where", "Work"]

#: Pieces of a partition that are under way.
AHEAD = 4
#: Seconds without any answer in this process until a task gives its thread back to its worker; longer where others
#: have done so, because each one that has lets another one begin, with another partition in memory.
PATIENCE = 0.5
#: Seconds to wait for the first table.
FIRST_TABLE = 5.0


class Where:
    """Which partition it is, for errors.

    Parameters
    ----------
    handle : DeploymentHandle
    collection : str
        Name of the collection.
    kind : str
        What its parts are called.
    info : dict or None
        The part's ``number``, and for frames its first ``division``; None: not known.
    """

    def __init__(self, handle: DeploymentHandle, collection: str, kind: str, info: dict[str, Any] | None) -> None:
        self.handle = handle
        self.number = None if info is None else info["number"]
        division = None if info is None else info.get("division")
        self._what = f"{kind} {'?' if self.number is None else self.number} of {collection!r}"
        if division is not None:
            self._what += f" (from {division!r} on)"

    def error(self, cause: BaseException, place: str = "") -> ScoringError:
        """Make the exception."""
        options = self.handle._options
        message = (
            f"{self._what}{place and ', ' + place} could not be scored by deployment {self.handle._id!r}, method "
            f"{options.method_name!r}: {type(cause).__name__}: {cause}"
        )
        error = ScoringError(message, self.handle._id, self.number)
        error.__cause__ = cause
        return error

    @contextlib.contextmanager
    def within(self, place: str) -> Iterator[None]:
        """Name the place in what is raised."""
        try:
            yield
        except Exception as error:
            raise self.error(error, place) from error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raise self.error(error) from error


class Work(NamedTuple):
    """The rows of one partition."""

    rows: int
    #: Returns the arguments for some of them, by position and by name.
    arguments: Callable[[int, int], tuple[list[Any], dict[str, Any]]]
    #: Makes of a result and its piece what is kept.
    keep: Callable[[Any, Any], Any]
    #: As many rows have to come out.
    counted: bool = False


class _Piece:
    __slots__ = ("piece", "ref", "start", "stop", "tries")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.piece: Any = None
        self.ref: Any = None
        self.tries = 0


class Lane:
    """One partition's way through a deployment.

    Parameters
    ----------
    handle : DeploymentHandle
    size : int or "auto"
        Rows of a piece.
    where : Where
    ahead : int
        Pieces that are under way.
    """

    def __init__(self, handle: DeploymentHandle, size: Any, where: Where, ahead: int = AHEAD) -> None:
        session = handle._session
        if session is None or session.closed:
            session = handle._connect()
        _wait_for_table(session)
        entry = None if session.table is None else session.table.deployments.get(handle._id)
        worker = _worker()
        self._call = patient(handle.options(sync=True), places_near(worker, entry))
        self._where = where
        self._ahead = ahead
        self._learned: PieceSizes | None = None
        self._rows = size
        if size == "auto":
            self._rows = 0 if entry is None else entry.rows.get(handle._method, 0)
            if not self._rows:
                self._learned = learned_size(session, handle)
        self._pending: deque[_Piece] = deque()
        self._worker = worker
        self._stack = contextlib.ExitStack()
        self._threads = 1 if worker is None else worker.state.nthreads
        self._seceded = False

    def run(self, work: Work, place: str) -> list[Any]:
        """Return what is kept of the results, in the order of the rows. ``place`` names a piece in errors."""
        start, kept = 0, []
        while start < work.rows or self._pending:
            while start < work.rows and len(self._pending) < self._ahead:
                size = self._rows if self._learned is None else self._learned.rows
                piece = _Piece(start, min(start + size, work.rows))
                with self._where.within(place.format(piece.start, piece.stop)):
                    self._send(piece, work)
                self._pending.append(piece)
                start = piece.stop
            piece = self._pending[0]
            with self._where.within(place.format(piece.start, piece.stop)):
                result = self._take(piece, work)
                if work.counted:
                    of_rows.count(result, piece.stop - piece.start)
                kept.append(work.keep(result, piece.piece))
            self._pending.popleft()
        return kept

    def _send(self, piece: _Piece, work: Work) -> None:
        args, kwargs = work.arguments(piece.start, piece.stop)
        piece.piece = args[0]
        piece.ref = self._call.remote(*args, **kwargs)

    def _take(self, piece: _Piece, work: Work) -> Any:
        while True:
            ref = piece.ref
            self._wait(ref)
            state = ref._local
            if state.seconds and self._learned is not None:
                self._learned.answered(piece.stop - piece.start, state.seconds, state.quiet)
            try:
                return ref.take_in_thread(None)
            except ReplicaLostError:
                # Also where it was answered, and the result is gone with the worker that had it.
                piece.tries += 1
                if piece.tries > self._call._retries:
                    raise
            self._send(piece, work)

    # ------------------------------------------------------------------ waiting

    def _wait(self, ref: DeploymentResponse) -> None:
        state = ref._local
        if not in_dask_task():
            ref._wait_in_thread(None)
            return
        self._look_for_cancel()
        while not state.wait_in_thread(PATIENCE):
            self._look_for_cancel()
            if not self._seceded and progress.is_slow(self._threads):
                # What is waited for may need the thread.
                self._seceded = True
                self._stack.enter_context(progress.seceded())
        progress.answered()

    def _look_for_cancel(self) -> None:
        """Nobody wants the task's result any more: its thread must not wait for ever."""
        task = None if self._worker is None else self._worker.state.tasks.get(thread_state.key)
        if self._worker is not None and (task is None or task.state in {"cancelled", "released", "forgotten"}):
            raise RequestCancelledError("the Dask task was cancelled")

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for piece in self._pending:
            piece.ref.cancel()
        self._stack.close()


class _Progress:
    """When this process last got an answer, and how many of its tasks have given back their threads."""

    def __init__(self) -> None:
        self._last = 0.0
        self._away = 0
        self._lock = threading.Lock()

    def answered(self) -> None:
        self._last = time.monotonic()

    def is_slow(self, threads: int) -> bool:
        return time.monotonic() - self._last > PATIENCE * (1 + self._away // threads) ** 2

    @contextlib.contextmanager
    def seceded(self) -> Iterator[None]:
        with self._lock:
            self._away += 1
        try:
            with seceded():
                yield
        finally:
            with self._lock:
                self._away -= 1


progress = _Progress()

#: What was learned of methods, by cluster, deployment and method.
_sizes: dict[tuple[str, str, str], PieceSizes] = {}


def learned_size(session: Session, handle: DeploymentHandle) -> PieceSizes:
    """Return what this process has learned of a method. Threads share it; a lost sample does no harm."""
    return _sizes.setdefault((session.address, handle._id, handle._method), PieceSizes())


def places_near(worker: Worker | None, entry: Any) -> frozenset[str] | None:
    """Return the worker itself, if it has a replica, or else those on its machine that have one."""
    if worker is None or entry is None or len(entry.replicas) < 2:
        return None
    workers = {replica.worker for replica in entry.replicas}
    if worker.address in workers:
        return frozenset([worker.address])
    host = get_address_host(worker.address)
    return frozenset(other for other in workers if get_address_host(other) == host) or None


def _worker() -> Worker | None:
    try:
        return get_worker()
    except ValueError:
        return None


def _wait_for_table(session: Session) -> None:
    if session.table is None and not session.absent and running_loop() is None:
        until = session.until(lambda _: True, FIRST_TABLE)
        asyncio.run_coroutine_threadsafe(until, session.owner.loop.asyncio_loop).result()
