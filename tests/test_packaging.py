"""The distribution as it is installed: metadata, entry point, what importing costs, what examples contain."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter at the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("dask-serve")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dask-serve is not installed here, only importable")


def test_version_is_the_one_in_the_source():
    import dask_serve

    assert installed().version == dask_serve.__version__
    assert (
        f"## [{dask_serve.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
        or "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_dask_finds_the_command_group():
    entries = [entry for entry in installed().entry_points if entry.group == "dask_cli"]
    assert [(entry.name, entry.value) for entry in entries] == [("serve", "dask_serve.cli:serve")]
    assert entries[0].load().name == "serve"


def test_older_distributed_is_stated_once():
    stated = re.search(r'"distributed>=([\d.]+)"', (ROOT / "setup.py").read_text())
    oldest = re.search(r"^OLDEST := ([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert stated is not None
    assert oldest is not None
    assert stated[1] == oldest[1]


def test_importing_the_package_is_light():
    loaded = run("import dask_serve, sys; print(*sys.modules)").split()
    assert "dask_serve" in loaded
    assert {"distributed", "starlette", "uvicorn"}.isdisjoint(loaded)


def test_proxies_do_not_load_dask():
    assert importlib.util.find_spec("dask_serve.proxy.__main__") is not None
    loaded = run("import dask_serve.proxy.app, dask_serve.proxy.__main__, sys; print(*sys.modules)").split()
    assert {"dask", "distributed", "tornado"}.isdisjoint(loaded)


def test_everything_named_at_the_top_is_there():
    import dask_serve

    missing = [name for name in dask_serve.__all__ if not hasattr(dask_serve, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dask_serve.no_such_name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    broken = [link for link in links if not (document.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_parses(document: Path):
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(document), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
