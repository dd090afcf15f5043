"""What a document may hold: derived from the options of `dask_serve.config`, which declares them."""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..config import DeploymentOptions, HTTPOptions

__all__ = ["VERSION", "ApplicationEntry", "DeploymentEntry", "Document", "HTTPEntry"]

#: The version of documents that this dask_serve reads.
VERSION = 1

#: Options that take other types where people write them.
_WRITTEN: dict[str, Any] = {"memory": Annotated[int, Meta(ge=1)] | str | None}


def _entry(name: str, options: type[Struct], *own: tuple[str, Any]) -> Any:
    """Return a class with the options of another one, none of which has to be given."""
    hints = get_type_hints(options, include_extras=True)
    hints.update((field, hint) for field, hint in _WRITTEN.items() if field in hints)
    fields = [(field, hints[field] | UnsetType, UNSET) for field in options.__struct_fields__]
    return msgspec.defstruct(
        name, [*own, *fields], frozen=True, kw_only=True, forbid_unknown_fields=True, module=__name__
    )


#: Options of the proxies.
HTTPEntry = _entry("HTTPEntry", HTTPOptions)

#: A deployment's name and those of its options that are to be others than in the code.
DeploymentEntry = _entry("DeploymentEntry", DeploymentOptions, ("name", Annotated[str, Meta(min_length=1)]))


class ApplicationEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One application.

    Parameters
    ----------
    import_path : str
        ``module:name`` of what .bind() returned, or of a function that returns it.
    name : str, default "default"
        Name of the application.
    route_prefix : str or None, default "/"
        Where HTTP finds it. None: not over HTTP.
    args : dict, default {}
        Keyword arguments of the function that ``import_path`` names.
    deployments : list, default []
        Options that are to be others than in the code, by the name of the deployment.
    """

    import_path: str
    name: Annotated[str, Meta(min_length=1)] = "default"
    route_prefix: str | None = "/"
    args: dict[str, Any] = {}
    deployments: list[DeploymentEntry] = []  # type: ignore[valid-type]


class Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Applications, and how HTTP finds them.

    Parameters
    ----------
    version : int
        Version of the document's form: 1.
    applications : list, default []
        The applications.
    http : dict, default {}
        Options of the proxies, those of ``serve.start``; what is not named stays as it is.
    """

    version: int
    applications: list[ApplicationEntry] = []
    http: HTTPEntry = HTTPEntry()  # type: ignore[valid-type]


def given(entry: Any) -> dict[str, Any]:
    """Return the options that an entry gives, without its name."""
    fields = {name: getattr(entry, name) for name in entry.__struct_fields__ if name != "name"}
    return {name: value for name, value in fields.items() if value is not UNSET}
