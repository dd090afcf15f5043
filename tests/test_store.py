"""The state file: what is in it survives everything, and what cannot be used is set aside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from distributed.protocol import deserialize, serialize, to_serialize
from distributed.protocol.serialize import Serialized

from dask_serve.config import DeploymentOptions, HTTPOptions
from dask_serve.controller import store as store_module
from dask_serve.controller.state_file import StateFile, configured, default_file, history_length
from dask_serve.controller.store import PIECE, Saved, Store, StoreError
from dask_serve.exceptions import ConfigError
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec
from dask_serve.policy.history import By, Entry


def entry(version: int, revision: str = "r1", app: str = "app", ran: bool = False) -> Entry:
    deployment = DeploymentSpec(
        name="d", revision=revision, options=DeploymentOptions(user_config={"a": [1, 2]}), methods=["__call__"]
    )
    spec = ApplicationSpec(name=app, route_prefix="/", ingress="d", deployments=[deployment])
    return Entry(version=version, spec=spec, by=By("ann@host", "c-1"), time=12.5, reason="deployed", ran=ran)


class File:
    """A store, used without an event loop of the test's."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path)
        self.saved: Saved = self.store.open()

    def save(self, app: str, entries: list[Entry], code: dict[str, Any] | None = None, keep: set[str] | None = None):
        needed = {spec.revision for one in entries for spec in one.spec.deployments}
        asyncio.run(self.store.save(app, entries, code or {}, needed | (keep or set())))

    def load(self, revision: str) -> bytes:
        return b"".join(asyncio.run(self.store.load(revision)))

    def close(self, **options: Any) -> None:
        asyncio.run(self.store.close(**options))


@contextlib.contextmanager
def opened(path: Path):
    file = File(path)
    try:
        yield file
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state.sqlite"


def filled(path: Path, code: bytes = b"code") -> None:
    with opened(path) as file:
        file.save("app", [entry(1), entry(2, "r2", ran=True)], {"r1": code, "r2": code + b"2"})


# -- what is saved comes back


def test_what_is_saved_comes_back(path: Path) -> None:
    http = HTTPOptions(port=8123, middleware=["a:B"])
    with opened(path) as file:
        assert file.saved == Saved()
        file.save("app", [entry(1)], {"r1": b"one"})
        file.save("app", [entry(1), entry(2, "r2", ran=True)], {"r2": b"two"})
        file.save("other", [entry(7, "r2", app="other")], keep={"r1", "r2"})
        asyncio.run(file.store.save_http(http, {"port"}))
    with opened(path) as file:
        assert file.saved.versions == {
            "app": (entry(1), entry(2, "r2", ran=True)),
            "other": (entry(7, "r2", app="other"),),
        }
        assert file.saved.code == {"r1", "r2"}
        assert file.saved.http is not None
        assert (file.saved.http.options, file.saved.http.explicit) == (http, ["port"])
        assert file.saved.trouble == []
        assert (file.load("r1"), file.load("r2")) == (b"one", b"two")
        asyncio.run(file.store.save_http(None))
    with opened(path) as file:
        assert file.saved.http is None


def test_code_that_nobody_needs_is_dropped(path: Path) -> None:
    with opened(path) as file:
        file.save("app", [entry(1), entry(2, "r2")], {"r1": b"1", "r2": b"2", "r9": b"not asked for"})
        assert file.store.code == {"r1", "r2"}
        file.save("app", [entry(2, "r2")], {})
        assert file.store.code == {"r2"}
        with pytest.raises(StoreError, match="lacks the code of revision r1"):
            file.load("r1")
        file.save("app", [])
    with opened(path) as file:
        assert file.saved == Saved()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE])
def test_code_of_any_size(path: Path, size: int) -> None:
    blob = random.Random(size).randbytes(size)
    with opened(path) as file:
        file.save("app", [entry(1)], {"r1": blob})
        assert file.load("r1") == blob


def test_code_as_connections_deliver_it(path: Path) -> None:
    header, frames = serialize(b"some code")
    with opened(path) as file:
        file.save("app", [entry(1), entry(2, "r2")], {"r1": Serialized(header, frames), "r2": to_serialize(b"more")})
        assert (file.load("r1"), file.load("r2")) == (b"some code", b"more")
    assert deserialize(header, frames) == b"some code"


def test_what_is_there_is_not_written_again(path: Path) -> None:
    with opened(path) as file:
        file.save("app", [entry(1)], {"r1": b"the first"})
        file.save("app", [entry(1)], {"r1": b"never looked at"})
        assert file.load("r1") == b"the first"


def test_only_the_owner_can_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        filled(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    with opened(path) as file:
        assert file.saved.code == {"r1", "r2"}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_removed_where_it_is_for_crashes(path: Path) -> None:
    file = File(path)
    file.save("app", [entry(1)], {"r1": b"1"})
    file.close(remove=True)
    assert list(path.parent.iterdir()) == []


# -- what cannot be used


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"no longer a database")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    path.write_bytes(data)


def flip_an_entry(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE versions SET entry = CAST(substr(entry, 1, 20) || 'x' AS BLOB) WHERE version = 2")


def another_database(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE accounts (name)")
    path.chmod(0o600)


def too_new(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version=99")


def no_tables(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE versions")


def text(path: Path) -> None:
    path.write_text("{}")


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


REASONS = {
    damage_header: "not a database",
    truncate: "",
    garble: "",
    flip_an_entry: "version 2 of application 'app' is damaged",
    another_database: "a database of something else",
    too_new: "version 99, and this dask_serve knows version 1",
    no_tables: "no such table",
    text: "not a database",
    writable_by_others: "others may write it (mode 0666)",
}


@pytest.mark.parametrize("harm", REASONS, ids=lambda harm: harm.__name__)
def test_an_unusable_file_is_set_aside(path: Path, harm: Any) -> None:
    filled(path, b"x" * 50_000)
    harm(path)
    harmed = path.read_bytes()
    with opened(path) as file:
        assert file.saved.versions == {}
        assert file.saved.code == set()
        [trouble] = file.saved.trouble
        assert str(path) in trouble
        assert REASONS[harm] in trouble
        [aside] = path.parent.glob("state.sqlite.unusable-*")
        assert trouble.endswith(f"it is now {aside}")
        assert aside.read_bytes() == harmed
        # The new one works.
        file.save("app", [entry(3, "r3")], {"r3": b"three"})
    with opened(path) as file:
        assert list(file.saved.versions) == ["app"]
        assert file.saved.trouble == []


def test_several_are_set_aside(path: Path) -> None:
    for _ in range(3):
        filled(path)
        text(path)
        with opened(path):
            pass
    assert len(list(path.parent.glob("state.sqlite.unusable-*"))) == 3


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o600)
    with opened(path) as file:
        assert file.saved == Saved()


def test_a_journal_does_not_stay_behind(path: Path) -> None:
    filled(path)
    text(path)
    journal = path.with_name(path.name + "-journal")
    journal.write_bytes(b"of the old file")
    with opened(path) as file:
        file.save("app", [entry(1)], {"r1": b"1"})
        assert b"of the old file" not in journal.read_bytes()
    with opened(path) as file:
        assert list(file.saved.versions) == ["app"]


def test_a_file_that_another_scheduler_uses_is_left_alone(path: Path) -> None:
    filled(path)
    pid = os.fork()
    if not pid:  # locks are of processes
        with contextlib.suppress(BaseException):
            file = Store(path)
            file.open()
            path.with_name("ready").touch()
            time.sleep(60)
        os._exit(1)
    try:
        deadline = time.monotonic() + 10
        while not path.with_name("ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(StoreError, match="another process uses it"):
            Store(path).open()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert list(path.parent.glob("*unusable*")) == []
    with opened(path) as file:
        assert file.saved.code == {"r1", "r2"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file" / "state.sqlite").open()


def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as file:
        file.save("app", [entry(1)], {"r1": b"1"})
        pages = file.store._database.execute("PRAGMA page_count").fetchone()[0]
        file.store._database.execute(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(StoreError, match="full"):
            file.save("app", [entry(1), entry(2, "r2")], {"r2": b"2" * 100_000})
        assert file.store.code == {"r1"}
        file.store._database.execute("PRAGMA max_page_count=100000")
        file.save("app", [entry(1), entry(2, "r2")], {"r2": b"2" * 100_000})
    with opened(path) as file:
        assert len(file.saved.versions["app"]) == 2


def test_damaged_code_is_told_when_it_is_needed(path: Path) -> None:
    filled(path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE code SET data = CAST('garbage' AS BLOB) WHERE revision = 'r1'")
    with opened(path) as file:
        assert file.saved.code == {"r1", "r2"}
        with pytest.raises(StoreError, match="the code of revision r1 is damaged"):
            file.load("r1")
        assert file.load("r2") == b"code2"


def test_an_application_of_another_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this version does not understand is told; all else comes back."""
    with opened(path) as file:
        encode = store_module._encode
        monkeypatch.setattr(store_module, "_encode", lambda one: encode(one).replace(b"user_config", b"user_Config"))
        file.save("new", [entry(1, app="new")], {"r1": b"1"})
        monkeypatch.undo()
        file.save("app", [entry(1)], keep={"r1"})
    with opened(path) as file:
        assert list(file.saved.versions) == ["app"]
        [trouble] = file.saved.trouble
        assert "application 'new' could not be restored: its version 1" in trouble
        assert "user_Config" in trouble
        file.save("new", [entry(2, app="new")])
    with opened(path) as file:
        assert set(file.saved.versions) == {"app", "new"}


# -- kill -9


def change(store: Store, number: int) -> None:
    """Make a change that depends on its number only."""
    app = f"app{number % 3}"
    sizes = random.Random(number)
    revision = f"{app}-{number}"
    versions = list(range(number % 3, number + 1, 3))[-3:]
    entries = [entry(one + 1, f"{app}-{one}", app=app) for one in versions]
    keep = {f"app{one % 3}-{one}" for one in range(max(number - 12, 0), number + 1)}
    blob = bytes([number % 256]) * sizes.randrange(200_000)
    asyncio.run(store.save(app, entries, {revision: blob}, keep))


def test_kill_9_at_any_moment(path: Path) -> None:
    """What was acknowledged is there; what was not is there as a whole or not at all."""
    rounds = random.Random(os.getpid())
    acknowledged = path.with_name("acknowledged")
    path.parent.mkdir()
    number = 0
    for _ in range(16):
        acknowledged.write_text(str(number))
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                store = Store(path)
                store.open()
                one = number
                while True:
                    change(store, one)
                    one += 1
                    descriptor = os.open(acknowledged, os.O_WRONLY)
                    os.write(descriptor, str(one).encode())
                    os.close(descriptor)
            os._exit(1)
        if rounds.random() < 0.6:
            deadline = time.monotonic() + 10
            while int(acknowledged.read_text() or number) == number:
                assert time.monotonic() < deadline
        time.sleep(rounds.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        done = int(acknowledged.read_text())
        with opened(path) as file:
            assert file.saved.trouble == []
            versions = {app: entries[-1].version - 1 for app, entries in file.saved.versions.items()}
            number = max(versions.values(), default=-1) + 1
            assert number in (done, done + 1)
            for app, entries in file.saved.versions.items():
                last = entries[-1].version - 1
                assert last == max(one for one in range(number) if f"app{one % 3}" == app)
                for one in entries:
                    for spec in one.spec.deployments:
                        assert set(file.load(spec.revision)) <= {(one.version - 1) % 256}
    assert number > 3
    assert list(path.parent.glob("*unusable*")) == []


# -- where it is


class FakeScheduler:
    def __init__(self, address: str, *asked: str) -> None:
        self.address = address
        self._start_address = list(asked)


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = default_file(FakeScheduler("tcp://10.0.0.1:8786", "tcp://:8786"))
    assert file.for_crashes
    assert file.path.parent == tmp_path / f"dask-serve-{os.getuid()}"
    assert file.path.name.endswith("-8786.sqlite")
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    # Any free port: the next scheduler there is another one.
    assert default_file(FakeScheduler("tcp://10.0.0.1:40001", "tcp://:0")) == StateFile()
    assert default_file(FakeScheduler("tcp://10.0.0.1:40001", "tcp://:8786")) == StateFile()
    assert default_file(FakeScheduler("inproc://10.0.0.1/1/1", "inproc://")) == StateFile()
    # Somebody else could put something there.
    file.path.parent.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert default_file(FakeScheduler("tcp://10.0.0.1:8786", "tcp://:8786")).path.parent.parent == tmp_path / "tmp"


def test_the_configured_place(tmp_path: Path) -> None:
    import dask

    scheduler = FakeScheduler("tcp://10.0.0.1:8786", "tcp://:8786")
    assert configured() == StateFile()
    with dask.config.set({"serve.state-file": str(tmp_path / "s")}):
        assert configured() == default_file(scheduler) == StateFile(tmp_path / "s")
        assert configured("none") == default_file(scheduler, "none") == StateFile()
        assert default_file(scheduler, "/x/y") == StateFile(Path("/x/y"))
    for off in ("none", "", False):
        with dask.config.set({"serve.state-file": off}):
            assert configured() == default_file(scheduler) == StateFile()


def test_history_length() -> None:
    import dask

    assert history_length() == 10
    with dask.config.set({"serve.history-length": 0}), pytest.raises(ConfigError, match="history-length = 0"):
        history_length()
