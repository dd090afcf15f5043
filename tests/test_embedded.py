"""The embedded cluster as processes: started, killed, interrupted, and gone. Its controller is a stand-in here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import httpx
import psutil
import pytest
from distributed import Client
from helpers import wait_until

from dask_serve.embedded import EmbeddedCluster
from dask_serve.exceptions import ServeError
from dask_serve.launcher.workers import Growth, restart_delay

ROOT = Path(__file__).parents[1]

#: What `dask_serve.preload` does, as far as the processes are concerned.
STAND_IN = """
import os
from pathlib import Path
from distributed.diagnostics.plugin import SchedulerPlugin

class Controller(SchedulerPlugin):
    name = "dask-serve"

    async def start(self, scheduler):
        scheduler.handlers["serve_shutdown"] = self.shutdown
        self.scheduler = scheduler

    @property
    def registry(self):
        return self

    @property
    def unplaced(self):
        missing = int(os.environ.get("WANTED_WORKERS", 0)) - len(self.scheduler.workers)
        return {"app/model": (missing, "why")} if missing > 0 else {}

    async def shutdown(self):
        clients = [name for name in self.scheduler.clients if name.startswith("Client-")]
        text = f"{len(self.scheduler.workers)} workers, {len(clients)} clients"
        Path(__file__).with_name("drained").write_text(text)
        return {}

def dask_setup(scheduler):
    scheduler.add_plugin(Controller())
"""

#: How a session begins that the tests kill or interrupt; note that it has no ``__main__`` guard.
SESSION = """
import json, os, signal, sys, time
from dask_serve.embedded import EmbeddedCluster
from distributed import Client

EmbeddedCluster._preload = "stand_in"
cluster = EmbeddedCluster.start(n_workers=1, dashboard_address=None)
client = Client(cluster.scheduler_address)
client.wait_for_workers(1)
print(json.dumps({"pid": cluster.pid, "directory": cluster._directory}), flush=True)
"""

#: A session with all that is real, which ends when it may read a line.
SERVING = """
import dask_serve as serve

@serve.deployment
class Model:
    def __call__(self, request):
        return "served"

serve.start(port=0)
serve.run(Model.bind())
print(serve.url(), flush=True)
input()
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(EmbeddedCluster, "_preload", "stand_in")
    return tmp_path


@contextlib.contextmanager
def embedded(**options: Any) -> Iterator[tuple[EmbeddedCluster, Client]]:
    options = {"n_workers": 1, "dashboard_address": None, **options}
    with EmbeddedCluster.start(**options) as cluster, Client(cluster.scheduler_address) as client:
        client.wait_for_workers(options["n_workers"], timeout=20)
        yield cluster, client


def members(group: int) -> list[psutil.Process]:
    """Return the processes of a process group that are alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def assert_nothing_left(pid: int, directory: str | None) -> None:
    wait_until(lambda: not members(pid))
    assert directory is not None
    wait_until(lambda: not Path(directory).exists())


@contextlib.contextmanager
def session(body: str, path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a script with an embedded cluster in a process group of its own."""
    script = path / "session.py"
    script.write_text(SESSION + textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=path,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def test_starts_computes_and_leaves_nothing(stand_in: Path) -> None:
    seen: list[str] = []
    with embedded(n_workers=2, nthreads=3, progress=seen.append) as (cluster, client):
        assert client.submit(lambda x: x + 1, 1).result(timeout=10) == 2
        wait_until(lambda: "2 workers" in repr(cluster))
        assert cluster.scheduler_address.startswith("tcp://127.0.0.1:")
        assert cluster.dashboard_link is None
        assert list(client.nthreads().values()) == [3, 3]
        assert {worker["name"] for worker in client.scheduler_info()["workers"].values()} == {"worker-0", "worker-1"}
        assert len(members(cluster.pid)) == 3
    assert not cluster.alive
    assert "closed" in repr(cluster)
    assert_nothing_left(cluster.pid, cluster._directory)
    assert (stand_in / "drained").read_text().startswith("2 workers")
    assert any("scheduler at tcp://" in line for line in seen)
    assert "worker-1 is up" in seen


def test_close_drains_then_closes_clients_and_is_idempotent(stand_in: Path) -> None:
    cluster = EmbeddedCluster.start(n_workers=1, dashboard_address=None)
    client = Client(cluster.scheduler_address)
    client.wait_for_workers(1)
    cluster.close()
    assert (stand_in / "drained").read_text() == "1 workers, 1 clients"
    assert client.status == "closed"
    cluster.close()
    assert_nothing_left(cluster.pid, cluster._directory)


def test_script_without_close_ends_silently(tmp_path: Path) -> None:
    with session("print(client.submit(sum, [1, 2]).result(), flush=True)", tmp_path) as (process, info):
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert (out, err) == ("3\n", "")
        assert (tmp_path / "drained").read_text() == "1 workers, 1 clients"
        assert_nothing_left(info["pid"], info["directory"])


def test_killed_session_is_drained(tmp_path: Path) -> None:
    with session("time.sleep(600)", tmp_path) as (process, info):
        process.kill()
        assert_nothing_left(info["pid"], info["directory"])
        assert (tmp_path / "drained").exists()


def test_forked_child_neither_ends_nor_keeps_the_cluster(tmp_path: Path) -> None:
    body = """
    if os.fork() == 0:
        sys.exit()  # runs the exit hooks it inherited
    os.wait()
    sleeper = os.fork()
    if sleeper == 0:
        time.sleep(600)
    print(client.submit(sum, [1, 2]).result(), sleeper, flush=True)
    time.sleep(600)
    """
    with session(body, tmp_path) as (process, info):
        assert process.stdout is not None
        result, sleeper = process.stdout.readline().split()
        try:
            assert result == "3"
            process.kill()
            assert_nothing_left(info["pid"], info["directory"])
        finally:
            os.kill(int(sleeper), signal.SIGKILL)


def test_interrupt_does_not_reach_the_cluster(tmp_path: Path) -> None:
    body = """
    try:
        print("sleeping", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print(client.submit(sum, [1, 2]).result(timeout=10), len(client.nthreads()), flush=True)
    """
    with session(body, tmp_path) as (process, info):
        before = {member.pid for member in members(info["pid"])}
        assert process.stdout is not None
        # Before that the interrupt would end the script.
        assert process.stdout.readline().split() == ["sleeping"]
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline().split() == ["3", "1"]
        assert process.wait(timeout=20) == 0
        assert len(before) == 2
        assert_nothing_left(info["pid"], info["directory"])


def test_killed_host_takes_its_workers_along() -> None:
    cluster = EmbeddedCluster.start(n_workers=1, dashboard_address=None)
    try:
        wait_until(lambda: len(members(cluster.pid)) == 2)
        os.kill(cluster.pid, signal.SIGKILL)
        wait_until(lambda: not cluster.alive)
        assert_nothing_left(cluster.pid, cluster._directory)
    finally:
        cluster.close()


@pytest.mark.slow
def test_workers_of_a_killed_session_and_host_end_though_user_code_runs(tmp_path: Path) -> None:
    body = """
    def hang():
        import threading, time
        threading.Thread(target=time.sleep, args=(600,), daemon=False).start()

    client.submit(hang).result()
    print(flush=True)
    time.sleep(600)
    """
    with session(body, tmp_path) as (process, info):
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        os.kill(info["pid"], signal.SIGKILL)
        assert_nothing_left(info["pid"], info["directory"])


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_session_that_serves_takes_its_proxies_along(tmp_path: Path, end: str) -> None:
    (tmp_path / "serving.py").write_text(SERVING)
    process = subprocess.Popen(
        [sys.executable, "serving.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        assert httpx.get(url, timeout=10).text == "served"
        if end == "kill":
            process.kill()
        _, err = process.communicate("\n" if end == "exit" else None, timeout=30)
        assert err == ""
        assert process.returncode == (0 if end == "exit" else -signal.SIGKILL)
        wait_until(lambda: not [member for member in family if alive(member)])
    finally:
        process.kill()
        process.communicate()


def test_killed_worker_is_restarted() -> None:
    seen: list[str] = []
    with embedded(progress=seen.append) as (_, client):
        (before,) = client.run(os.getpid).values()
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: seen.count("worker-0 is up") == 2)
        (after,) = client.run(os.getpid).values()
        assert after != before
        assert "worker-0 ended (signal 9) and is started again" in seen


def test_client_shutdown_ends_everything() -> None:
    seen: list[str] = []
    with embedded(progress=seen.append) as (cluster, client):
        client.shutdown()
        wait_until(lambda: not cluster.alive)
        assert_nothing_left(cluster.pid, cluster._directory)
    assert seen.count("worker-0 is up") == 1


def test_grows_when_the_controller_cannot_place_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANTED_WORKERS", "2")
    with embedded() as (_, client):
        client.wait_for_workers(2, timeout=20)


def test_growth_tries_one_worker_before_the_rest() -> None:
    growth = Growth()
    # One helps, so the rest follow; while they settle, nothing more is started.
    assert [growth.more(waiting) for waiting in (3, 3, 2, 2, 0, 0)] == [1, 0, 2, 0, 0, 0]
    # None helps: one is tried, and another one when more replicas wait.
    assert [growth.more(waiting) for waiting in (4, 4, 4, 5, 5)] == [1, 0, 0, 1, 0]


def test_workers_get_configuration_and_environment_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SOME_MODEL_HOME", "there")
    with dask.config.set({"some.option": [1, 2]}), embedded() as (_, client):

        def look() -> tuple[Any, ...]:
            return dask.config.get("some.option"), os.environ.get("OMP_NUM_THREADS"), os.environ["SOME_MODEL_HOME"]

        ((option, threads, home),) = client.run(look).values()
        assert (list(option), threads, home) == ([1, 2], None, "there")


def test_a_controller_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddedCluster, "_preload", "no_such_preload")
    before = set(psutil.Process().children())
    with pytest.raises(ServeError, match="No module named 'no_such_preload'"):
        EmbeddedCluster.start(n_workers=1)
    assert set(psutil.Process().children()) <= before


def test_dashboard_takes_another_port_and_loads_on_demand() -> None:
    pytest.importorskip("bokeh")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        with embedded(dashboard_address=f"127.0.0.1:{busy}") as (cluster, client):
            link = cluster.dashboard_link
            assert link is not None
            assert f":{busy}/" not in link
            assert not client.run_on_scheduler(lambda: "bokeh" in sys.modules)
            page = httpx.get(link, follow_redirects=True, timeout=30)
            assert page.status_code == 200
            assert "bokeh" in page.text.lower()
            assert httpx.get(link.replace("/status", "/no-such-page")).status_code == 404


def test_restart_delay_grows_to_a_bound() -> None:
    delays = [restart_delay(failures) for failures in range(12)]
    assert delays[:4] == [0.0, 0.0, 0.25, 0.5]
    assert delays == sorted(delays)
    assert delays[-1] == 15.0
