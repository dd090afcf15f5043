"""How many threads BLAS, OpenMP and torch use in a replica's calls: as many as the replica has, ``threads``.

OpenMP and torch have a number for each thread, so that every replica has its own. BLAS libraries (OpenBLAS, MKL, BLIS)
mostly have one for the process: the largest ``threads`` among its replicas. It is as it was when the last of them has
ended.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any, ClassVar

__all__ = ["NativeThreads"]

logger = logging.getLogger("dask_serve.replica")

#: Packages that bring such libraries. As long as none of them was imported, nothing is looked for.
BRINGERS = frozenset(
    {"catboost", "cv2", "faiss", "lightgbm", "numba", "numpy", "onnxruntime", "scipy", "sklearn", "torch", "xgboost"}
)


class NativeThreads:
    """The numbers of one replica.

    Parameters
    ----------
    threads : int
        The replica's ``threads``.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    #: What the libraries of this process are controlled by, and which bringers had been imported then.
    _libraries: ClassVar[list[Any]] = []
    _brought: ClassVar[frozenset[str]] = frozenset()
    #: What they had before the first replica, by file.
    _before: ClassVar[dict[str, int]] = {}
    _replicas: ClassVar[set[NativeThreads]] = set()
    #: A library could not be told, because code that runs has set a number for a while.
    _due: ClassVar[bool] = False

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._seen = frozenset[str]()

    def look(self) -> bool:
        """Find libraries that were loaded meanwhile; True if there are some, and threads have to `enter` anew.

        Costs a few milliseconds where a package has come, and nothing otherwise.
        """
        brought = BRINGERS & sys.modules.keys()
        if brought == self._seen:
            if NativeThreads._due:
                with NativeThreads._lock:
                    NativeThreads._apply()
            return False
        self._seen = frozenset(brought)
        cls = NativeThreads
        with cls._lock:
            cls._replicas.add(self)
            if brought != cls._brought:
                cls._brought = self._seen
                cls._libraries = _find()
                for library in cls._libraries:
                    cls._before.setdefault(library.filepath, library.num_threads)
            cls._apply()
        return True

    def leave(self) -> None:
        """The replica has ended."""
        cls = NativeThreads
        with cls._lock:
            if self in cls._replicas:
                cls._replicas.discard(self)
                cls._apply()

    @classmethod
    def _apply(cls) -> None:
        """Set what a process has one number of."""
        most = max((replica._threads for replica in cls._replicas), default=None)
        cls._due = False
        for library in cls._libraries:
            if not _is_by_thread(library):
                threads = cls._before[library.filepath] if most is None else most
                _set(library, threads)
                cls._due = cls._due or library.num_threads != threads

    def enter(self) -> None:
        """Set what each thread has a number of, in the thread that calls."""
        for library in NativeThreads._libraries:
            if _is_by_thread(library):
                _set(library, self._threads)
        # While it is being imported by another thread it may lack anything.
        set_num_threads = getattr(sys.modules.get("torch"), "set_num_threads", None)
        if set_num_threads is not None:
            set_num_threads(self._threads)


def _find() -> list[Any]:
    try:
        from threadpoolctl import ThreadpoolController

        return list(ThreadpoolController().lib_controllers)
    except ImportError:
        return []
    except Exception:
        logger.exception("the threads of BLAS and OpenMP libraries stay as they are")
        return []


def _is_by_thread(library: Any) -> bool:
    """Tell whether each thread sets a number of its own: OpenMP, and what is built on it."""
    return library.user_api == "openmp" or getattr(library, "threading_layer", "") == "openmp"


def _set(library: Any, threads: int) -> None:
    try:
        library.set_num_threads(threads)
        # Of OpenBLAS one thread is in charge, the first one that sets a number, until it says otherwise.
        getattr(library, "clear_controlling_thread", int)()
    except Exception as error:  # noqa: BLE001 - a library that cannot be told
        logger.debug("%s keeps its number of threads: %s", library.filepath, error)
