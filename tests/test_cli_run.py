"""`dask serve run`: arguments of builders, and deploying again when files change."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from helpers import http_client
from test_command_line import has, process

from dask_serve.cli import serve as cli
from dask_serve.cli.builders import call
from dask_serve.cli.messages import Failure

# -- arguments ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    size: int
    names: list[str] = dataclasses.field(default_factory=list)


class Options(msgspec.Struct):
    size: int
    ratio: float = 0.5


def typed(size: int, ratio: float = 0.5, loud: bool = False, names: list[str] | None = None, other: Any = None) -> Any:
    return size, ratio, loud, names, other


def by_default(size=3, loud=False, name="x"):
    return size, loud, name


def everything(args: dict[str, str]) -> Any:
    return args


def bare(args):
    return args


def loose(size: int, **others: str) -> Any:
    return size, others


def modelled(settings: Settings) -> Any:
    return settings


def structured(options: Options) -> Any:
    return options


def wild(options: Mapping[str, Any] | None = None) -> Any:
    return options


@pytest.mark.parametrize(
    ("builder", "arguments", "built"),
    [
        (typed, {"size": "3"}, (3, 0.5, False, None, None)),
        (typed, {"size": "3", "ratio": "1e3", "loud": "true", "names": '["a", "b"]'}, (3, 1e3, True, ["a", "b"], None)),
        (typed, {"size": "3", "loud": "0", "names": "null", "other": "text"}, (3, 0.5, False, None, "text")),
        # Of a document: values have their types already.
        (typed, {"size": 3, "ratio": 1, "names": ["a"]}, (3, 1.0, False, ["a"], None)),
        (by_default, {"size": "4", "loud": "1", "name": "7"}, (4, True, "7")),
        (by_default, {}, (3, False, "x")),
        (everything, {"a": "1", "b": "2"}, {"a": "1", "b": "2"}),
        (everything, {}, {}),
        (bare, {"a": "1"}, {"a": "1"}),
        (loose, {"size": "1", "more": "2"}, (1, {"more": "2"})),
        (modelled, {"size": "1", "names": '["a"]'}, Settings(1, ["a"])),
        (structured, {"size": "1", "ratio": "2"}, Options(1, 2.0)),
        (wild, {}, None),
    ],
)
def test_arguments_have_the_types_that_builders_ask_for(builder, arguments, built):
    found = call(builder, "main:build", arguments)
    assert found == built
    assert repr(found) == repr(built)


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        (typed, {"size": "3", "loud": "maybe"}, r"argument loud=maybe .* does not fit.*\nit is annotated as bool"),
        (typed, {}, "needs the arguments size"),
        (modelled, {"size": "1", "sise": "2"}, "has no argument 'sise'\nit takes size, names"),
        (modelled, {}, "do not fit"),
        (structured, {"size": "big"}, "argument size=big"),
    ],
)
def test_arguments_that_do_not_fit(builder, arguments, message):
    with pytest.raises(Failure, match=message):
        call(builder, "main:build", arguments)


def test_pydantic_models():
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        size: int
        names: list[str] = []

    def build(model: Model) -> Any:
        return model

    build.__annotations__["model"] = Model
    assert call(build, "main:build", {"size": "3", "names": '["a"]'}) == Model(size=3, names=["a"])
    with pytest.raises(Failure, match="do not fit: size Input should be a valid integer"):
        call(build, "main:build", {"size": "big"})


# -- files that change -------------------------------------------------------------------------------------------------

MAIN = """
import os
import dask_serve as serve
import words

@serve.deployment
class Same:
    def where(self):
        return os.getpid(), id(self)

@serve.deployment
class Model:
    def __init__(self, other, times):
        self.other, self.times = other, times

    async def __call__(self, request):
        return {"text": words.TEXT * self.times, "same": await self.other.where.remote()}

def build(times: int):
    return Model.bind(Same.bind(), times)
"""


def test_a_changed_file_is_deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    words = tmp_path / "words.py"
    words.write_text("TEXT = 'one '\n")
    monkeypatch.chdir(tmp_path)
    with process("run", "main:build", "times=2", "--reload", "--workers", "1", "--port", "0") as (running, lines):
        (ready,) = has(lines, "default is ready at ")
        with http_client(ready.split()[-1]) as http:
            first = json.loads(http.get("/").text)
            assert first["text"] == "one one "
            words.write_text("TEXT = 'two '\n")
            has(lines, "version 2 of default is ready")
            second = json.loads(http.get("/").text)
            # What has not changed was not restarted.
            assert second == {"text": "two two ", "same": first["same"]}
            words.write_text("TEXT = 'three \n")
            has(lines, "the old code goes on")
            assert has(lines, "SyntaxError: unterminated string literal")
            assert has(lines, "words.py, line 1")
            assert json.loads(http.get("/").text) == second
            words.write_text("TEXT = 'two '  # as before\n")
            has(lines, "nothing of default has changed")
            assert json.loads(http.get("/").text) == second
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) == 0
    assert not any("Traceback" in line for line in lines)
    assert sum("changed: words.py" in line for line in lines) == 3
    # What was cached could be taken for a file that changed within the same second.
    assert not (tmp_path / "__pycache__").exists()


# -- on a cluster that runs --------------------------------------------------------------------------------------------


def test_what_runs_can_be_deployed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cluster: str) -> None:
    """`dask serve config` knows where `dask serve run` loaded it from, arguments with dollar signs included."""
    (tmp_path / "main.py").write_text(MAIN.replace("build(times: int)", "build(times: int, note: str)"))
    (tmp_path / "words.py").write_text("TEXT = ''\n")
    monkeypatch.chdir(tmp_path)
    there = ("--scheduler", shared_cluster)
    with process("run", "main:build", "times=2", "note=a ${HOME} of $5", "--port", "0", *there) as (running, lines):
        has(lines, "default is ready at ")
        written = CliRunner().invoke(cli, ["config", *there])
        assert yaml.safe_load(written.stdout)["applications"][0]["import_path"] == "main:build"
        (tmp_path / "config.yaml").write_text(written.stdout)
        # In a process of its own, as it imports modules of that directory.
        with process("deploy", "config.yaml", "--dry-run", *there) as (deploying, told):
            assert deploying.wait(timeout=30) == 0
            assert has(told, "nothing would change"), told
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) == 0
