"""``dask serve`` on a cluster that runs: what each command does and prints, with real processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from distributed import Client, LocalCluster
from distributed.security import Security
from helpers import http_client, wait_until

import dask_serve as serve
from dask_serve.cli import serve as cli

ROOT = Path(__file__).parents[1]


@serve.deployment
class Loud:
    def __init__(self) -> None:
        self.log = logging.getLogger("loud")
        self.log.setLevel(logging.INFO)

    def __call__(self, request: Any) -> str:
        self.log.info("asked for %s", request.url.path)
        if request.url.path.endswith("/bad"):
            raise ValueError("a bad path")
        return "heard"


@serve.deployment
class Pair:
    def __call__(self, request: Any, other: int) -> str:
        return "never"


@pytest.fixture(scope="module")
def address(shared_cluster: str) -> Iterator[str]:
    """A cluster with two applications: one with a fixed number of replicas, one that follows its load."""
    with Client(shared_cluster, set_as_default=False) as client:
        serve.start(port=0, client=client)
        serve.run(Loud.bind(), name="shop", route_prefix="/shop", client=client)
        auto = Loud.options(name="Auto", autoscaling_config={"min_replicas": 1, "max_replicas": 3})
        serve.run(auto.bind(), name="auto", route_prefix="/auto", client=client)
        yield shared_cluster
        serve.shutdown(client=client)


@pytest.fixture
def dask(address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command on that cluster, in this process, and return its result."""

    def run(*arguments: str, code: int = 0, color: bool = False) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--scheduler", address], color=color)
        assert result.exit_code == code, (result.output, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return run


@contextlib.contextmanager
def process(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Start a command as a process; the list has the lines that it has printed so far."""
    running = subprocess.Popen(
        [sys.executable, "-c", "from dask_serve.cli import serve; serve(prog_name='dask serve')", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        start_new_session=True,
    )
    lines: list[str] = []
    assert running.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(running.stdout,), daemon=True)
    reader.start()
    try:
        yield running, lines
    finally:
        running.kill()
        running.wait()
        reader.join()
        running.stdout.close()


def has(lines: list[str], text: str) -> Any:
    return wait_until(lambda: [line for line in lines if text in line])


# -- status ------------------------------------------------------------------------------------------------------------


def test_status_is_a_table(dask):
    lines = dask("status").stdout.splitlines()
    assert lines[0].startswith("HTTP at http://127.0.0.1:")
    assert lines[1].split() == ["APPLICATION", "DEPLOYMENT", "STATE", "REPLICAS", "REVISION", "MESSAGE"]
    assert lines[2].split()[:6] == ["auto", "Auto", "running", "1/1", "of", "1-3"]
    assert lines[3].split()[:4] == ["shop", "Loud", "running", "1/1"]
    # Columns stand below each other.
    assert {line.index(word) for line, word in zip(lines[1:4], ("STATE", "running", "running"), strict=True)} == {
        lines[1].index("STATE")
    }


def test_status_of_one_application_with_replicas(dask):
    told = dask("status", "shop", "-v").stdout
    assert "auto" not in told.partition("WORKERS")[0]
    (replica,) = (line for line in told.splitlines() if line.startswith("shop/Loud/"))
    assert replica.split()[1] == "ready"
    assert replica.split()[2].startswith("tcp://")
    assert "PROXIES" in told
    assert "no application 'nope'\napplications: auto, shop" in dask("status", "nope", code=1).stderr


def test_status_for_programs(dask):
    as_json = json.loads(dask("status", "--json").stdout)
    as_yaml = yaml.safe_load(dask("status", "--yaml").stdout)
    assert as_json["applications"].keys() == as_yaml["applications"].keys() == {"shop", "auto"}
    assert as_json["applications"]["shop"]["deployments"]["Loud"]["counts"] == {"ready": 1}
    dask("status", "--json", "--yaml", code=2)


def test_status_has_colours_on_terminals_only(dask, monkeypatch):
    assert "\x1b[32mrunning" in dask("status", color=True).stdout
    assert "\x1b" not in dask("status").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    for command in ("status", "doctor"):
        assert "\x1b" not in dask(command, color=True).stdout


def test_status_checks(dask, address):
    dask("status", "--check")
    dask("status", "--check", "--watch", code=2)
    with Client(address, set_as_default=False) as client:
        serve.run(
            Loud.options(resources={"nowhere": 1}).bind(), name="stuck", wait=False, route_prefix=None, client=client
        )
        told = dask("status", "stuck", "--check", code=1).stdout
        assert "deploying" in told
        dask("status", "shop", "--check")
        dask("delete", "stuck")


def test_status_watches(dask, address):
    with process("status", "shop", "--watch", "--scheduler", address) as (running, lines):
        has(lines, "1/1")
        dask("scale", "shop/Loud", "2")
        has(lines, "2/2")
        dask("scale", "shop", "1")
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 0


# -- scale -------------------------------------------------------------------------------------------------------------


def replicas(client: Client, app: str = "shop", deployment: str = "Loud") -> set[str]:
    found = serve.status(client=client).applications[app].deployments[deployment].replicas
    return {replica.id for replica in found if replica.state == "ready"}


def test_scale_is_in_place_and_noted(dask, address):
    with Client(address, set_as_default=False) as client:
        before = replicas(client)
        told = dask("scale", "shop/Loud", "2").stdout
        assert "scaled Loud from 1 to 2 by " in told
        assert before < replicas(client)
        assert len(replicas(client)) == 2
        # The same again is no other version.
        versions = serve.history("shop", client=client)
        assert "scaled Loud from 1 to 2" in dask("scale", "shop", "2").stdout
        assert len(serve.history("shop", client=client)) == len(versions)
        assert "rolled back" in dask("rollback", "shop").stdout
        wait_until(lambda: len(replicas(client)) == 1)


@pytest.mark.parametrize(
    ("arguments", "code", "first", "second"),
    [
        (
            ("auto", "2"),
            1,
            "auto/Auto cannot be scaled to 2: it follows its load, between 1 and 3 replicas",
            "deploy it",
        ),
        (("shop/Nope", "2"), 1, "application 'shop' has no deployment 'Nope'", "it has Loud"),
        (("nope", "2"), 1, "there is no application 'nope'", "applications: "),
        (("shop", "0"), 2, "Invalid value for 'NUMBER': 0 is not in the range x>=1.", "`serve scale --help` tells"),
        (("shop",), 2, "Missing argument 'NUMBER'.", "`serve scale --help` tells"),
    ],
)
def test_what_cannot_be_scaled(dask, arguments, code, first, second):
    one, two = dask("scale", *arguments, code=code).stderr.splitlines()
    assert one.startswith(f"Error: {first}")
    assert two.startswith(second)


def test_scale_in_a_session(address):
    with Client(address, set_as_default=False) as client:
        with pytest.raises(serve.ConfigError, match="is no number of replicas"):
            serve.scale("shop/Loud", "many", client=client)
        owner = serve.run(Loud.bind(), name="mine", route_prefix=None, client=client)
        with owner:
            with Client(address, set_as_default=False) as other:
                serve.scale("mine", 2, client=other)
                by = serve.history("mine", client=other)[-1]
                assert (by.reason, by.current) == ("scaled Loud from 1 to 2", True)
        # It ends with the session that deployed it, whoever scaled it.
        assert "mine" not in serve.status(client=client).applications


# -- logs --------------------------------------------------------------------------------------------------------------


def ask(address: str, path: str) -> int:
    with Client(address, set_as_default=False) as client:
        url = serve.url(client=client)
    with http_client(url) as http:
        return http.get(path).status_code


def test_logs_of_replicas(dask, address):
    assert ask(address, "/shop/one") == 200
    assert ask(address, "/auto/bad") == 500
    told = dask("logs", "shop/Loud").stdout.splitlines()
    (line,) = (line for line in told if "asked for /shop/one" in line)
    _, _, level, replica, logger, *_ = line.split()
    assert (level, logger) == ("INFO", "loud:")
    assert re.search(r" asked for /shop/one \[[0-9a-f]+-[0-9a-f]+\]$", line)
    assert replica.startswith("shop/Loud/")
    assert not any("/auto/" in line for line in told)
    assert dask("logs", replica, "--tail", "1").stdout.splitlines()[-1] == line
    errors = dask("logs", "auto", "--level", "error").stdout
    assert "ValueError: a bad path" in errors
    assert "INFO" not in errors
    assert dask("logs", "shop", "--tail", "0").stdout == ""
    assert "there is no nope, nor a record of it" in dask("logs", "nope", code=1).stderr


def test_logs_for_programs(dask, address):
    ask(address, "/shop/json")
    records = [json.loads(line) for line in dask("logs", "--json").stdout.splitlines()]
    (found,) = (record for record in records if record["message"] == "asked for /shop/json")
    assert (found["application"], found["deployment"], found["level"]) == ("shop", "Loud", "INFO")
    assert found["source"].startswith("tcp://")
    assert found["request_id"]
    # The oldest first.
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)


def test_logs_follow(dask, address):
    with process("logs", "shop", "--follow", "--tail", "0", "--scheduler", address, "--json") as (running, lines):
        # Whenever it has begun to follow, it prints what comes then.
        numbers = iter(range(10_000))
        wait_until(lambda: ask(address, f"/shop/follow-{next(numbers)}") and lines)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 0
    assert "asked for /shop/follow-" in lines[0]
    assert len(lines) == len(set(lines))


# -- config, doctor ----------------------------------------------------------------------------------------------------


def test_config_is_a_document(dask):
    document = yaml.safe_load(dask("config").stdout)
    assert {entry["name"] for entry in document["applications"]} == {"shop", "auto"}


def test_doctor_finds_a_sound_cluster_sound(dask):
    told = dask("doctor").stdout
    assert "wrong" not in told
    for subject in ("scheduler", "workers", "versions", "doors", "application shop"):
        assert f"ok     {subject}: " in told, told
    plain = json.loads(dask("doctor", "--json").stdout)
    assert plain["well"]
    assert len(plain["processes"]) >= 4
    assert all(found["versions"]["dask_serve"] == serve.__version__ for found in plain["processes"].values())


def test_doctor_finds_a_worker_without_the_package(address, dask, tmp_path):
    # Installed or not, this one is found first.
    missing = "raise ModuleNotFoundError(\"No module named 'dask_serve'\", name='dask_serve')\n"
    (tmp_path / "dask_serve.py").write_text(missing)
    worker = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_worker",
            address,
            "--no-nanny",
            "--no-dashboard",
            "--name",
            "bare",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Client(address, set_as_default=False) as client:
            wait_until(lambda: client.run_on_scheduler(lambda dask_scheduler: "bare" in dask_scheduler.aliases))
        told = dask("doctor", code=1).stdout
        assert "dask_serve cannot be imported there\n       install it there: pip install dask-serve==" in told
        assert "have dask_serve and answer" in told
    finally:
        worker.terminate()
        worker.wait(timeout=30)


def test_certificates(tmp_path):
    security = Security.temporary()
    options = []
    for option, text in (
        ("--tls-ca-file", security.tls_ca_file),
        ("--tls-cert", security.tls_client_cert),
        ("--tls-key", security.tls_client_key),
    ):
        path = tmp_path / option
        path.write_text(text)
        options += [option, str(path)]
    with LocalCluster(
        n_workers=1, processes=False, protocol="tls", security=security, dashboard_address=":0"
    ) as cluster:
        address = cluster.scheduler_address
        told = CliRunner().invoke(cli, ["doctor", "--scheduler", address, *options])
        assert "the scheduler's certificate is good for" in told.stdout, told.output
        assert "ok     workers: 1 of 1" in told.stdout
        assert "dask_serve does not run there yet" in told.stdout
        assert told.exit_code == 0
        assert "no applications" in CliRunner().invoke(cli, ["status", "--scheduler", address, *options]).stdout
        # Without certificates nobody gets in.
        refused = CliRunner().invoke(cli, ["status", "--scheduler", address.replace("tls://", "tcp://")])
        assert refused.exit_code == 1
        assert "does not answer as a Dask scheduler" in refused.stderr
        assert "tls://" in refused.stderr


# -- answers that say what is wrong ------------------------------------------------------------------------------------


def test_a_call_that_needs_more_than_a_request_says_so(address):
    with Client(address, set_as_default=False) as client:
        serve.run(Pair.bind(), name="pair", route_prefix="/pair", client=client)
        with http_client(serve.url(client=client)) as http:
            answer = http.get("/pair")
        assert answer.status_code == 500
        assert "__call__ of deployment 'pair/Pair' cannot answer HTTP requests" in answer.json()["message"]
        assert "it needs 'other'" in answer.json()["message"]
        serve.delete("pair", client=client)
