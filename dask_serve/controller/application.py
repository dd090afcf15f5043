"""An application as it is desired, and what it was before."""

from __future__ import annotations

import asyncio

from ..policy.desired import ApplicationSpec, DeploymentSpec

__all__ = ["Application"]


class Application:
    """One application as desired."""

    def __init__(self, spec: ApplicationSpec) -> None:
        self.spec = spec
        self.deleting = False
        #: Set once another one of the same name has taken its place.
        self.replaced = asyncio.Event()
        #: Deployments that have had all their replicas ready since they were last changed.
        self.reached: set[str] = set()
        #: What served before, as a whole, until this has proved itself: it is gone back to when this fails.
        self.before: ApplicationSpec | None = None
        #: Why the last update was taken back, by deployment.
        self.taken_back: dict[str, str] = {}

    @property
    def deployments(self) -> dict[str, DeploymentSpec]:
        """The deployments by name."""
        return {spec.name: spec for spec in self.spec.deployments}

    @property
    def leftovers(self) -> list[DeploymentSpec]:
        """Deployments that this has no more, and whose callers may still run: they end when this has been reached."""
        if self.before is None:
            return []
        names = {spec.name for spec in self.spec.deployments}
        return [spec for spec in self.before.deployments if spec.name not in names]

    def standby(self, name: str) -> DeploymentSpec | None:
        """Return what served before in place of a deployment, if anything does."""
        return next((spec for spec in self.before.deployments if spec.name == name), None) if self.before else None
