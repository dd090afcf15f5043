"""The page for those who come from Ray Serve is complete, and true of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dask_serve as serve
from dask_serve.config import AutoscalingConfig, CallOptions, DeploymentOptions, HTTPOptions
from dask_serve.shipping import rays_keys
from dask_serve.shipping.spellings import advice
from dask_serve.testing import run

PAGE = (Path(__file__).parent.parent / "docs" / "from-ray.md").read_text(encoding="utf-8")


def section(title: str) -> list[list[str]]:
    """The rows of a section's table, as cells."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip()[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(text: str) -> set[str]:
    """The names in backticks."""
    return {name for code in re.findall(r"`([^`]*)`", text) for name in re.findall(r"\w+", code)}


def test_all_options_of_deployments_are_there() -> None:
    ours = names(" ".join(row[1] for row in section("Options of deployments")))
    assert set(DeploymentOptions.__struct_fields__) <= ours
    # And no others: what stands there exists.
    known = {*DeploymentOptions.__struct_fields__, "None", "bind", "serve", "run", "app", "route_prefix"}
    assert ours <= known


def test_defaults_are_true() -> None:
    found = 0
    for title, kind in (("Options of deployments", DeploymentOptions), ("Autoscaling", AutoscalingConfig)):
        for row in section(title):
            for name, value in re.findall(r"`(\w+)` \(`?([^)`]*)`?\)", row[1]):
                found += 1
                assert str(getattr(kind(), name)).removesuffix(".0") == value, name
    assert found >= 12


def test_all_fields_of_autoscaling_and_options_of_handles_are_there() -> None:
    rows = section("Autoscaling")
    assert set(AutoscalingConfig.__struct_fields__) <= names(" ".join(row[1] for row in rows))
    handles = names(" ".join(row[1] for row in section("Handles and what they return")))
    assert set(CallOptions.__struct_fields__) <= handles


def test_what_the_migration_knows_is_there() -> None:
    options = names(" ".join(row[0] for row in section("Options of deployments")))
    from dask_serve.shipping import spellings

    assert {*spellings._ELSEWHERE, *rays_keys.SAME, "max_concurrent_queries", "num_cpus", "num_gpus"} <= options
    assert all(advice(name) for name in spellings._ELSEWHERE)
    scaling = names(" ".join(row[0] for row in section("Autoscaling")))
    assert {*rays_keys.SCALING, *rays_keys.OLDER} <= scaling
    assert names(" ".join(rays_keys.HTTP)) <= names(PAGE) | set(rays_keys.HTTP)
    for ray, ours in rays_keys.HTTP.items():
        assert f"`{ray}`" in PAGE
        assert ours in HTTPOptions.__struct_fields__
        assert f"`{ours}`" in PAGE
    assert set(rays_keys.TOP) <= names(PAGE)


def test_functions_are_there() -> None:
    rows = " ".join(row[1] for row in section("Functions"))
    for name in re.findall(r"serve\.(\w+)", rows):
        assert hasattr(serve, name) or name == "scale", name


def test_what_it_says_of_calls_is_true() -> None:
    @serve.deployment
    class Model:
        def echo(self, value: object) -> object:
            return value

        def fails(self) -> None:
            raise LookupError("x")

        async def __call__(self, request: object) -> None:
            return None

    @serve.deployment
    class Bytes:
        def __call__(self) -> bytes:
            return b"x"

    with run(Model.bind()) as service:
        ref = service.handle.echo.remote(1)
        # Anywhere inside of arguments.
        assert service.handle.echo.remote({"a": [ref]}).result(timeout_s=5) == {"a": [1]}
        with pytest.raises(LookupError):
            service.handle.fails.remote().result()
        with pytest.raises(serve.ConfigError, match="choose by load"):
            service.handle.options(_prefer_local_routing=True)
        assert service.client.get("/").text == "null"
        assert service.client.get("/-/healthz").text == "ok"
    with run(Bytes.bind()) as service:
        assert service.client.get("/").headers["content-type"] == "application/octet-stream"


def test_links_lead_somewhere() -> None:
    docs = Path(__file__).parent.parent / "docs"
    for target in re.findall(r"\]\(([^)]*)\)", PAGE):
        page, _, anchor = target.partition("#")
        text = (docs / page).read_text(encoding="utf-8") if page else PAGE
        headings = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.*)$", text)]
        assert not anchor or anchor in headings, target
