"""The OpenAPI document of the REST routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from .. import __version__
from .child import Outcome
from .status import ApplicationStatus, ServeStatus

__all__ = ["SCHEMA", "openapi"]

#: The schema of documents, as it is shipped.
SCHEMA = Path(__file__).parents[1] / "document" / "document.schema.json"

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["type", "message"],
    "properties": {
        "type": {"type": "string", "description": "What kind of error it is."},
        "message": {"type": "string", "description": "What is wrong, and what to do."},
        "problems": {"type": "array", "items": {"$ref": "#/components/schemas/Mistake"}},
    },
}

_TARGETS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "targets": {"type": "array", "items": {"type": "string"}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    },
}


def openapi(base: str) -> dict[str, Any]:
    """Return the document for routes below ``base``."""
    shapes, components = msgspec.json.schema_components(
        [ServeStatus, ApplicationStatus, Outcome], ref_template="#/components/schemas/{name}"
    )
    document = msgspec.json.decode(SCHEMA.read_bytes().replace(b"#/$defs/", b"#/components/schemas/"))
    components.update(document.pop("$defs"))
    components["Error"] = _ERROR
    content = {"schema": {"$ref": "#/components/schemas/Document"}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Its name."}
    writes = {
        **_answers(400, 401, 403, 409, 413, 500),
        "503": _error("It did not end in time, or the service is not there."),
    }
    put = {
        "operationId": "deploy",
        "summary": "Make applications as a document says, all of them or none. Others go on unless prune is true.",
        "security": [{"token": []}],
        "parameters": [_flag("prune", "Delete other applications."), _flag("dry_run", "Only tell what would change.")],
        "requestBody": {"required": True, "content": {"application/yaml": content, "application/json": content}},
        "responses": {"200": _answer("What has changed. Replicas may still be starting.", shapes[2]), **writes},
    }
    delete = {
        "operationId": "delete",
        "summary": "Delete an application; the answer comes when its replicas have ended.",
        "security": [{"token": []}],
        "responses": {"200": _answer("It is deleted.", shapes[2]), **_answers(401, 403, 404)},
    }
    get_all = {
        "operationId": "status",
        "summary": "Tell what runs.",
        "responses": {"200": _answer("All of it.", shapes[0])},
    }
    get_one = {
        "operationId": "application",
        "summary": "Tell how one application fares.",
        "responses": {"200": _answer("The application.", shapes[1]), **_answers(404)},
    }
    get_targets = {
        "operationId": "targets",
        "summary": "Tell where Prometheus finds metrics, in the form that its http_sd_configs reads.",
        "responses": {"200": _answer("Scheduler, workers and proxies with an admin port.", _TARGETS)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "dask_serve", "version": __version__, "description": "What runs on a Dask cluster."},
        "paths": {
            f"{base}/applications": {"get": get_all, "put": put},
            f"{base}/applications/{{name}}": {"parameters": [name], "get": get_one, "delete": delete},
            f"{base}/targets": {"get": get_targets},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


_REASONS = {
    400: "The document has mistakes; nothing has changed.",
    401: "There is no token, or none that is valid.",
    403: "Requests may change nothing here.",
    404: "There is no such application.",
    409: "Another document is being deployed.",
    413: "The document is too large.",
    500: "Something went wrong; the scheduler's log has more.",
}


def _answers(*statuses: int) -> dict[str, Any]:
    return {str(status): _error(_REASONS[status]) for status in statuses}


def _error(text: str) -> dict[str, Any]:
    return _answer(text, {"$ref": "#/components/schemas/Error"})


def _answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _flag(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": {"type": "boolean", "default": False}}
