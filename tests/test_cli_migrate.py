"""`dask serve migrate`: a file of Ray Serve in, a document that can be deployed out."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dask_serve.cli import serve
from dask_serve.document.validation import parse

RAY = """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000, request_timeout_s: 30}
applications:
- name: text
  route_prefix: /text
  import_path: ml.text.app
  runtime_env: {pip: [torch]}
  args: {model: "${MODEL}", size: "1e3", flag: "yes"}
  deployments:
  - name: Translator
    num_replicas: 2
    ray_actor_options: {num_cpus: 2, num_gpus: 0.5, memory: 2.0e9, accelerator_type: A100}
  - name: Scaling
    num_replicas: auto
    autoscaling_config: {min_replicas: 2, policy: {policy_function: "a.b:c", policy_kwargs: {x: 1}}}
"""


def run(*arguments: object, text: str = "") -> Result:
    return CliRunner().invoke(serve, ["migrate", *map(str, arguments)], input=text)


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    path = tmp_path / "ray.yaml"
    path.write_text(RAY)
    return path


def test_the_document_is_valid_and_says_what_it_lacks(ray: Path) -> None:
    done = run(ray)
    assert done.exit_code == 0, done.output
    checked = parse(done.stdout, "serve.yaml")
    (application,) = checked.document.applications
    assert (application.name, application.import_path, application.route_prefix) == ("text", "ml.text:app", "/text")
    # Values are what they were: no variables, no numbers made of texts.
    assert application.args == {"model": "${MODEL}", "size": "1e3", "flag": "yes"}
    translator, scaling = application.deployments
    assert (translator.num_replicas, translator.threads, translator.gpus) == (2, 2, 0.5)
    assert scaling.autoscaling_config.min_replicas == 2
    assert translator.runtime_env.pip == scaling.runtime_env.pip == ["torch"]
    assert checked.http == {"host": "0.0.0.0", "port": 8000, "request_timeout_s": 30.0}
    for path in ("proxy_location", "applications[0].runtime_env.pip", "accelerator_type"):
        assert path in done.stderr
        assert path in done.stdout.partition("version:")[0]


def test_files(ray: Path, tmp_path: Path) -> None:
    output = tmp_path / "serve.yaml"
    done = run(ray, "-o", output)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "dask serve deploy" in done.stderr
    assert parse(output.read_text(), "serve.yaml").document.version == 1
    again = run(ray, "-o", output)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(ray, "-o", output, "--force").exit_code == 0
    assert run("-", text=RAY).exit_code == 0


def test_strict(ray: Path, tmp_path: Path) -> None:
    done = run(ray, "--strict", "-o", tmp_path / "x.yaml")
    assert done.exit_code == 1
    assert "no counterpart" in done.stderr
    assert not (tmp_path / "x.yaml").exists()
    exact = "http_options: {host: 127.0.0.1}\napplications:\n- import_path: a:b\n"
    assert run("-", "--strict", text=exact).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("a: 1", "no configuration file of Ray Serve"),
        ("applications: [{}]", "import_path is None"),
    ],
)
def test_what_cannot_be_translated(text: str, message: str) -> None:
    done = run("-", text=text)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path / "none.yaml")
    assert done.exit_code == 2
    assert "there is no file" in done.stderr
