"""The file that tells users where HTTP is served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from distributed.utils_test import gen_test
from helpers import wait_until
from test_deaths import Processes

from dask_serve.cli import serve as cli
from dask_serve.controller.service_file import ServiceFile
from dask_serve.exceptions import ConfigError


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


def told(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def test_it_is_there_while_the_service_is(processes, tmp_path):
    first, second = tmp_path / "service.json", tmp_path / "other.json"
    any_port = ("--serve-host", "0.0.0.0", "--serve-port", "0")
    scheduler = processes.scheduler("--preload", "dask_serve.preload", *any_port, "--service-file", str(first))
    service = wait_until(lambda: told(first))
    assert service["scheduler"] == processes.address
    assert service["host"] == socket.gethostname()
    assert service["pid"] == scheduler.pid
    assert service["url"].startswith("http://127.0.0.1:"), "as the scheduler's address"
    assert httpx.get(f"{service['url']}/-/healthz", trust_env=False).status_code == 200

    code = "import sys; from dask_serve.cli import serve; serve(sys.argv[1:])"
    options = ("--scheduler", processes.address, "--port", "0", "--service-file", str(second))
    proxy = processes.start("-c", code, "proxy", *options)
    elsewhere = wait_until(lambda: told(second))
    assert elsewhere["pid"] == proxy.pid
    assert elsewhere["url"] != service["url"]
    assert httpx.get(f"{elsewhere['url']}/-/healthz", trust_env=False).status_code == 200
    for process, file in ((proxy, second), (scheduler, first)):
        process.terminate()
        process.wait(15)
        assert not file.exists()


@gen_test()
async def test_as_others_call_this_node(tmp_path):
    file = ServiceFile(str(tmp_path / "f"), "tcp://10.0.0.7:1", "10.0.0.7")
    for listens, url, seen in (
        ("0.0.0.0", "http://127.0.0.1:8000", "http://10.0.0.7:8000"),
        ("::", "https://[::1]:8000", "https://10.0.0.7:8000"),
        ("node7", "http://node7:8000", "http://node7:8000"),
        ("127.0.0.1", "http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    ):
        assert await file.tell(url, listens) == ""
        assert told(file.path)["url"] == seen
    six = ServiceFile(str(tmp_path / "6"), "tcp://[fd00::7]:1", "fd00::7")
    await six.tell("http://127.0.0.1:8000", "0.0.0.0")
    assert told(six.path)["url"] == "http://[fd00::7]:8000"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "f"]


@gen_test()
async def test_the_file_of_the_next_service_stays(tmp_path):
    path = tmp_path / "f"
    before, after = (ServiceFile(str(path), f"tcp://10.0.0.{n}:1", f"10.0.0.{n}") for n in (1, 2))
    await before.tell("http://a:1", "a")
    await after.tell("http://b:1", "b")
    assert await before.tell("", "") == ""
    assert told(path)["url"] == "http://b:1"
    await after.tell("", "")
    await after.tell("", "")
    assert not path.exists()


@gen_test()
async def test_what_cannot_be_written_is_told(tmp_path):
    directory = tmp_path / "d"
    directory.mkdir()
    file = ServiceFile(str(directory / "f"), "tcp://10.0.0.1:1", "10.0.0.1")
    directory.rmdir()
    wrong = await file.tell("http://a:1", "a")
    assert wrong.startswith(f"the service file {directory / 'f'} could not be written: ")
    # It is tried again with the next news.
    directory.mkdir()
    assert await file.tell("http://a:1", "a") == ""
    assert told(file.path)["url"] == "http://a:1"


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match=r"--service-file .* is a directory: name a file in it"):
        ServiceFile(str(tmp_path), "tcp://10.0.0.1:1", "10.0.0.1")
    options = ["--scheduler", "tcp://127.0.0.1:1", "--service-file", str(tmp_path / "gone" / "f")]
    done = CliRunner().invoke(cli, ["proxy", *options])
    assert done.exit_code == 1
    assert f"there is no directory {tmp_path / 'gone'}\nmake it, or name another file" in done.output
