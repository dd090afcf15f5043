"""What should run: the desired state, as it travels from a session to the controller."""

from __future__ import annotations

from msgspec import Struct

from ..config import DeploymentOptions
from .environment import Environment

__all__ = ["ApplicationSpec", "DeploymentSpec", "deployment_id"]


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

    @property
    def needs(self) -> list[str]:
        """Under which names the controller has what replicas ask it for: the code, and the files beside it."""
        if self.environment is None:
            return [self.revision]
        return [self.revision, *(archive.key for archive in self.environment.archives)]


class ApplicationSpec(Struct, frozen=True, kw_only=True):
    """One application: its deployments, the one that answers, and where HTTP finds it."""

    name: str
    #: None: not exposed over HTTP.
    route_prefix: str | None
    #: Name of the deployment that handles and HTTP requests reach.
    ingress: str
    deployments: list[DeploymentSpec]
