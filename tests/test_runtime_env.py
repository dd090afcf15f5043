"""What a ``runtime_env`` may say, what travels of it, and what is installed once on a host."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest

import dask_serve as serve
from dask_serve.config import RuntimeEnv
from dask_serve.exceptions import ConfigError, ServeError
from dask_serve.replica import packages
from dask_serve.replica.environment import ProcessEnvironment
from dask_serve.replica.packages import Packages, cache_directory, locked
from dask_serve.shipping import environment as shipping
from dask_serve.shipping.graph import build


@serve.deployment
class Model:
    pass


def declare(**env):
    return Model.options(runtime_env=env)


def spec_of(**env):
    built = build(declare(**env).bind())
    return built.spec.deployments[0], built.code


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"conda": "x"}, "runtime_env of deployment 'Model' has no option 'conda'"),
        ({"env_var": {}}, "did you mean 'env_vars'"),
        ({"env_vars": {"A": 1}}, r"env_vars = \{'A': 1\} is not valid"),
        ({"env_vars": {"A=B": "1"}}, "env_vars"),
        ({"pip": 3}, "option pip = 3 is not valid"),
        ({"py_modules": "x"}, "option py_modules = 'x' is not valid"),
    ],
)
def test_wrong_declarations(env, expected):
    with pytest.raises(ConfigError, match=expected):
        declare(**env)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"pip": "polars==1.9"}, "requirements themselves are given as a list"),
        ({"pip": ["-e ."]}, "a directory of this machine: workers do not have it"),
        ({"pip": ["./package"]}, "send it with py_modules or working_dir"),
        ({"pip": ["-r requirements.txt"]}, "give pip='requirements.txt' for a file"),
        (
            {"working_dir": "nowhere"},
            r"working_dir of runtime_env = 'nowhere' is not valid: it is not there \(seen from",
        ),
        ({"working_dir": __file__}, "is not valid: it is no directory"),
        ({"working_dir": "s3://bucket/x.zip"}, "not a URL"),
        ({"py_modules": ["nowhere.py"]}, "it is not there"),
    ],
)
def test_what_cannot_travel(env, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        spec_of(**env)
    assert str(caught.value).startswith("deployment 'Model': ")


def test_as_ray_writes_it():
    other = Model.options(ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"A": "1"}}})
    assert other.all_options.runtime_env == RuntimeEnv(env_vars={"A": "1"})


def test_requirements_files(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# ours\n-r more.txt\npolars==1.9  # fast\n\n--index-url https://x/simple\n"
    )
    (tmp_path / "more.txt").write_text("requests \\\n  >=2\n")
    spec, _ = spec_of(pip=str(tmp_path / "requirements.txt"))
    assert [" ".join(line.split()) for line in spec.environment.pip] == [
        "requests >=2",
        "polars==1.9",
        "--index-url https://x/simple",
    ]
    (tmp_path / "more.txt").write_text("-r requirements.txt\n")
    with pytest.raises(ConfigError, match="includes itself"):
        spec_of(pip=str(tmp_path / "requirements.txt"))


def test_directories_are_packed_by_content(tmp_path, monkeypatch):
    for home in ("one", "two"):
        package = tmp_path / home / "tool"
        (package / ".git").mkdir(parents=True)
        (package / "__pycache__").mkdir()
        (package / "data").mkdir()
        (package / "__init__.py").write_text("x = 1\n")
        (package / "data" / "big.csv").write_text("1")
        (package / "run.sh").write_text("#!/bin/sh\n")
        (package / "run.sh").chmod(0o755)
        (package / ".git" / "HEAD").write_text("x")
        (package / "__pycache__" / "x.pyc").write_text("x")
        (package / "gone").symlink_to("nowhere")
    one, code = spec_of(py_modules=[str(tmp_path / "one" / "tool")], excludes=["data/*"])
    (key,) = code.keys() - {one.revision}
    assert one.needs == [one.revision, key]
    with zipfile.ZipFile(io.BytesIO(code[key])) as archive:
        assert archive.namelist() == ["tool/__init__.py", "tool/run.sh"]
        assert archive.getinfo("tool/run.sh").external_attr >> 16 & 0o111
    # Elsewhere, later, it is the same.
    os.utime(tmp_path / "two" / "tool" / "__init__.py", (1, 1))
    two, _ = spec_of(py_modules=[str(tmp_path / "two" / "tool")], excludes=["data/*"])
    assert (two.revision, two.environment.id) == (one.revision, one.environment.id)
    (tmp_path / "two" / "tool" / "__init__.py").write_text("x = 2\n")
    three, _ = spec_of(py_modules=[str(tmp_path / "two" / "tool")], excludes=["data/*"])
    assert three.revision != one.revision
    monkeypatch.setattr(shipping, "DIRECTORY_LIMIT", 5)
    with pytest.raises(ConfigError, match=r"has 17 B, more than 5 B; the largest files are run\.sh \(10 B\).*excludes"):
        spec_of(working_dir=str(tmp_path / "two" / "tool"))


def test_revisions():
    plain, _ = spec_of()
    assert plain.environment is None
    assert build(Model.bind()).spec.deployments[0].revision == plain.revision
    one, two = spec_of(env_vars={"A": "1", "B": "2"})[0], spec_of(env_vars={"B": "2", "A": "1"})[0]
    assert one.revision == two.revision != plain.revision
    assert spec_of(env_vars={"A": "1"})[0].revision != one.revision
    assert "secret" not in spec_of(env_vars={"TOKEN": "secret"})[0].environment.describe()


# -- what a host's workers share


def test_made_once_for_all(tmp_path):
    made = []

    def make(directory, lock):
        made.append(directory)
        time.sleep(0.1)
        (directory / "x").write_text("x")

    found = []
    threads = [threading.Thread(target=lambda: found.append(locked(tmp_path, "key", make))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert {(directory / "x").read_text() for directory, _ in found} == {"x"}


def test_what_was_not_finished_is_made_anew(tmp_path):
    def fail(directory, lock):
        (directory / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        locked(tmp_path, "key", fail)
    # As one that was killed leaves it.
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "half").touch()
    directory, _ = locked(tmp_path, "key", lambda directory, lock: (directory / "whole").touch())
    assert sorted(path.name for path in directory.iterdir()) == ["complete", "whole"]


def test_a_lock_is_not_waited_for_for_ever(tmp_path):
    with (tmp_path / "key.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ServeError, match=r"another process of this host has been making .* for 0\.2 s"):
            locked(tmp_path, "key", lambda *_: None, timeout=0.2)


def test_what_nobody_used_for_a_month_is_removed(tmp_path):
    def nothing(directory, lock):
        pass

    kept, hold = locked(tmp_path, "kept", nothing)
    gone, other = locked(tmp_path, "gone", nothing)
    other.close()
    for directory in (kept, gone):
        os.utime(directory / "complete", (1, 1))
    locked(tmp_path, "new", nothing)
    assert kept.exists()
    assert not gone.exists()
    hold.close()


def test_pip_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "INSTALL_TIMEOUT", 0.3)
    monkeypatch.setattr(packages.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho begins\nsleep 60\n")
    (tmp_path / "python").chmod(0o755)
    began = time.monotonic()
    with pytest.raises(ServeError, match=r"stopped after 0\.3 s\):\n  begins"):
        Packages(tmp_path, ["x"], {}).install()
    assert time.monotonic() - began < 10


def test_a_directory_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "dask-serve" / "environments"
    assert (tmp_path / "dask-serve" / "environments").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(ServeError, match="belongs to another user"):
        cache_directory()


def test_a_process_with_the_scheduler_in_it_is_left_alone():
    code = """
        import dask_serve as serve
        from distributed import Client

        @serve.deployment(runtime_env={"env_vars": {"A": "1"}})
        def f(): pass

        with Client(processes=False, n_workers=1, dashboard_address=None):
            try:
                serve.run(f.bind(), route_prefix=None)
            except serve.DeploymentFailedError as error:
                print(error)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, check=False)
    assert "shares its process with the scheduler (processes=False)" in done.stdout, done.stderr
    assert ProcessEnvironment.current is None
