"""Ends, wanted and unwanted, with real processes: workers, schedulers and sessions that are stopped or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from helpers import wait_until
from processes import installed

import dask_serve as serve
from dask_serve.exceptions import (
    ConfigError,
    DeploymentFailedError,
    NotRunningError,
    ReplicaLostError,
    RequestError,
)
from dask_serve.routing.table import Table, decode_table


class Processes:
    """`dask scheduler` and `dask worker`, as a person starts them: in a directory without the session's modules."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = directory / "cluster"
        self.place.mkdir()
        self.environment = {**installed(directory), "PYTHONUNBUFFERED": "1"}
        self.started: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def start(self, *command: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        with (self.directory / f"log-{len(self.started)}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=cwd or self.place,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        return (self.directory / f"log-{self.started.index(process)}").read_text()

    def scheduler(self, *options: str) -> subprocess.Popen[bytes]:
        file = self.directory / f"scheduler-{len(self.started)}.json"
        process = self.start(
            "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file), *options,
        )  # fmt: skip

        def ready() -> bool:
            assert process.poll() is None, self.log_of(process)
            return file.exists()

        wait_until(ready)
        import json

        self.address = wait_until(lambda: file.stat().st_size and json.loads(file.read_text())["address"])
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start(
            "-m", "dask", "worker", self.address, "--nthreads", "2", "--no-dashboard",
            "--death-timeout", "20", *options,
        )  # fmt: skip

    def end(self) -> None:
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


@serve.deployment
class Model:
    async def nap(self, seconds: float) -> int:
        import asyncio

        await asyncio.sleep(seconds)
        return os.getpid()

    def block(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def pid(self) -> int:
        return os.getpid()

    async def exit(self) -> None:
        os._exit(3)

    def __call__(self, request: Any = None) -> str:
        return f"served by {os.getpid()}"


def table_of(client: Client) -> Table:
    return decode_table(client.sync(client.scheduler.serve_table, timeout=0)["table"])


def ready(client: Client, deployment: str = "default/Model") -> list[str]:
    """Ids of the replicas in the table."""
    entry = table_of(client).deployments.get(deployment)
    return [] if entry is None else [replica.id for replica in entry.replicas]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


class Load:
    """Short calls from several threads, until it is stopped."""

    def __init__(self, handle: Any, threads: int = 4) -> None:
        self.handle = handle
        self.answered = 0
        self.errors: list[BaseException] = []
        self.late: list[BaseException] = []
        self.pids: list[int] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.pids.append(self.handle.nap.remote(0.01).result(timeout=10))
                self.answered += 1
            except Exception as error:
                self.errors.append(error)

    def goes_on(self, number: int = 40) -> None:
        enough = self.answered + number
        wait_until(lambda: self.answered >= enough)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(15)
        assert not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def two_replicas(client: Client, **options: Any) -> Any:
    client.wait_for_workers(2, timeout=20)
    app = Model.options(num_replicas=2, max_replicas_per_worker=None, **options).bind()
    return serve.run(app, route_prefix=None, client=client, timeout=30)


def in_flight(client: Client) -> int:
    """Calls of this session that are at replicas."""
    from dask_serve.routing.session import Session

    router = Session.of(client).engine()[1].routers.get("default/Model")
    return 0 if router is None else router.in_flight


# -- kill -9


def test_a_killed_worker(processes):
    processes.scheduler()
    workers = [processes.worker("--no-nanny") for _ in range(2)]
    with Client(processes.address) as client:
        handle = two_replicas(client, max_ongoing_requests=12)
        # 24 run, 12 on each worker (which may have taken one more ahead), and the others wait here.
        refs = [handle.nap.remote(1.5) for _ in range(30)]
        before = ready(client)
        wait_until(lambda: in_flight(client) >= 24)
        victim = workers[0]
        victim.kill()
        lost = 0
        for ref in refs:
            try:
                assert ref.result(timeout=10) != victim.pid
            except ReplicaLostError:
                lost += 1
        assert lost in (12, 13)
        # The table follows, and a replacement is started on the other worker.
        wait_until(lambda: len(ready(client)) == 2 and len(set(ready(client)) & set(before)) == 1)
        assert {handle.pid.remote().result(timeout=5) for _ in range(20)} == {workers[1].pid}


def test_calls_at_a_killed_worker_fail_within_a_second(processes):
    processes.scheduler()
    workers = [processes.worker("--no-nanny") for _ in range(2)]
    with Client(processes.address) as client:
        handle = two_replicas(client)
        refs = [handle.nap.remote(60) for _ in range(40)]
        with Load(handle) as load:
            load.goes_on()
            assert set(load.pids) == {worker.pid for worker in workers}
            workers[0].kill()
            killed = time.monotonic()
            wait_until(lambda: sum(ref.done() for ref in refs) > 10)
            took = time.monotonic() - killed
            count = len(load.pids)
            load.goes_on()
            assert workers[0].pid not in load.pids[count + 4 :]
        assert took < 1.0
        assert all(isinstance(error, ReplicaLostError) for error in load.errors)
        # At most those that were there when it died; none was sent there after.
        assert len(load.errors) <= 4
        for ref in refs:
            if ref.done():
                with pytest.raises(ReplicaLostError, match="connection"):
                    ref.result(timeout=1)
            else:
                ref.cancel()


def test_user_code_that_ends_its_process(processes):
    processes.scheduler()
    processes.worker()
    with Client(processes.address) as client:
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        first = handle.pid.remote().result(timeout=5)
        napping = handle.nap.remote(60)
        with pytest.raises(ReplicaLostError):
            handle.exit.remote().result(timeout=5)
        with pytest.raises(ReplicaLostError):
            napping.result(timeout=5)
        # The nanny makes a new worker, and the controller a new replica there; until then calls wait.
        assert handle.pid.remote().result(timeout=20) != first


# -- SIGTERM


@pytest.mark.parametrize("nanny", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_terminated_worker_fails_no_request(processes, nanny):
    processes.scheduler()
    workers = [processes.worker(*[] if nanny else ["--no-nanny"]) for _ in range(2)]
    with Client(processes.address) as client:
        handle = two_replicas(client)
        refs = [handle.nap.remote(1.5) for _ in range(20)]
        with Load(handle) as load:
            load.goes_on()
            before = ready(client)
            workers[0].terminate()
            # It leaves the table while it still finishes what it has.
            wait_until(lambda: len(set(ready(client)) & set(before)) == 1)
            assert workers[0].poll() is None
            pids = [ref.result(timeout=10) for ref in refs]
            assert len(set(pids)) == 2
            assert workers[0].wait(15) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            wait_until(lambda: len(ready(client)) == 2)
            load.goes_on()
        assert not load.errors


@pytest.mark.slow
def test_code_that_never_returns_does_not_keep_a_worker(processes):
    processes.scheduler()
    worker = processes.worker("--no-nanny")
    with Client(processes.address) as client:
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        ref = handle.block.remote(3600)
        wait_until(lambda: in_flight(client) == 1)
        worker.terminate()
        with pytest.raises(ReplicaLostError):
            ref.result(timeout=15)
        worker.wait(15)


@pytest.mark.slow
def test_restart(processes):
    processes.scheduler()
    processes.worker()
    with Client(processes.address) as client:
        handle = serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        first = handle.pid.remote().result(timeout=5)
        running = handle.nap.remote(0.5)
        wait_until(lambda: in_flight(client) == 1)
        client.restart(timeout=30)
        assert running.result(timeout=5) == first
        assert handle.pid.remote().result(timeout=20) != first


# -- the scheduler


def test_a_killed_scheduler(processes):
    """Workers end with their scheduler, as Dask has it; a new one takes over the port."""
    scheduler = processes.scheduler("--preload", "dask_serve.preload")
    worker = processes.worker("--no-nanny")
    client = Client(processes.address, timeout=10)
    # Its worker does not wait long for them when it ends.
    handle = serve.run(Model.options(graceful_shutdown_timeout_s=0.5).bind(), client=client, timeout=30)
    url = serve.url(client=client)
    assert fetch(url) == f"served by {worker.pid}"
    proxies = psutil.Process(scheduler.pid).children(recursive=True)
    proxies = [process for process in proxies if "dask_serve.proxy" in " ".join(process.cmdline())]
    assert proxies
    refs = [handle.nap.remote(60) for _ in range(10)]
    wait_until(lambda: in_flight(client) == 10)
    os.kill(scheduler.pid, signal.SIGKILL)
    for ref in refs:
        with pytest.raises(RequestError):
            ref.result(timeout=10)
    worker.wait(20)
    # Nothing is forgotten either by those who call now.
    waiting = handle.nap.remote(0)
    client.close()
    with pytest.raises(RequestError):
        waiting.result(timeout=10)

    port = url.rpartition(":")[2]
    processes.scheduler("--preload", "dask_serve.preload", "--serve-port", port)
    worker = processes.worker("--no-nanny")
    _, alive = psutil.wait_procs(proxies, timeout=10)
    assert not alive
    with Client(processes.address) as client:
        serve.run(Model.bind(), client=client, timeout=30)
        assert serve.url(client=client) == url
        assert fetch(url) == f"served by {worker.pid}"


# -- sessions

MYMODELS = """
import dask_serve as serve
from helpers import shout

@serve.deployment
class Greeter:
    def __init__(self, greeting):
        self.greeting = greeting
    def __call__(self, request):
        return shout(f"{self.greeting} {request.query_params.get('name', 'world')}")
    def greet(self, name):
        return shout(f"{self.greeting} {name}")
"""

FIRST = """
import sys
from distributed import Client
import dask_serve as serve
from mymodels import Greeter

client = Client(sys.argv[1])
handle = serve.run(Greeter.bind("hello"), name="english", route_prefix="/en", timeout=30)
other = serve.run(Greeter.bind("salut"), name="french", route_prefix="/fr", timeout=30)
print(handle.greet.remote("Ann").result(timeout=5), other.greet.remote("Ann").result(timeout=5))
print(serve.url())
"""

SECOND = """
import sys
from distributed import Client
import dask_serve as serve

client = Client(sys.argv[1])
handle = serve.get_app_handle("english")
print(handle.greet.remote("Bob").result(timeout=5))
serve.delete("english")
print(sorted(serve.status().applications))
"""


def session(processes: Processes, directory: Path, script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), processes.address],
        cwd=directory,
        env=processes.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\n")


@pytest.mark.parametrize("preload", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_one_session_deploys_another_finds(processes, tmp_path, preload):
    processes.scheduler(*["--preload", "dask_serve.preload", "--serve-port", "0"] if preload else [])
    processes.worker()
    home = tmp_path / "home"
    home.mkdir()
    (home / "mymodels.py").write_text(MYMODELS)
    (home / "helpers.py").write_text("def shout(text):\n    return text.upper() + '!'\n")
    greetings, url, *_ = session(processes, home, FIRST)
    assert greetings == "HELLO ANN! SALUT ANN!"
    # That session has ended; the service has not.
    assert fetch(f"{url}/en?name=Eve") == "HELLO EVE!"
    assert fetch(f"{url}/fr") == "SALUT WORLD!"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert session(processes, elsewhere, SECOND)[:2] == ["HELLO BOB!", "['french']"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(f"{url}/en")
    assert fetch(f"{url}/fr") == "SALUT WORLD!"


# -- the package is missing

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dask_serve":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


def test_a_worker_without_the_package(processes):
    (processes.place / "block.py").write_text(BLOCK)
    processes.scheduler()
    processes.worker("--preload", str(processes.place / "block.py"), "--no-nanny")
    with Client(processes.address) as client:
        with pytest.raises(DeploymentFailedError) as info:
            serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
        [address] = client.scheduler_info()["workers"]
    assert address in str(info.value)
    assert "pip install dask-serve" in str(info.value)


def test_a_scheduler_without_the_package(processes):
    (processes.place / "block.py").write_text(BLOCK)
    processes.scheduler("--preload", str(processes.place / "block.py"))
    processes.worker("--no-nanny")
    with Client(processes.address) as client:
        with pytest.raises((NotRunningError, ConfigError)) as info:
            serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
    assert processes.address in str(info.value)
    assert "pip install dask-serve" in str(info.value)
