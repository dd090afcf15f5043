"""The desired state on disk: what a scheduler that comes back makes run again.

One SQLite file, one thread that uses it. Each change is one transaction; they are done in the order in which they come.
With SQLite's rollback journal and ``synchronous=EXTRA`` the file holds all of a change or nothing of it, whenever the
process or the machine ends.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from ..config import HTTPOptions
from ..exceptions import ServeError
from ..policy.history import Entry
from .pieces import buffers_of
from .state_file import claim, set_aside, why_not_trusted

__all__ = ["Saved", "Store", "StoreError"]

logger = logging.getLogger("dask_serve.controller")

#: Marks our files among those of SQLite: "DSrv".
APPLICATION_ID = 0x44537276
#: Grows when an older version could not read the file any more.
SCHEMA = 1
#: Bytes of code in one row: SQLite takes no value above 1 GB, and a thread that copies one holds the interpreter.
PIECE = 1 << 20
#: Bytes of a page of a new file: with SQLite's 4 KiB, writing and dropping large code takes twice as long.
PAGE = 32768
#: Seconds to wait for another process that has the file.
LOCK_TIMEOUT = 1.0

_TABLES = (
    "CREATE TABLE versions (app TEXT, version INTEGER, entry BLOB NOT NULL, PRIMARY KEY (app, version))",
    "CREATE TABLE code (revision TEXT, piece INTEGER, data BLOB NOT NULL, PRIMARY KEY (revision, piece))",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
)
#: What SQLite says when not the file is at fault, but the place where it is.
_ELSEWHERE = ("locked", "unable to open", "readonly", "read-only", "disk i/o", "full", "interrupted")

Result = TypeVar("Result")


class StoreError(ServeError):
    """The state file cannot be used, or a change could not be written."""


class HTTP(Struct, frozen=True):
    """The proxies that ran, and which of their options a person gave."""

    options: HTTPOptions
    explicit: list[str]


class Saved(Struct):
    """What was in the file."""

    versions: dict[str, tuple[Entry, ...]] = {}
    http: HTTP | None = None
    #: Numbers of replicas that loads had led to, by deployment id.
    targets: dict[str, int] = {}
    #: Revisions whose code is there.
    code: frozenset[str] = frozenset()
    #: What is wrong, in words; empty if nothing is.
    trouble: list[str] = []


class _UnusableError(Exception):
    """The file is not a state file that this version can read."""


class Store:
    """The state file.

    Parameters
    ----------
    path : Path
        The file; it and its directory are made where they are not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Revisions whose code is in the file.
        self.code: frozenset[str] = frozenset()
        self._rows: dict[str, dict[int, bytes]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dask-serve-state")
        self._database: sqlite3.Connection | None = None

    # -- the life of the file

    def open(self) -> Saved:
        """Read the file, or begin a new one; one that cannot be used is set aside. Blocks.

        Raises
        ------
        StoreError
            The file cannot be made, or belongs to a scheduler that runs.
        """
        try:
            return self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def close(self, *, remove: bool = False) -> None:
        """Close the file after all changes; ``remove`` it where it was for crashes only."""
        with suppress(sqlite3.Error):
            await self._do(self._close)
        if remove:
            with suppress(OSError):
                self.path.unlink()
        self._thread.shutdown(wait=False)

    # -- changes

    async def save(self, app: str, entries: Sequence[Entry], code: Mapping[str, Any], keep: set[str]) -> None:
        """Make these the versions of an application, as `save_all` does of several."""
        await self.save_all({app: entries}, code, keep)

    async def save_all(self, versions: Mapping[str, Sequence[Entry]], code: Mapping[str, Any], keep: set[str]) -> None:
        """Make these the versions of some applications, of all or of none of them.

        Parameters
        ----------
        versions : mapping
            By name of the application all of its versions; where there are none it is forgotten.
        code : mapping
            Code by revision, as it came; what is in the file already is not written again.
        keep : set of str
            Revisions that are needed; the code of all others is dropped.

        Raises
        ------
        StoreError
            The change could not be written; the file is as it was.
        """
        await self._do(self._save, versions, code, keep)

    async def save_http(self, options: HTTPOptions | None, explicit: Sequence[str] = ()) -> None:
        """Note the proxies; None: there are none."""
        value = None if options is None else _encode(HTTP(options, sorted(explicit)))
        await self._do(self._save_setting, "http", value)

    async def save_targets(self, targets: Mapping[str, int]) -> None:
        """Note the numbers of replicas that loads have led to, by deployment id."""
        await self._do(self._save_setting, "targets", _encode(targets))

    async def load(self, revision: str) -> list[bytes]:
        """Return the code of a revision, in pieces.

        Raises
        ------
        StoreError
            It is not there, or damaged.
        """
        return await self._do(self._load, revision)

    # -- in the thread

    async def _do(self, function: Callable[..., Result], *args: Any) -> Result:
        try:
            return await asyncio.wrap_future(self._thread.submit(function, *args))
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the state file {self.path} could not be used: {error}") from error

    def _open(self) -> Saved:
        trouble = []
        try:
            reason = why_not_trusted(self.path)
            if not reason:
                claim(self.path)
                reason, saved = self._try()
                if saved is not None:
                    return saved
            aside = set_aside(self.path)
            trouble.append(f"the state file {self.path} could not be used ({reason}); it is now {aside}")
            claim(self.path)
            reason, saved = self._try()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the state file {self.path} cannot be used: {error}") from error
        if saved is None:
            raise StoreError(f"the state file {self.path} cannot be used: {reason}")
        saved.trouble = trouble
        return saved

    def _try(self) -> tuple[str, Saved | None]:
        """Return what the file holds, or why it holds nothing that can be used."""
        try:
            self._database = self._connect()
            return "", self._read()
        except _UnusableError as error:
            reason = str(error)
        except sqlite3.OperationalError as error:
            if any(text in str(error).lower() for text in _ELSEWHERE):
                self._close()
                text = "another process uses it" if "locked" in str(error) else str(error)
                raise StoreError(f"the state file {self.path} cannot be used: {text}") from error
            reason = str(error)
        except (sqlite3.DatabaseError, msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = str(error)
        self._close()
        return reason, None

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
        self._database = database
        # One scheduler, one file: the lock is held until the end of the process, however it ends.
        database.execute(f"PRAGMA page_size={PAGE}")
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA synchronous=EXTRA")
        with self._transaction():
            found = _number(database, "application_id"), _number(database, "user_version")
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if found == (0, 0) and not tables:
                for statement in _TABLES:
                    database.execute(statement)
                database.execute(f"PRAGMA application_id={APPLICATION_ID}")
                database.execute(f"PRAGMA user_version={SCHEMA}")
            elif found[0] != APPLICATION_ID:
                raise _UnusableError("it is a database of something else")
            elif found[1] != SCHEMA:
                raise _UnusableError(
                    f"it has version {found[1]}, and this dask_serve knows version {SCHEMA}: it was written by another "
                    "version of dask_serve"
                )
        return database

    def _read(self) -> Saved:
        database = self._opened()
        rows: dict[str, dict[int, bytes]] = {}
        for app, version, entry in database.execute("SELECT app, version, entry FROM versions ORDER BY app, version"):
            rows.setdefault(app, {})[version] = _unseal(entry, f"version {version} of application {app!r}")
        pieces = database.execute("SELECT DISTINCT revision FROM code")
        code = frozenset(revision for (revision,) in pieces)
        settings = {name: _unseal(value, name) for name, value in database.execute("SELECT name, value FROM settings")}
        self._rows, self.code = rows, code
        saved = Saved(code=code, versions={}, trouble=[])
        if "http" in settings:
            try:
                saved.http = _decode_http(settings["http"])
            except msgspec.ValidationError as error:
                saved.trouble.append(f"the HTTP options in {self.path} are of another version of dask_serve: {error}")
        if "targets" in settings:
            # They would be found again without it.
            with suppress(msgspec.ValidationError):
                saved.targets = _decode_targets(settings["targets"])
        for app, versions in rows.items():
            *older, (last, newest) = versions.items()
            try:
                current = _decode_entry(newest)
            except msgspec.ValidationError as error:
                saved.trouble.append(
                    f"application {app!r} could not be restored: its version {last} in {self.path} was written by "
                    f"another version of dask_serve ({error}); deploy it again"
                )
                continue
            entries = []
            for _, entry in older:
                with suppress(msgspec.ValidationError):
                    entries.append(_decode_entry(entry))
            saved.versions[app] = (*entries, current)
        return saved

    def _save(self, versions: Mapping[str, Sequence[Entry]], code: Mapping[str, Any], keep: set[str]) -> None:
        before = {app: self._rows.get(app, {}) for app in versions}
        after = {app: {entry.version: _encode(entry) for entry in entries} for app, entries in versions.items()}
        new = {revision: code[revision] for revision in code.keys() & keep - self.code}
        old = self.code - keep
        if before == after and not new and not old:
            return
        with self._transaction() as database:
            for app, rows in after.items():
                for version in before[app].keys() - rows.keys():
                    database.execute("DELETE FROM versions WHERE app=? AND version=?", (app, version))
                for version, entry in rows.items():
                    if before[app].get(version) != entry:
                        row = (app, version, _seal(entry))
                        database.execute("INSERT OR REPLACE INTO versions VALUES (?, ?, ?)", row)
            for revision, blob in new.items():
                database.executemany("INSERT INTO code VALUES (?, ?, ?)", _pieces(revision, buffers_of(blob)))
            for revision in old:
                database.execute("DELETE FROM code WHERE revision=?", (revision,))
        self._rows.update(after)
        for app in [app for app, rows in after.items() if not rows]:
            del self._rows[app]
        self.code = (self.code | new.keys()) - old

    def _save_setting(self, name: str, value: bytes | None) -> None:
        with self._transaction() as database:
            if value is None:
                database.execute("DELETE FROM settings WHERE name=?", (name,))
            else:
                database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, _seal(value)))

    def _load(self, revision: str) -> list[bytes]:
        rows = self._opened().execute("SELECT piece, data FROM code WHERE revision=? ORDER BY piece", (revision,))
        try:
            pieces = {number: _unseal(data, f"the code of revision {revision}", number) for number, data in rows}
        except _UnusableError as error:
            raise StoreError(f"in the state file {self.path} {error}") from None
        # The last piece is shorter than all others, be it by having nothing in it.
        if not pieces or list(pieces) != list(range(len(pieces))) or len(pieces[len(pieces) - 1]) >= PIECE:
            raise StoreError(f"the state file {self.path} lacks the code of revision {revision}")
        return list(pieces.values())

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreError(f"the state file {self.path} is closed")
        return self._database

    def _close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._opened()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise


_encode = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(Entry).decode
_decode_targets = msgspec.msgpack.Decoder(dict[str, int]).decode
_decode_http = msgspec.msgpack.Decoder(HTTP).decode


def _number(database: sqlite3.Connection, pragma: str) -> int:
    return int(database.execute(f"PRAGMA {pragma}").fetchone()[0])


def _seal(data: bytes | memoryview, number: int = 0) -> bytes:
    """Put a checksum before what SQLite keeps without looking at it."""
    return b"".join((zlib.crc32(data, number).to_bytes(4, "big"), data))


def _unseal(sealed: Any, what: str, number: int = 0) -> bytes:
    if not isinstance(sealed, bytes) or zlib.crc32(sealed[4:], number) != int.from_bytes(sealed[:4], "big"):
        raise _UnusableError(f"{what} is damaged")
    return sealed[4:]


def _pieces(revision: str, buffers: Iterable[memoryview]) -> Iterator[tuple[str, int, bytes]]:
    number, rest = 0, b""
    for buffer in buffers:
        start = 0
        if rest:
            start = PIECE - len(rest)
            rest += buffer[:start]
            if len(rest) < PIECE:
                continue
            yield revision, number, _seal(rest, number)
            number += 1
        while len(buffer) - start >= PIECE:
            yield revision, number, _seal(buffer[start : start + PIECE], number)
            start += PIECE
            number += 1
        rest = bytes(buffer[start:])
    yield revision, number, _seal(rest, number)
