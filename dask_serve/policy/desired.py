"""What should run: the desired state, as it travels from a session to the controller."""

from __future__ import annotations

from msgspec import Struct, structs

from ..config import DeploymentOptions
from ..exceptions import ApplicationNotFoundError, ConfigError
from ..options import change_options
from .environment import Environment

__all__ = ["ApplicationSpec", "DeploymentSpec", "Source", "deployment_id", "with_replicas"]


def deployment_id(app: str, name: str) -> str:
    """Name a deployment for the whole cluster."""
    return f"{app}/{name}"


class DeploymentSpec(Struct, frozen=True, kw_only=True):
    """One deployment of an application, without its code.

    The code travels beside it, as opaque bytes under the name of the ``revision``.
    """

    name: str
    #: Hash of code, bound arguments and the options that need a restart. Equal revisions restart nothing.
    revision: str
    options: DeploymentOptions
    #: Public methods, for the error that lists them; ``__call__`` included where there is one.
    methods: list[str]
    #: Dask keys that the bound arguments refer to; the controller keeps them alive.
    keys: list[str] = []
    #: What the processes of its replicas have; None: nothing special.
    environment: Environment | None = None
    #: Methods whose calls bring rows (``@serve.batch(stack="rows")``), with the most rows that one call should bring.
    rows: dict[str, int] = {}

    @property
    def needs(self) -> list[str]:
        """Under which names the controller has what replicas ask it for: the code, and the files beside it."""
        if self.environment is None:
            return [self.revision]
        return [self.revision, *(archive.key for archive in self.environment.archives)]


class Source(Struct, frozen=True, kw_only=True):
    """Where an application's code came from, as a document names it."""

    import_path: str
    #: Arguments of the function that ``import_path`` names, as YAML, with variables that are not filled in.
    args: str = ""
    #: By deployment: names of the options that the document gives.
    overrides: dict[str, list[str]] = {}


class ApplicationSpec(Struct, frozen=True, kw_only=True):
    """One application: its deployments, the one that answers, and where HTTP finds it."""

    name: str
    #: None: not exposed over HTTP.
    route_prefix: str | None
    #: Name of the deployment that handles and HTTP requests reach.
    ingress: str
    deployments: list[DeploymentSpec]
    #: None: it was deployed from Python.
    source: Source | None = None


def with_replicas(spec: ApplicationSpec, deployment: str, number: int) -> tuple[ApplicationSpec, int]:
    """Return an application with another number of replicas of one deployment, and what the number was.

    Raises
    ------
    ApplicationNotFoundError
        It has no such deployment.
    ConfigError
        The deployment follows its load, or the number is none.
    """
    found = next((one for one in spec.deployments if one.name == deployment), None)
    if found is None:
        known = ", ".join(one.name for one in spec.deployments)
        raise ApplicationNotFoundError(f"application {spec.name!r} has no deployment {deployment!r}; it has {known}")
    config, before = found.options.autoscaling_config, found.options.num_replicas
    if config is not None or before == "auto":
        bounds = "" if config is None else f", between {config.min_replicas} and {config.max_replicas} replicas"
        raise ConfigError(
            f"{deployment_id(spec.name, deployment)} cannot be scaled to {number}: it follows its load{bounds}; deploy "
            "it with other min_replicas and max_replicas in autoscaling_config, or with a number as num_replicas"
        )
    if not isinstance(number, int):
        raise ConfigError(f"num_replicas={number!r} is no number of replicas; it is a whole number from 1 on")
    options = change_options(found.options, {"num_replicas": number}, "serve.scale")
    changed = structs.replace(found, options=options)
    deployments = [changed if one is found else one for one in spec.deployments]
    return structs.replace(spec, deployments=deployments), before
