"""REST beside Dask's dashboard: what runs, and documents, for programs that have no Dask client."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from dask.utils import parse_timedelta
from tornado.web import HTTPError, RequestHandler

from ..defaults import RestSettings, checked
from ..exceptions import ApplicationNotFoundError, ConfigError, ServeError
from ..policy.history import By
from ..proxy.tokens import TokenFile, refusal
from .child import Outcome, Task
from .openapi import SCHEMA, openapi
from .scrape import targets

if TYPE_CHECKING:
    from .plugin import Controller

__all__ = ["Rest"]

logger = logging.getLogger("dask_serve.controller")

BASE = "/api/serve/v1"
#: Bytes of the largest document.
LARGEST = 2**20
#: Seconds after which somebody may try again who came while another document was deployed.
RETRY_AFTER = 5


class Rest:
    """The routes, and who may do what.

    Parameters
    ----------
    controller : Controller
        Answers.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.timeout = 300.0
        #: Why nothing can be changed by requests; empty: it can.
        self.closed = (
            "requests cannot change what runs here: set serve.rest.writes and serve.rest.tokens-file in Dask's "
            "configuration of the scheduler, or use `dask serve deploy`"
        )
        self._tokens: TokenFile | None = None
        try:
            self._configure(checked(RestSettings, "rest"))
        except ServeError as error:
            self.closed = "requests cannot change what runs here; the scheduler's log says why"
            logger.error("REST: %s. Requests change nothing", error)

    def _configure(self, settings: RestSettings) -> None:
        try:
            self.timeout = float(parse_timedelta(settings.timeout, "s"))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"serve.rest.timeout = {settings.timeout!r} is no time: write seconds, or text such as '5 minutes'"
            ) from None
        if not settings.writes:
            return
        if settings.tokens_file is None:
            raise ConfigError(
                "serve.rest.writes needs serve.rest.tokens-file: whoever deploys runs code on the cluster. Make one "
                "with `openssl rand -hex 32 > tokens && chmod 600 tokens`"
            )
        self._tokens = TokenFile(settings.tokens_file, "serve.rest.tokens-file")
        self.closed = ""

    def install(self) -> None:
        """Add the routes to the scheduler's HTTP server."""
        application = self.controller.scheduler.http_application
        base = _prefix(application) + BASE
        application.add_handlers(
            ".*$",
            [
                (rf"{base}/applications/?", _Applications, {"rest": self}),
                (rf"{base}/applications/([^/]+)", _Application, {"rest": self}),
                (rf"{base}/(openapi|schema)\.json", _Description, {"rest": self, "base": base}),
                (rf"{base}/targets", _Targets, {"rest": self, "base": base.removesuffix(BASE)}),
            ],
        )

    def refusal(self, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Return the status and the reason where a request may change nothing."""
        if self.closed:
            return 403, self.closed
        assert self._tokens is not None
        self._tokens.watched.check()
        reason = refusal(headers, self._tokens)
        return None if reason is None else (401, reason)


def _prefix(application: Any) -> str:
    """Return the prefix of Dask's own routes, which `--dashboard-prefix` gives."""
    for rule in application.wildcard_router.rules:
        pattern = getattr(getattr(rule.matcher, "regex", None), "pattern", "")
        if pattern.rstrip("$").endswith("/health"):
            return str(pattern.rstrip("$").removesuffix("/health"))
    return ""


class _Handler(RequestHandler):
    """Answers are JSON, those of errors too."""

    def initialize(self, rest: Rest, base: str = "") -> None:
        self.rest = rest
        self.base = base
        self.controller = rest.controller

    def prepare(self) -> None:
        if self.request.method in ("GET", "HEAD", "OPTIONS"):
            return
        headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in self.request.headers.get_all()]
        refused = self.rest.refusal(headers)
        if refused is not None:
            if refused[0] == 401:
                self.set_header("WWW-Authenticate", "Bearer")
            self.answer(
                {"type": "Unauthorized" if refused[0] == 401 else "Forbidden", "message": refused[1]}, refused[0]
            )
        elif len(self.request.body) > LARGEST:
            self.answer({"type": "BodyTooLarge", "message": f"a document has at most {LARGEST} bytes"}, 413)

    def answer(self, content: Any, status: int = 200) -> None:
        """Send JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(msgspec.json.encode(content))

    def fail(self, error: ServeError) -> None:
        """Send what went wrong."""
        status = 400 if isinstance(error, ConfigError) else error.status
        if status == 409:
            self.set_header("Retry-After", str(RETRY_AFTER))
        self.answer({"type": type(error).__name__, "message": str(error)}, status)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        told = error.log_message if isinstance(error, HTTPError) and error.log_message else self._reason
        self.answer({"type": "Error", "message": told}, status_code)

    def flag(self, name: str) -> bool:
        """Return an argument of the query that is true or false."""
        text = self.get_query_argument(name, "false").lower()
        if text not in ("true", "false", "1", "0", ""):
            raise HTTPError(400, f"{name}={text}: write true or false")
        return text in ("true", "1", "")


class _Applications(_Handler):
    """All applications."""

    def get(self) -> None:
        self.answer(self.controller.present_status())

    async def put(self) -> None:
        try:
            document = self.request.body.decode("utf-8")
        except UnicodeDecodeError as error:
            self.answer({"type": "ConfigError", "message": f"the document is no UTF-8: {error}"}, 400)
            return
        unknown = self.request.query_arguments.keys() - {"prune", "dry_run"}
        if unknown:
            raise HTTPError(400, f"there is no argument {min(unknown)}; those there are: prune, dry_run")
        task = Task(document=document, name="the document", prune=self.flag("prune"), dry_run=self.flag("dry_run"))
        try:
            outcome = await self.controller.deployer.run(task, self.rest.timeout)
        except ServeError as error:
            self.fail(error)
            return
        if outcome.error:
            self.answer(
                {"type": outcome.error, "message": outcome.message, "problems": outcome.problems}, _status_of(outcome)
            )
        else:
            self.answer(
                {
                    "changes": outcome.changes,
                    "versions": outcome.versions,
                    "before": outcome.before,
                    "deleted": outcome.deleted,
                    "url": outcome.url,
                }
            )


class _Targets(_Handler):
    """Where Prometheus finds metrics."""

    def get(self) -> None:
        front = self.controller.front
        self.answer(targets(self.controller.scheduler, self.base, front.describe(), front.options.admin_host))


class _Application(_Handler):
    """One of them."""

    def get(self, name: str) -> None:
        name = unquote(name)
        found = self.controller.present_status().applications.get(name)
        if found is None:
            self.fail(ApplicationNotFoundError(self.controller.editor.not_found(name)))
        else:
            self.answer(found)

    async def delete(self, name: str) -> None:
        name = unquote(name)
        try:
            await self.controller.editor.delete(name, By(f"REST@{self.request.remote_ip}"))
        except ServeError as error:
            self.fail(error)
        else:
            self.answer({"deleted": [name]})


class _Description(_Handler):
    """What there is, in words for programs."""

    def get(self, name: str) -> None:
        self.answer(openapi(self.base) if name == "openapi" else msgspec.Raw(SCHEMA.read_bytes()))


def _status_of(outcome: Outcome) -> int:
    """Return the HTTP status of what a child could not do."""
    statuses = {"DocumentError": 400, "ConfigError": 400, "ConflictError": 409, "StartTimeoutError": 503}
    return statuses.get(outcome.error, 500)
