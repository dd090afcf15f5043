"""A scheduler that is killed and started again, with its workers: the service comes back by itself."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from helpers import wait_until
from processes import free_port, installed

import dask_serve as serve

until = functools.partial(wait_until, timeout=30.0)


class Supervisor:
    """Starts processes, and starts them again whenever they end, as systemd or Kubernetes do."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.http = free_port(), free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.environment = installed(directory)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def run(self, name: str, *command: str) -> None:
        with self._lock:
            self._commands[name] = [sys.executable, *command]
            self._start(name)

    def scheduler(self, *options: str) -> None:
        self.run(
            *("scheduler", "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--no-dashboard", "--preload", "dask_serve.preload", *options),
        )

    def worker(self, name: str) -> None:
        self.run(
            *(name, "-m", "distributed.cli.dask_worker", self.address, "--nthreads", "2", "--no-nanny"),
            *("--no-dashboard", "--name", name, "--memory-limit", "0"),
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[name].pid, number)

    def end(self, name: str) -> None:
        """End one in order, and do not start it again."""
        with self._lock:
            del self._commands[name]
        self.kill(name, signal.SIGTERM)
        self.processes[name].wait(20)

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def get(self, path: str = "/") -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=2) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.URLError):
            return None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self, name: str) -> None:
        with (self.directory / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name],
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            with self._lock:
                for name in self._commands:
                    if self.processes[name].poll() is not None:
                        self._start(name)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    try:
        yield supervisor
    finally:
        supervisor.close()


def model(answer: Any, num_replicas: int = 2) -> Any:
    @serve.deployment(num_replicas=num_replicas)
    class Model:
        def __init__(self, weights: str = "") -> None:
            self.weights = weights

        async def __call__(self, request: Any) -> str:
            return f"{answer} {os.getpid()}"

        def answer(self) -> Any:
            return answer

        def pid(self) -> int:
            return os.getpid()

    return Model


def test_the_service_comes_back_by_itself(supervisor: Supervisor) -> None:
    """The scheduler is killed; the supervisor starts it and the workers again. No client does anything."""
    supervisor.scheduler("--serve-port", str(supervisor.http))
    for name in ("a", "b"):
        supervisor.worker(name)
    with Client(supervisor.address) as client:
        client.wait_for_workers(2, timeout=20)
        handle = serve.run(model("one").bind(), client=client)
        serve.run(model("two").bind(), name="other", route_prefix="/other", client=client)
        before = {handle.pid.remote().result() for _ in range(40)}
        assert before == {supervisor.processes[name].pid for name in ("a", "b")}

        supervisor.kill("scheduler")
        killed = time.monotonic()
        until(lambda: all(supervisor.processes[name].pid not in before for name in ("a", "b")))

        def back() -> bool:
            answers = [(supervisor.get(path) or "").split() for path in ("/", "/other")]
            return all(len(answer) == 2 and int(answer[1]) not in before for answer in answers)

        def workers() -> bool:
            return supervisor.log().count("Registered to:") >= 4

        until(workers)
        returned = time.monotonic()
        until(back)
        took = time.monotonic() - returned
        print(f"last worker after {returned - killed:.2f} s, service {took:.2f} s later")
        assert took < 5
        # A session of before finds them without doing anything.
        assert handle.pid.remote().result(timeout=10) not in before
        status = until(lambda: (s := serve.status(client=client)).applications["other"].status == "running" and s)
        assert status.url == f"http://127.0.0.1:{supervisor.http}"
        assert status.message == ""
        assert [r.reason for r in serve.history("default", client=client)] == ["deployed"]
        # The code is there too: what was can be gone back to.
        serve.run(model("three").bind(), client=client)
        assert supervisor.get().startswith("three")
        assert serve.rollback("default", client=client) == 3
        until(lambda: supervisor.get().startswith("one"))


def test_a_session_waits_over_a_restart(supervisor: Supervisor, tmp_path: Path) -> None:
    """What it deployed was saved before it began to wait; HTTP on a Unix socket with an admin port comes back too."""
    path, admin = str(tmp_path / "http"), free_port()
    http = [f"--serve-http=unix_socket={path}", f"--serve-http=admin_port={admin}"]
    supervisor.scheduler(*http)
    with Client(supervisor.address) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(serve.run, model(5, num_replicas=1).bind(), client=client)
        until(lambda: "default" in serve.status(client=client).applications)
        until(lambda: serve.status(client=client).url)
        supervisor.kill("scheduler")
        supervisor.worker("a")
        assert waiting.result(40).answer.remote().result(timeout=20) == 5
        assert until(lambda: serve.status(client=client).url) == f"unix:{path}"
        with socket.create_connection(("127.0.0.1", admin), timeout=5):
            pass


@pytest.mark.slow
def test_what_was_acknowledged_is_there_whenever_the_scheduler_is_killed(supervisor: Supervisor) -> None:
    """One session deploys all the time, while the scheduler is killed and started again."""
    state = supervisor.directory / "state.sqlite"
    chance = random.Random(os.getpid())
    supervisor.scheduler("--no-serve-http", "--serve-state", str(state))
    stop = threading.Event()
    acknowledged = [0]

    with Client(supervisor.address) as client:

        def deploy() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                app = model(number, num_replicas=1).bind("x" * chance.randrange(300_000))
                while not stop.is_set():
                    try:
                        serve.run(app, route_prefix=None, wait=False, client=client)
                    except (OSError, serve.ServeError):
                        stop.wait(0.05)
                    else:
                        acknowledged[0] = number
                        break

        thread = threading.Thread(target=deploy)
        thread.start()
        try:
            for _ in range(3):
                before = acknowledged[0]
                until(lambda before=before: acknowledged[0] >= before + 3)
                time.sleep(chance.uniform(0, 0.1))
                supervisor.kill("scheduler")
        finally:
            stop.set()
            thread.join()
    killed = acknowledged[0]
    until(lambda: supervisor.log().count("are restored from") == 3)
    supervisor.worker("a")
    with Client(supervisor.address) as client:
        handle = serve.get_app_handle(client=client)
        assert handle.answer.remote().result(timeout=20) in (killed, killed + 1)
        history = serve.history("default", client=client)
        assert len(history) == 10
        assert [r.version for r in history] == list(range(history[0].version, history[0].version + 10))
        # A clean end changes nothing for a file that was asked for.
        supervisor.end("scheduler")
    assert "could not be used" not in supervisor.log()
    assert [file.name for file in supervisor.directory.glob("state.sqlite*")] == ["state.sqlite"]


def test_a_clean_end_is_the_end_unless_a_file_was_asked_for(supervisor: Supervisor) -> None:
    supervisor.scheduler("--no-serve-http")
    with Client(supervisor.address) as client:
        serve.run(model(1).bind(), route_prefix=None, wait=False, client=client)
        [directory] = (supervisor.directory / "state").iterdir()
        [file] = directory.glob("*.sqlite")
        assert file.name.endswith(f"-{supervisor.port}.sqlite")
        supervisor.end("scheduler")
    assert list(directory.iterdir()) == []
