"""What `dask serve doctor` makes of what processes tell; on a cluster that runs: test_command_line."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from dask_serve.checkup import facts, knock_all
from dask_serve.cli.connecting import Cluster
from dask_serve.cli.examination import Examination


@pytest.fixture
def examination() -> Examination:
    examination = Examination(Cluster())
    examination.processes["scheduler"] = facts()
    return examination


def told(examination: Examination) -> list[tuple[str, str, str]]:
    return [(found.state, found.subject, found.message) for found in examination.findings]


def test_versions_that_agree(examination):
    examination._versions(None)
    ((state, subject, message),) = told(examination)
    assert (state, subject) == ("ok", "versions")
    assert message.startswith("2 processes agree: python 3.")


@pytest.mark.parametrize(
    ("package", "version", "state"),
    [
        ("dask_serve", "0.0.1", "wrong"),
        ("distributed", "2020.1.0", "wrong"),
        ("python", "3.9.1", "wrong"),
        ("msgspec", "0.1.0", "note"),
        ("cloudpickle", "", "note"),
    ],
)
def test_versions_that_differ(examination, package, version, state):
    other = facts()
    other["versions"][package] = version
    examination.processes["worker tcp://w:1"] = other
    examination._versions(None)
    usual = examination.processes["client"]["versions"][package]
    said = f"it has {package} {version or 'not at all'}, {usual} in others"
    assert told(examination) == [(state, "worker tcp://w:1", said)]


def test_the_last_digit_of_python_does_not_matter(examination):
    other = facts()
    other["versions"]["python"] = ".".join([*other["versions"]["python"].split(".")[:2], "99"])
    examination.processes["worker tcp://w:1"] = other
    examination._versions(None)
    assert [state for state, *_ in told(examination)] == ["ok"]


def test_proxies_of_another_version(examination):
    from dask_serve.controller.status import ProxyStatus, ServeStatus

    rows = [ProxyStatus(state="ready"), ProxyStatus(node="far", version="0.0.1")]
    examination._versions(ServeStatus(proxies=rows))
    assert [(state, subject) for state, subject, _ in told(examination)] == [("wrong", "proxy on far")]


@pytest.mark.parametrize(("away", "wrong"), [(0.0, False), (1.5, False), (-1.5, False), (60.0, True), (-60.0, True)])
def test_clocks(examination, away, wrong):
    now = time.time()
    examination._clock("worker tcp://w:1", now + away, now - 0.1, now + 0.1)
    assert bool(examination.findings) == wrong
    if wrong:
        assert "its clock differs by 59.9 s" in examination.findings[0].message


def test_an_answer_that_took_long_is_no_difference_of_clocks(examination):
    examination._clock("worker tcp://w:1", 100.0, 90.0, 110.0)
    assert not examination.findings


def test_doors_are_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as open_one, socket.create_server(("127.0.0.1", 0)) as closed:
        here, there = (f"tcp://127.0.0.1:{sock.getsockname()[1]}" for sock in (open_one, closed))
        closed.close()
        found = asyncio.run(knock_all([here, there, "tcp://nowhere"]))
    assert found[here] == ""
    assert found[there] == "nobody listens there"
    assert found["tcp://nowhere"]
