"""The dashboard for Grafana is one as Grafana itself describes them, in the types that it publishes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parent.parent / "examples" / "prometheus" / "dashboard.json"
#: What newer versions of Grafana write with variables that query, and this one takes for nothing.
NEWER = re.compile(r"/templating/list/\d+/definition")


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return json.loads(PATH.read_text())


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Return where something of mine is missing, or is something else."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [one for key in mine for one in differences(mine[key], theirs.get(key), f"{path}/{key}")]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = enumerate(zip(mine, theirs, strict=True))
        return [one for number, pair in pairs for one in differences(*pair, f"{path}/{number}")]
    return [] if mine == theirs else [path]


def test_grafana_knows_all_that_it_has(dashboard):
    """A field that Grafana's types do not have, or a value that they do not take, does not come back."""
    types = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()

    def through(one: dict[str, Any]) -> list[str]:
        text = encoder.JSONEncoder().encode(types.Dashboard.from_json(json.loads(json.dumps(one))))
        return [path for path in differences(one, json.loads(text)) if not NEWER.fullmatch(path)]

    assert through(dashboard) == []
    dashboard["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    dashboard["panels"][1]["targets"][0]["query"] = "up"
    assert len(through(dashboard)) == 2, "it would be found"


def test_panels_have_a_place_of_their_own(dashboard):
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_queries_use_variables_that_there_are(dashboard):
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    # Grafana's own.
    known = {*variables, "__rate_interval", "__all"}
    assert {*re.findall(r"\$\{?(\w+)", json.dumps(dashboard))} <= known
    for panel in dashboard["panels"]:
        targets = panel.get("targets", [])
        assert len({target["refId"] for target in targets}) == len(targets)
        assert bool(targets) == (panel["type"] != "row")
        for target in targets:
            labels = {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
            grouped = {name.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in by.split(",")}
            assert labels <= grouped or not grouped, target
