"""The files that are made of the declarations: the JSON schema of documents, the defaults of Dask's configuration.

``python -m dask_serve.document.shipped`` writes them anew.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ..config import AutoscalingConfig, DeploymentOptions, HTTPOptions
from ..defaults import DEFAULTS, DoorSettings, EmbeddedSettings, MetricsSettings, RestSettings, Settings
from ..options import documented
from .declaration import VERSION, ApplicationEntry, DeploymentEntry, Document, HTTPEntry

__all__ = ["SCHEMA", "defaults_text", "schema_text"]

#: The schema of documents, for editors.
SCHEMA = Path(__file__).parent / "document.schema.json"

#: By class of the document: the class with its defaults and descriptions.
_MEANINGS: dict[Any, Any] = {
    DeploymentEntry: DeploymentOptions,
    HTTPEntry: HTTPOptions,
    ApplicationEntry: ApplicationEntry,
    AutoscalingConfig: AutoscalingConfig,
    Document: Document,
}


def schema_text() -> str:
    """Return the JSON schema of documents."""
    schema = msgspec.json.schema(Document)
    for kind, meanings in _MEANINGS.items():
        entry = schema["$defs"][kind.__name__]
        entry.pop("title", None)
        entry["description"] = _first(kind.__doc__ or meanings.__doc__)
        texts = documented(meanings)
        defaults = {field.name: field.default for field in msgspec.structs.fields(meanings)}
        for name, declared in list(entry["properties"].items()):
            if name in texts:
                declared["description"] = texts[name]
            default = defaults.get(name, msgspec.NODEFAULT)
            if default is not msgspec.NODEFAULT and kind is not Document:
                declared["default"] = msgspec.to_builtins(default)
            else:
                declared.pop("default", None)
            _let_variables(entry["properties"], name)
    schema["$defs"]["Document"]["properties"]["version"] = {"const": VERSION, "description": "Form of the document."}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "A document of dask_serve"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _let_variables(properties: dict[str, Any], name: str) -> None:
    """Let ``${NAME}`` stand where a number or a boolean is wanted."""
    declared = properties[name]
    options = declared.get("anyOf", [declared])
    if any(option.get("type") in ("integer", "number", "boolean") for option in options) and not any(
        option.get("type") == "string" and "pattern" not in option for option in options
    ):
        kept = {key: declared.pop(key) for key in ("description", "default") if key in declared}
        others = declared.pop("anyOf", None) or [declared]
        properties[name] = {**kept, "anyOf": [*others, {"type": "string", "pattern": r"\$\{"}]}


def _first(text: str) -> str:
    return " ".join(text.split("\n\n", 1)[0].split())


def defaults_text() -> str:
    """Return the defaults of Dask's configuration, ``serve.yaml``."""
    lines = [
        "# Defaults of dask_serve in Dask's configuration. Other values go into a file of your own, such as",
        "# ~/.config/dask/serve.yaml, or into environment variables: DASK_SERVE__HTTP__PORT=8000.",
        "# Made by `python -m dask_serve.document.shipped`.",
        "serve:",
    ]
    lines += _section(Settings, "  ")
    lines += ["  # Options of HTTP: those of serve.start.", "  http:", *_section(HTTPOptions, "    ")]
    lines += [
        "  # Options of deployments that declare none of their own.",
        "  deployment:",
        *_section(DeploymentOptions, "    ", skip={"user_config", "version"}),
    ]
    lines += ["  # The cluster that serve.run starts where there is none.", "  embedded:"]
    lines += _section(EmbeddedSettings, "    ")
    lines += ["  # Where callers reach the replicas of a worker.", "  door:", *_section(DoorSettings, "    ")]
    lines += ["  # HTTP routes beside Dask's dashboard.", "  rest:", *_section(RestSettings, "    ")]
    lines += ["  # What Prometheus reads.", "  metrics:", *_section(MetricsSettings, "    ")]
    return "\n".join(lines) + "\n"


def _section(kind: type[msgspec.Struct], indent: str, skip: Iterable[str] = ()) -> list[str]:
    texts = documented(kind)
    lines = []
    for field in msgspec.structs.fields(kind):
        if field.name in skip:
            continue
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        comment = textwrap.wrap(texts[field.name].replace("``", ""), 116 - len(indent))
        lines += [f"{indent}# {line}" for line in comment]
        value = yaml.safe_dump({field.name.replace("_", "-"): msgspec.to_builtins(default)})
        lines += [indent + line for line in value.splitlines()]
    return lines


def main() -> None:
    """Write the files."""
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    DEFAULTS.write_text(defaults_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
