"""``runtime_env``: processes of workers that are given packages, variables and directories, in real processes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from distributed import Client
from helpers import embedded_client, wait_until

import dask_serve as serve
from dask_serve.exceptions import DeploymentFailedError


def wheel(directory: Path, name: str, version: str, source: str) -> None:
    """Write a wheel of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "2.0"):
        wheel(directory, "tinywheel", version, f"VERSION = {version!r}\n")
    return ["--no-index", f"--find-links {directory}"]


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """Where workers keep environments."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("environments")
        patch.setenv("DASK_SERVE__ENVIRONMENTS_DIRECTORY", str(directory))
        yield directory


@pytest.fixture(scope="module")
def cluster(environments):
    with embedded_client(2, 2) as client:
        yield client


@serve.deployment
class Probe:
    def look(self, name):
        module = __import__(name)
        return module.VERSION, module.__file__

    def variable(self, name):
        return os.environ.get(name)

    def directory(self):
        return str(Path.cwd()), sorted(path.name for path in Path.cwd().iterdir())

    def pid(self):
        return os.getpid()


def run(client: Client, name: str, env: dict | None, **options):
    app = Probe.options(runtime_env=env, **options).bind()
    return serve.run(app, name=name, route_prefix=None, client=client, timeout=60)


def start(client: Client, name: str, env: dict | None, **options) -> None:
    serve.run(Probe.options(runtime_env=env, **options).bind(), name=name, route_prefix=None, client=client, wait=False)


def deployment_of(client: Client, name: str):
    return serve.status(client=client).applications[name].deployments["Probe"]


def test_a_process_has_packages_variables_and_directories(cluster, wheels, environments, tmp_path):
    """One cluster of two processes for all of it, since a process has one environment at most."""
    base = run(cluster, "base", None)
    home = base.directory.remote().result()[0]
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("from .parts import VERSION\n")
    (tmp_path / "tool" / "parts.py").write_text("VERSION = 'dir'\n")
    (tmp_path / "single.py").write_text("VERSION = 'file'\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "labels.txt").write_text("a\nb\n")
    env = {
        "pip": [*wheels, "tinywheel==1.0"],
        "env_vars": {"FLAVOUR": "one"},
        "working_dir": str(tmp_path / "work"),
        "py_modules": [str(tmp_path / "tool"), str(tmp_path / "single.py")],
    }
    one = run(cluster, "one", env)
    version, file = one.look.remote("tinywheel").result()
    (replica,) = serve.status(client=cluster).applications["one"].deployments["Probe"].replicas
    assert len(replica.environment) == 12
    assert f"environment {replica.environment}" in str(replica)
    assert version == "1.0"
    assert Path(file).is_relative_to(environments)
    assert one.look.remote("tool").result()[0] == "dir"
    assert one.look.remote("single").result()[0] == "file"
    assert one.variable.remote("FLAVOUR").result() == "one"
    assert one.directory.remote().result()[1] == ["labels.txt"]
    # The other process has nothing of it.
    first = one.pid.remote().result()
    assert base.pid.remote().result() != first
    assert base.variable.remote("FLAVOUR").result() is None
    assert base.directory.remote().result()[0] == home

    # Another deployment of the same environment is in the same process; the same again restarts nothing.
    assert run(cluster, "two", dict(reversed(env.items()))).pid.remote().result() == first
    replicas = deployment_of(cluster, "one").replicas
    run(cluster, "one", env)
    assert deployment_of(cluster, "one").replicas[0].id == replicas[0].id

    # There is no process for another one, and no replica is in its way for nothing.
    other = {**env, "env_vars": {"FLAVOUR": "other"}}
    start(cluster, "three", other)
    reason = wait_until(lambda: deployment_of(cluster, "three").message)
    assert "no worker can be given environment" in reason
    assert "replicas without an environment" in reason
    assert "env_vars: FLAVOUR" in reason
    assert "other" not in reason.partition("env_vars: ")[2]
    serve.delete("one", client=cluster)
    assert deployment_of(cluster, "three").status != "running"
    # The process has nothing left to lose: it is ended, and another one comes in its place.
    serve.delete("two", client=cluster)
    wait_until(lambda: deployment_of(cluster, "three").status == "running", 30)
    three = serve.get_app_handle("three", client=cluster)
    assert three.variable.remote("FLAVOUR").result() == "other"
    assert base.variable.remote("FLAVOUR").result() is None


def test_pip_that_fails_is_told_and_claims_nothing(cluster, wheels):
    for name in serve.status(client=cluster).applications:
        serve.delete(name, client=cluster)
    with pytest.raises(DeploymentFailedError, match=r"No matching distribution found for tinywheel==3\.0"):
        run(cluster, "app", {"pip": [*wheels, "tinywheel==3.0"]})
    # An update that fails leaves what serves.
    handle = run(cluster, "app", {"pip": [*wheels, "tinywheel==2.0"]}, num_replicas=1)
    assert handle.look.remote("tinywheel").result()[0] == "2.0"


def test_what_the_process_has_loaded_cannot_be_another(cluster, tmp_path):
    wheel(tmp_path, "msgspec", "0.0.1", "")
    env = {"pip": ["--no-index", f"--find-links {tmp_path}", "msgspec==0.0.1"]}
    with pytest.raises(
        DeploymentFailedError, match=r"has loaded other versions already of msgspec==0\.0\.1 \(loaded: "
    ):
        run(cluster, "clash", env)
