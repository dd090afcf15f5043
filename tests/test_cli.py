"""``dask serve``: what it loads, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from distributed import Client
from processes import free_port

import dask_serve as serve
from dask_serve import api, cli, versions
from dask_serve.cli.connecting import Cluster
from dask_serve.cli.loading import load
from dask_serve.cli.serving import INTERRUPTED
from dask_serve.controller.status import ServeStatus
from dask_serve.deployment import Application
from dask_serve.exceptions import ApplicationNotFoundError

ROOT = Path(__file__).parents[1]

MODULE = """
import dask_serve as serve

@serve.deployment
class Hello:
    def __call__(self, request):
        return "hello from the model"

app = Hello.bind()

@serve.deployment
class Broken:
    def __init__(self):
        1 / 0

broken = Broken.bind()

def build():
    return Hello.options(name="Built").bind()
"""

#: The command with an API that deploys nothing: what is tested is how the command starts and ends.
COMMAND = """
import sys, time
from dask_serve import api
from dask_serve.cli import serve

api.start = lambda **options: None
api.url = lambda client: "http://127.0.0.1:8000"
api.run = lambda *arguments, **options: {run}
serve()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provide a working directory with an application in it."""
    (tmp_path / "hello_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("hello_module", None)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.serve, list(arguments))


# -- targets -----------------------------------------------------------------------------------------------------------


def test_loads_an_application_from_the_working_directory(module: Path) -> None:
    assert isinstance(load("hello_module:app"), Application)
    assert sys.path[0] == str(module)


def test_calls_a_builder() -> None:
    assert load("hello_module:build").name == "Built"


# -- commands on a running cluster -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_client(*_: Any) -> Iterator[str]:
    yield "the client"


def test_status_as_text_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "client", _no_client)
    monkeypatch.setattr(api, "status", lambda client: ServeStatus(version=3, url="http://127.0.0.1:8000"))
    assert "HTTP at http://127.0.0.1:8000" in invoke("status").output
    assert json.loads(invoke("status", "--json").output)["version"] == 3


def test_delete_and_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(Cluster, "client", _no_client)
    monkeypatch.setattr(api, "delete", lambda name, client: calls.append(("delete", name, client)))
    monkeypatch.setattr(api, "shutdown", lambda client: calls.append(("shutdown", client)))
    assert invoke("delete", "shop").exit_code == 0
    assert invoke("shutdown").exit_code == 0
    assert calls == [("delete", "shop", "the client"), ("shutdown", "the client")]


def test_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int | None]] = []
    monkeypatch.setattr(Cluster, "client", _no_client)
    monkeypatch.setattr(versions, "rollback", lambda name, version, client: calls.append((name, version)))
    monkeypatch.setattr(versions, "history", lambda name, client: ["version 1", "version 2"])
    assert invoke("rollback", "shop").output == "version 2\n"
    assert invoke("rollback", "shop", "--version", "1").exit_code == 0
    assert calls == [("shop", None), ("shop", 1)]


def test_errors_of_the_service_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, client: Any) -> None:
        raise ApplicationNotFoundError(f"there is no application {name!r}; there are: default")

    monkeypatch.setattr(Cluster, "client", _no_client)
    monkeypatch.setattr(api, "delete", fail)
    result = invoke("delete", "shop")
    assert result.exit_code == 1
    assert result.output == "Error: there is no application 'shop'\nthere are: default\n"


def test_asks_for_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    result = invoke("status")
    assert result.exit_code == 2
    assert "--scheduler ADDRESS" in result.output


# -- run, as a process -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(path: Path, *arguments: str, run: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start ``dask serve`` with ``arguments``; with ``run``, that is done instead of a deployment."""
    script = "from dask_serve.cli import serve; serve()" if run is None else COMMAND.format(run=run)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path,
        # The usual port may be taken, which they would tell.
        env={**os.environ, "PYTHONPATH": str(ROOT), "DASK_SERVE__HTTP__PORT": "0"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(process.communicate())


def assert_all_end(processes: list[psutil.Process], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout

    def alive(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_leaves_nothing(module: Path, signum: int) -> None:
    with command(module, "run", "hello_module:app", "--workers", "1", run="None") as process:
        assert read_until(process, "is ready at") == "default is ready at http://127.0.0.1:8000/\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        # As the terminal does: to the whole process group.
        os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining" in out
        assert err == ""
        assert_all_end(family)


def test_a_signal_during_the_start_drains_too(module: Path) -> None:
    with command(module, "run", "hello_module:app", "--workers", "1", run="time.sleep(600)") as process:
        read_until(process, "deploying default")
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert_all_end(family)


def test_a_second_signal_ends_at_once(module: Path) -> None:
    # The drain hangs, because the host is stopped; the second signal does not wait for it.
    with command(module, "run", "hello_module:app", "--workers", "1", run="None") as process:
        read_until(process, "is ready at")
        family = psutil.Process(process.pid).children(recursive=True)
        (host,) = psutil.Process(process.pid).children()
        host.suspend()
        process.send_signal(signal.SIGINT)
        read_until(process, "draining")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == INTERRUPTED
        assert_all_end(family)


def test_the_end_of_the_cluster_ends_the_command(module: Path) -> None:
    with command(module, "run", "hello_module:app", "--workers", "1", run="None") as process:
        read_until(process, "is ready at")
        family = psutil.Process(process.pid).children(recursive=True)
        (host,) = psutil.Process(process.pid).children()
        host.kill()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Error: the embedded cluster ended by itself" in err
        assert_all_end(family)


def test_serves_until_interrupted(module: Path) -> None:
    with command(module, "run", "hello_module:app", "--port", "0", "--workers", "1") as process:
        url = read_until(process, "is ready at").split()[-1]
        family = psutil.Process(process.pid).children(recursive=True)
        answer = httpx.get(url, timeout=10)
        assert (answer.status_code, answer.text) == (200, "hello from the model")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=40)
        assert process.returncode == 0
        assert err == ""
        assert_all_end(family)


# -- run, on a cluster that runs already -------------------------------------------------------------------------------


def applications(client: Client) -> set[str]:
    return set(serve.status(client=client).applications)


def test_run_on_a_cluster_deletes_what_it_deployed(module: Path, client: Client) -> None:
    port = free_port()
    options = ["--name", "shop", "--route-prefix", "/shop", "--port", str(port)]
    with command(module, "run", "hello_module:app", "--scheduler", client.scheduler.address, *options) as process:
        assert read_until(process, "is ready at") == f"shop is ready at http://127.0.0.1:{port}/shop\n"
        assert httpx.get(f"http://127.0.0.1:{port}/shop", timeout=10).text == "hello from the model"
        assert applications(client) == {"shop"}
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "draining" in out
    assert err == ""
    assert applications(client) == set()


def test_run_reports_a_deployment_that_failed(client: Client) -> None:
    options = ["--scheduler", client.scheduler.address, "--port", "0"]
    result = invoke("run", "hello_module:broken", *options)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output
    assert "Traceback" not in result.output.partition("Error: ")[0]
    assert applications(client) == set()


# -- the import --------------------------------------------------------------------------------------------------------


def test_importing_the_commands_imports_neither_dask_nor_the_web_stack() -> None:
    script = "import dask_serve.cli, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"dask", "distributed", "starlette", "uvicorn", "msgspec", "asyncio"}
