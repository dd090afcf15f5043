"""From a configuration file of Ray Serve to a document of ours, and a list of what has no place in it. Pure.

What both know is taken over; where a default differs in a way that a service would notice, Ray's is written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from ..config import AutoscalingConfig, DeploymentOptions, HTTPOptions, RuntimeEnv
from ..exceptions import ConfigError
from ..options import build_options
from .rays_keys import (
    APPLICATION,
    APPLICATION_ELSEWHERE,
    ARCHIVES,
    DEFAULT_POLICY,
    HTTP,
    HTTP_ELSEWHERE,
    OLDER,
    PACKAGES,
    SAME,
    SCALING,
    SHARED,
    TOP,
    UNNAMED,
)
from .spellings import LOGGING, advice, translate

__all__ = ["Migrated", "Note", "migrate"]

#: The version of the documents that this makes.
VERSION = 1


class Note(Struct, frozen=True):
    """One thing that is not as it was.

    Attributes
    ----------
    path : str
        Where it stands in Ray's file, e.g. ``applications[0].deployments[1].ray_actor_options.num_cpus``.
    kind : str
        ``"dropped"``: it has no counterpart, or ``"changed"``: it was taken over, and means something else.
    text : str
        Why, and what to do instead.
    """

    path: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}): {self.text}"


class Migrated(Struct, frozen=True):
    """A document of ours, and what to know of it.

    Attributes
    ----------
    document : dict
        For YAML.
    notes : list of Note
        In the order of Ray's file.
    """

    document: dict[str, Any]
    notes: list[Note]


def migrate(config: Any) -> Migrated:
    """Return our document for a configuration file of Ray Serve, as YAML gives it.

    Raises
    ------
    ConfigError
        It is no such file.
    """
    if not isinstance(config, dict) or not ({"applications", "import_path"} & config.keys()):
        raise ConfigError(
            "this is no configuration file of Ray Serve: it has neither `applications:` nor `import_path:` at its top; "
            "such a file is what `serve build` of Ray writes"
        )
    migration = _Migration()
    document = migration.service(config)
    return Migrated(document, migration.notes)


class _Migration:
    """Goes through a file, and takes notes."""

    def __init__(self) -> None:
        self.notes: list[Note] = []

    def dropped(self, path: str, text: str) -> None:
        self.notes.append(Note(path, "dropped", text))

    def changed(self, path: str, text: str) -> None:
        self.notes.append(Note(path, "changed", text))

    # ------------------------------------------------------------------ the whole

    def service(self, config: dict[str, Any]) -> dict[str, Any]:
        alone = "applications" not in config
        applications = [config] if alone else self._list(config["applications"], "applications")
        served = True
        http: dict[str, Any] = {}
        for key, value in config.items():
            if key in {"applications", *(APPLICATION if alone else ())}:
                continue
            if key == "proxy_location":
                served = self._location(value)
            elif key == "http_options":
                http = self._http(self._dict(value, key))
            elif value is None:
                continue
            elif key == "logging_config":
                self.dropped(key, LOGGING)
            elif key in TOP:
                self.dropped(key, TOP[key])
            else:
                self.dropped(key, "it is no key of a file of Ray Serve 2.60, and is left out")
        if "host" not in http and served:
            http = {"host": "0.0.0.0", **http}  # noqa: S104 - Ray's default
            self.changed(
                "http_options.host",
                "Ray's files listen on all interfaces unless they say otherwise, so that host: 0.0.0.0 is written out; "
                "without it proxies listen on 127.0.0.1",
            )
        if http.get("request_timeout_s") is None and served:
            http.pop("request_timeout_s", None)
            self.changed(
                "http_options.request_timeout_s",
                "without it Ray waits for ever; here an answer has to begin within 60 s: give request_timeout_s in "
                "seconds for longer",
            )
        made = []
        for number, application in enumerate(applications):
            where = "" if alone else f"applications[{number}]"
            made.append(self._application(self._dict(application, where or "the file"), where, served, alone))
        document: dict[str, Any] = {"version": VERSION}
        if http:
            document["http"] = http
        return {**document, "applications": made}

    def _location(self, value: Any) -> bool:
        if value == "Disabled":
            self.changed("proxy_location", "no proxies: applications have no route, which is `route_prefix: null`")
            return False
        if value == "EveryNode":
            self.dropped(
                "proxy_location",
                "proxies run beside the scheduler, as many as http.num_proxies says; `dask serve proxy` runs more of "
                "them on other machines",
            )
        return True

    def _http(self, options: dict[str, Any]) -> dict[str, Any]:
        http: dict[str, Any] = {}
        for key, value in options.items():
            where = f"http_options.{key}"
            if key in HTTP:
                if value is not None:
                    self._take(http, HTTPOptions, HTTP[key], value, where)
            elif key in HTTP_ELSEWHERE:
                if value:
                    self.dropped(where, HTTP_ELSEWHERE[key])
            else:
                self.dropped(where, "it is no option of Ray's proxies")
        if ("tls_certificate" in http) != ("tls_key" in http):
            self.dropped("http_options.ssl_keyfile", "TLS needs both ssl_keyfile and ssl_certfile")
            for key in ("tls_certificate", "tls_key"):
                http.pop(key, None)
        if "tls_certificate" not in http:
            http.pop("tls_client_ca", None)
        if "request_timeout_s" in http:
            self.changed(
                "http_options.request_timeout_s",
                "it is the time until the first byte of an answer here, and over it the status is 504 instead of 408",
            )
        return http

    # ------------------------------------------------------------------ one application

    def _application(self, config: dict[str, Any], where: str, served: bool, alone: bool) -> dict[str, Any]:
        at = f"{where}." if where else ""
        path = config.get("import_path")
        if not isinstance(path, str) or not re.fullmatch(r"[\w.]+[:.]\w[\w.]*", path):
            raise ConfigError(
                f"{at}import_path is {path!r}: it is text such as 'module:app', as `serve build` of Ray writes"
            )
        made: dict[str, Any] = {"name": config.get("name") or "default"}
        made["import_path"] = path if ":" in path else ":".join(path.rpartition(".")[::2])
        made["route_prefix"] = config.get("route_prefix", "/") if served else None
        shared = self._shared(config, at)
        for key, value in config.items():
            if key in {"name", "import_path", "route_prefix", "runtime_env"} or value in (None, {}, [], False):
                continue
            if key == "args":
                made["args"] = self._dict(value, f"{at}args")
            elif key == "deployments":
                if deployments := self._deployments(self._list(value, f"{at}deployments"), f"{at}deployments", shared):
                    made["deployments"] = deployments
            elif not alone or key in APPLICATION:
                unknown = "it is no key of an application of Ray Serve 2.60, and is left out"
                self.dropped(f"{at}{key}", APPLICATION_ELSEWHERE.get(key, unknown))
        return made

    def _deployments(self, entries: list[Any], where: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
        made = []
        for number, entry in enumerate(entries):
            at = f"{where}[{number}]"
            deployment = self._deployment(self._dict(entry, at), at)
            own = deployment.pop("runtime_env", {})
            # As Ray has it: a deployment's own goes first, and only variables are put together.
            together = {**shared, **own}
            if variables := {**shared.get("env_vars", {}), **own.get("env_vars", {})}:
                together["env_vars"] = variables
            made.append({**deployment, "runtime_env": together} if together else deployment)
        return [entry for entry in made if len(entry) > 1]

    def _shared(self, config: dict[str, Any], at: str) -> dict[str, Any]:
        """Return the environment of all deployments of an application."""
        value = config.get("runtime_env")
        shared = self._runtime_env(value, f"{at}runtime_env") if value else {}
        named = bool(config.get("deployments"))
        for key in shared:
            if named:
                self.changed(f"{at}runtime_env.{key}", SHARED)
            else:
                self.dropped(f"{at}runtime_env.{key}", UNNAMED)
        return shared if named else {}

    def _runtime_env(self, value: Any, where: str) -> dict[str, Any]:
        """Return what of an environment is possible here."""
        made: dict[str, Any] = {}
        if not isinstance(value, dict):
            self.dropped(where, PACKAGES)
            return made
        for key, content in value.items():
            at = f"{where}.{key}"
            if not content:
                continue
            if key == "pip" and isinstance(content, dict):
                if packages := content.get("packages"):
                    self._take(made, RuntimeEnv, "pip", packages, at)
                if others := sorted(content.keys() - {"packages"}):
                    self.dropped(at, f"pip is a list of requirements here, without {', '.join(others)}")
            elif key in {"pip", "env_vars"}:
                self._take(made, RuntimeEnv, key, content, at)
            else:
                self.dropped(at, ARCHIVES.get(key, PACKAGES))
        return made

    # ------------------------------------------------------------------ one deployment

    def _deployment(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(config.get("name"), str):
            raise ConfigError(f"{where} has no name: it says whose options these are")
        made: dict[str, Any] = {"name": config["name"]}
        # Ray's defaults of the bounds differ with it.
        follows = config.get("num_replicas") in ("auto", None)
        if config.get("num_replicas") == "auto":
            made["num_replicas"] = "auto"
        for key, value in config.items():
            at = f"{where}.{key}"
            if key == "name" or (value is None and key != "max_queued_requests"):
                continue
            handler = _OPTIONS.get(key)
            if key in SAME:
                self._take(made, DeploymentOptions, key, value, at)
            elif handler is not None:
                handler(self, made, value, at)
            elif key == "max_replicas_per_node":
                if self._take(made, DeploymentOptions, "max_replicas_per_worker", value, at):
                    self.changed(at, "it is max_replicas_per_worker: workers are counted, not machines")
            else:
                told = advice(key)
                self.dropped(at, told or "it is no option of a deployment of Ray Serve 2.60, and is left out")
        if not follows and "autoscaling_config" in made and made.pop("num_replicas", None) is not None:
            self.dropped(f"{where}.num_replicas", "autoscaling_config says how many there are")
        elif made.get("num_replicas") == "auto" and "autoscaling_config" not in made:
            self.changed(f"{where}.num_replicas", _other_defaults({}))
        return made

    def _take(self, made: dict[str, Any], kind: type[Struct], name: str, value: Any, where: str) -> bool:
        """Take an option over, if it is valid here."""
        try:
            build_options(kind, {name: value}, "it")
        except ConfigError as error:
            # Some options are only valid together.
            if " belong together" not in str(error) and " needs tls_" not in str(error):
                self.dropped(where, f"{value!r} is not possible here: {error}")
                return False
        made[name] = value
        return True

    def _num_replicas(self, made: dict[str, Any], value: Any, where: str) -> None:
        if value != "auto":
            self._take(made, DeploymentOptions, "num_replicas", value, where)

    def _concurrent(self, made: dict[str, Any], value: Any, where: str) -> None:
        self._take(made, DeploymentOptions, "max_ongoing_requests", value, where)

    def _max_queued(self, made: dict[str, Any], value: Any, where: str) -> None:
        if value in (None, -1):
            made["max_queued_requests"] = None
        elif self._take(made, DeploymentOptions, "max_queued_requests", value, where):
            self.changed(
                where, "all routers together count, where in Ray each of them had so many; give the sum of them"
            )

    def _scaling(self, made: dict[str, Any], value: Any, where: str) -> None:
        given = self._scaling_fields(self._dict(value, where), where)
        if "max_replicas" not in given and made.get("num_replicas") != "auto":
            given["max_replicas"] = max(1, *(_number(given.get(name)) for name in ("min_replicas", "initial_replicas")))
            self.changed(f"{where}.max_replicas", f"it is {given['max_replicas']}, Ray's default; ours is 100")
        try:
            build_options(AutoscalingConfig, given, "autoscaling_config")
        except ConfigError as error:
            self.dropped(where, f"it is not possible here: {error}")
            return
        made["autoscaling_config"] = given
        if told := _other_defaults(given):
            self.changed(where, told)

    def _scaling_fields(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for key, amount in config.items():
            at = f"{where}.{key}"
            if amount is None:
                continue
            if key == "smoothing_factor":
                for name in ("upscaling_factor", "downscaling_factor"):
                    given.setdefault(name, amount)
            elif key in SCALING:
                self.dropped(at, SCALING[key])
            elif key == "policy":
                self._policy(given, amount, at)
            else:
                name = OLDER.get(key, key)
                if name in AutoscalingConfig.__struct_fields__:
                    given[name] = amount
                else:
                    self.dropped(at, "it is no field of autoscaling_config of Ray Serve 2.60, and is left out")
        if _number(given.get("downscaling_factor")) > 1:
            given["downscaling_factor"] = 1.0
            self.changed(f"{where}.downscaling_factor", "it is at most 1: one step stops all that is too much")
        return given

    def _policy(self, given: dict[str, Any], value: Any, where: str) -> None:
        policy = value if isinstance(value, dict) else {"policy_function": value}
        path = policy.get("policy_function") or policy.get("name") or ""
        if not isinstance(path, str) or path.endswith(DEFAULT_POLICY):
            return
        path = path if ":" in path else ":".join(path.rpartition(".")[::2])
        arguments = policy.get("policy_kwargs") or {}
        given["policy"] = [path, arguments] if arguments else path
        self.changed(where, 'a policy has another signature: see "A policy of your own" in the page on autoscaling')

    def _actor(self, made: dict[str, Any], value: Any, where: str) -> None:
        for key, amount in self._dict(value, where).items():
            at = f"{where}.{key}"
            if amount is None or amount in ({}, []):
                continue
            if key == "runtime_env":
                if environment := self._runtime_env(amount, at):
                    made["runtime_env"] = environment
            elif key == "num_cpus":
                self._cpus(made, amount, at)
            elif key in {"num_gpus", "memory", "resources"}:
                try:
                    ours = translate({}, {"ray_actor_options": {key: amount}})
                except ConfigError as error:
                    self.dropped(at, f"{amount!r} is not possible here: {error}")
                    continue
                for name, translated in ours.items():
                    self._take(made, DeploymentOptions, name, translated, at)
                if key == "resources":
                    self.changed(at, "start the workers with them: `dask worker --resources NAME=AMOUNT`")
            else:
                told = advice(key)
                self.dropped(at, told or "workers are processes of Dask's, and have no such option")

    def _cpus(self, made: dict[str, Any], amount: Any, where: str) -> None:
        if not isinstance(amount, (int, float)) or isinstance(amount, bool) or amount < 0:
            self.dropped(where, f"{amount!r} is no number of CPUs")
        elif amount > 1:
            if self._take(made, DeploymentOptions, "threads", translate({}, {"num_cpus": amount})["threads"], where):
                self.changed(
                    where,
                    "it is threads: so many `def` methods of a replica run at once, and it is placed by the threads "
                    "that workers have",
                )
        elif amount != 1:
            self.dropped(where, "each replica has one thread at least; workers may hold more replicas than threads")

    def _surge(self, made: dict[str, Any], value: Any, where: str) -> None:
        if isinstance(value, (int, float)) and 0 < value <= 100:
            made["max_surge"] = value / 100
        else:
            self.dropped(
                where, "an update starts new replicas before it stops old ones; with max_unavailable it need not wait"
            )

    def _rolling(self, made: dict[str, Any], value: Any, where: str) -> None:
        if self._take(made, DeploymentOptions, "max_unavailable", value, where):
            self.changed(
                where,
                "it is max_unavailable: so many may be missing, but only where there is no room for new replicas "
                "beside the old ones",
            )

    # ------------------------------------------------------------------ kinds

    @staticmethod
    def _dict(value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        if value is None:
            return {}
        raise ConfigError(f"{where} is {value!r}: it holds keys and values")

    @staticmethod
    def _list(value: Any, where: str) -> list[Any]:
        if isinstance(value, list):
            return value
        if value is None:
            return []
        raise ConfigError(f"{where} is {value!r}: it is a list")


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else 1


def _other_defaults(given: dict[str, Any]) -> str:
    delays = {"upscale_delay_s": "0 s instead of 30 s", "downscale_delay_s": "60 s instead of 600 s"}
    missing = [f"{name} is {told}" for name, told in delays.items() if name not in given]
    return f"other defaults: {', '.join(missing)}; loads are known at once here" if missing else ""


def _logging(migration: _Migration, made: dict[str, Any], value: Any, where: str) -> None:
    level = value.get("log_level") if isinstance(value, dict) else None
    if isinstance(level, str):
        made["log_level"] = level.upper()
    if not isinstance(level, str) or len(value) > 1:
        migration.dropped(where, LOGGING)


#: Options that mean something a little different.
_OPTIONS: dict[str, Callable[[_Migration, dict[str, Any], Any, str], None]] = {
    "num_replicas": _Migration._num_replicas,
    "max_queued_requests": _Migration._max_queued,
    "autoscaling_config": _Migration._scaling,
    "ray_actor_options": _Migration._actor,
    "max_concurrent_queries": _Migration._concurrent,
    "max_surge_percent": _Migration._surge,
    "rolling_update_percentage": _Migration._rolling,
    "logging_config": _logging,
}
