"""Operations on single applications: deploy, change and delete them, and what replicas need of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import HTTPOptions
from ..defaults import overlaid
from ..exceptions import ApplicationNotFoundError, ConfigError, DeploymentUnavailableError, ServeError
from ..policy.desired import ApplicationSpec
from ..policy.history import By
from .history import encode_history
from .operations import operation
from .pieces import parts_of

if TYPE_CHECKING:
    from .plugin import Controller

__all__ = ["Applications"]


class Applications:
    """Answers for applications; its operations are handlers of the scheduler.

    Parameters
    ----------
    controller : Controller
        Whose applications they are.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def serve_missing(self, revisions: list[str]) -> dict[str, Any]:
        """Return those revisions whose code is not here."""
        return {"missing": self._controller.editor.lacks(revisions)}

    async def serve_upload(self, upload: str, number: int, part: Any, client: str) -> dict[str, Any]:
        """Take a part of large code, which `serve_deploy` and `serve_apply` name then."""
        self._controller.uploads.put(upload, number, part, client)
        return {}

    @operation
    async def serve_deploy(
        self, application: bytes, code: dict[str, Any] | None = None, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Make an application run as it is given; answer once that is saved, with the number of its version.

        ``code`` is by revision: the code, or the name of its upload and the number of its parts.
        """
        code = self._controller.uploads.take(code or {})
        try:
            spec = msgspec.msgpack.decode(application, type=ApplicationSpec)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the scheduler's dask_serve does not understand this application: {error}") from None
        if self._controller.over:
            raise ServeError(self._controller.over)
        await self._controller.scaling.check(spec)
        missing = self._controller.editor.lacks(
            [name for deployment in spec.deployments for name in deployment.needs], code
        )
        if missing:
            # Another session deleted meanwhile what had the same code.
            return {"missing": missing}
        version = await self._controller.editor.deploy(spec, code, By(owner, client))
        if spec.route_prefix is not None and not self._controller.front.url:
            await self._controller.front.start(overlaid(HTTPOptions(), ()), set())
        return {"version": version}

    @operation
    async def serve_rollback(
        self, app: str, version: int | None = None, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Make an application again what it was; answer with the number of the version that this is."""
        by = By(owner, client)
        return {
            "version": await self._controller.editor.rollback(
                app, version, by, self._controller.scheduler.tasks.__contains__
            )
        }

    @operation
    async def serve_scale(
        self, app: str, deployment: str, number: int, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Change how many replicas a deployment has; answer with the number of the version that this is."""
        return {"version": await self._controller.editor.scale(app, deployment, number, By(owner, client))}

    @operation
    async def serve_history(self, app: str) -> dict[str, Any]:
        """Return what an application was, and what became of it."""
        return {
            "history": encode_history(self._controller.registry.history.answer(app)),
            "told": self._controller.editor.not_found(app),
        }

    @operation
    async def serve_code(self, revision: str, part: int = 0) -> dict[str, Any]:
        """Return a part of a revision's code, as it came, how many there are, and the cluster's secret."""
        code = await self._controller.editor.code(revision)
        if code is None:
            raise DeploymentUnavailableError(f"revision {revision} is not deployed any more")
        parts = parts_of(code)
        return {"code": parts[part], "parts": len(parts), "secret": self._controller.secret}

    @operation
    async def serve_delete(self, app: str, owner: str = "", client: str = "", own: bool = False) -> dict[str, Any]:
        """Take an application away (``own``: if this client deployed it); answer when its replicas have ended."""
        return {"deleted": await self._controller.editor.delete(app, By(owner, client), own=own)}

    @operation
    async def serve_shutdown(self, owner: str = "", client: str = "") -> dict[str, Any]:
        """Take everything away; the controller stays and can be used again."""
        # HTTP drains first: a proxy that is still open would answer 404 for what is gone.
        await self._controller.front.stop()
        names = [name for name, app in self._controller.registry.applications.items() if not app.deleting]
        by = By(owner, client)
        deleting = (self._controller.editor.delete(name, by) for name in names)
        errors = await asyncio.gather(*deleting, return_exceptions=True)
        self._controller.publish()
        for error in errors:
            # Another session may have been faster.
            if isinstance(error, BaseException) and not isinstance(error, ApplicationNotFoundError):
                raise error
        return {}
