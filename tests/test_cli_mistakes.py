"""What people get wrong on the command line: the first line says what and where, the second what to do."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from distributed import LocalCluster

from dask_serve import cli
from dask_serve.cli import connecting

MODULE = """
import dask_serve as serve

@serve.deployment
class Hello:
    def __call__(self, request):
        return "hello"

app = Hello.bind()
number = 3

def build(times: int, loud: bool = False):
    return Hello.bind()

def breaks():
    raise ValueError("no such model\\nand more")
"""
FILES = {
    "shop.py": MODULE,
    "typo.py": "import dask_serve as serve\n\ndef broken(:\n    pass\n",
    "fails.py": "limit = 1 / 0\n",
    "lacks.py": "import a_module_that_is_not_there\n",
}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def fail(*arguments: str) -> tuple[int, list[str]]:
    """Run a command that cannot be done; return its exit code and the lines that it says."""
    result = CliRunner().invoke(cli.serve, list(arguments))
    assert not result.stdout, result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("Error: ")
    return result.exit_code, [lines[0].removeprefix("Error: "), *lines[1:]]


#: For each: the exit code and the command; how the first line begins, and the second.
MISTAKES = r"""
2 run shop
'shop' does not name an application
write MODULE:APP, e.g. main:app

1 run nope:app
there is no module 'nope' (looked in {cwd} and on sys.path)
start the command in

1 run shop:ap
module 'shop' has no attribute 'ap'
its applications: app

1 run shop:number
shop:number is an int, not an application
an application is what .bind()

1 run shop:Hello
shop:Hello is a Deployment (Hello), not an application
write .bind() behind it

1 run typo:app
module 'typo' cannot be imported: SyntaxError: invalid syntax ({cwd}/typo.py, line 3)
mend

1 run fails:app
module 'fails' cannot be imported: ZeroDivisionError: division by zero ({cwd}/fails.py, line 1)
mend

1 run lacks:app
module 'lacks' cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there'
mend

1 run shop:build
shop:build() needs the arguments times
write them behind it: times=...

1 run shop:build times=many
argument times=many of shop:build() does not fit: Expected `int`
it is annotated as int

1 run shop:build tines=3
shop:build() has no argument 'tines'
it takes times, loud

2 run shop:build 3
'3' is no argument of a builder
write KEY=VALUE, e.g. model=small

1 run shop:app times=3
shop:app is an application, which takes no arguments (times)
name a function

1 run shop:breaks
shop:breaks() raised ValueError: no such model ({cwd}/shop.py, line 16)
--debug shows

2 run shop:app --port http
Invalid value for '--port': 'http' is not a valid integer range.
`serve run --help`

1 run shop:app --http body_limit
'body_limit' is not an option
write NAME=VALUE

2 run shop:app --scheduler tcp://127.0.0.1:1 --workers 2
--workers is for the embedded cluster, and this runs on the cluster at tcp://127.0.0.1:1
leave it out

2 run shop:app --reload-dir .
--reload-dir says what --reload watches
write --reload too

2 statsu
there is no command 'statsu'
did you mean 'status'? The commands: run,

2 status
which cluster? No scheduler is named
give --scheduler ADDRESS or --scheduler-file PATH, or set

2 status --scheduler tcp://a:1 --scheduler-file b
--scheduler and --scheduler-file name two clusters
give one of them

1 status --scheduler-file none.json
the scheduler file none.json cannot be read: No such file or directory
`dask scheduler --scheduler-file

1 status --scheduler-file shop.py
shop.py is no scheduler file: it holds no address
`dask scheduler --scheduler-file

1 status --scheduler here://x:1
here://x:1 is no address of a scheduler (unknown address scheme 'here'
one is like tcp://HOST:8786

1 status --scheduler tcp://127.0.0.1
tcp://127.0.0.1 is no address of a scheduler (missing port number
one is like tcp://HOST:8786

1 status --scheduler tls://127.0.0.1:1
tls://127.0.0.1:1 wants certificates, and none are named
give --tls-ca-file, --tls-cert and --tls-key
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().split("\n\n"), ids=lambda text: text.splitlines()[0][2:])
def test_mistakes(directory, mistake):
    given, first, second = mistake.format(cwd=directory).splitlines()
    code, *arguments = shlex.split(given)
    exit_code, lines = fail(*arguments)
    assert exit_code == int(code)
    assert lines[0].startswith(first), lines
    assert lines[1].startswith(second), lines
    assert len(lines) == 2


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(cli.serve, ["run", "fails:app", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "limit = 1 / 0" in result.stderr
    assert "\nError: module 'fails' cannot be imported" in result.stderr


def test_a_busy_port_is_noticed_before_a_cluster_starts():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        code, lines = fail("run", "shop:app", "--port", port)
    assert code == 1
    assert lines[0] == f"port {port} on 127.0.0.1 is in use by another process"
    assert lines[1].startswith("choose another")


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(connecting, "OPEN_WITHIN", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    code, lines = fail("status", "--scheduler", address)
    assert (code, lines[0]) == (1, f"no scheduler answers at {address}: nobody listens there")
    assert lines[1].startswith("is it running (`dask scheduler`)")


@contextlib.contextmanager
def listening(greeting: bytes) -> Iterator[str]:
    """Something that is no scheduler: it sends a few bytes and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = server.accept()
                    with accepted:
                        accepted.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_what_listens_is_no_scheduler():
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        code, lines = fail("status", "--scheduler", address)
    assert code == 1
    assert lines[0].startswith(f"what listens at {address} does not answer as a Dask scheduler (")
    assert "tls://" in lines[1]


def test_certificates_that_cannot_be_used(tmp_path):
    gone, odd = tmp_path / "gone.pem", tmp_path / "odd.pem"
    odd.write_text("no certificate")
    there = ("status", "--scheduler", "tls://127.0.0.1:1", "--tls-cert", str(odd), "--tls-key", str(odd))
    code, lines = fail(*there, "--tls-ca-file", str(gone))
    assert code == 1
    assert lines[0].endswith(f"{gone} (--tls-ca-file) cannot be read: No such file or directory")
    assert lines[1].startswith("--tls-ca-file, --tls-cert and --tls-key, ")
    code, lines = fail(*there, "--tls-ca-file", str(odd))
    assert code == 1
    assert lines[0].startswith("the certificates of this client cannot be used: ")


def test_a_scheduler_of_another_version():
    with LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0") as cluster:
        from dask_serve.checkup import facts

        async def checkup() -> dict[str, Any]:
            found = facts()
            return {"facts": {**found, "versions": {**found["versions"], "dask_serve": "9.9"}}}

        async def status() -> dict[str, Any]:
            return {"status": msgspec.msgpack.encode({"applications": ["of", "another", "kind"]})}

        cluster.scheduler.handlers.update(serve_status=status, serve_checkup=checkup)
        address = cluster.scheduler_address
        code, lines = fail("status", "--scheduler", address)
    assert code == 1
    assert lines[0].startswith(f"the scheduler at {address} has dask_serve 9.9, which ")
    assert lines[1].startswith("use the same version in both")


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    def coloured() -> bool:
        return "\x1b[" in CliRunner().invoke(cli.serve, ["status"], color=True).stderr

    assert coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()
    assert "\x1b[" not in CliRunner().invoke(cli.serve, ["status"]).stderr


def test_the_commands_of_dask_stay_quick_to_import():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, dask_serve.cli; print(*(m for m in sys.modules if m.startswith('dask')))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert sorted(done.stdout.split()) == ["dask_serve", "dask_serve.cli", "dask_serve.cli.messages"]
