"""Files of Ray Serve become documents of ours: every key is taken over, or named with why not and what instead."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_serve.config import DeploymentOptions, HTTPOptions
from dask_serve.exceptions import ConfigError
from dask_serve.options import build_options
from dask_serve.shipping.migration import Migrated, migrate

#: By key of a deployment in Ray's file: values, and what becomes of each here; None: it is dropped.
DEPLOYMENT: dict[str, list[tuple[Any, dict[str, Any] | None]]] = {
    "num_replicas": [(3, {"num_replicas": 3}), ("auto", {"num_replicas": "auto"}), (0, None)],
    "max_ongoing_requests": [(7, {"max_ongoing_requests": 7}), (0, None)],
    "max_concurrent_queries": [(7, {"max_ongoing_requests": 7})],
    "max_queued_requests": [(-1, {"max_queued_requests": None}), (9, {"max_queued_requests": 9})],
    "user_config": [({"a": [1]}, {"user_config": {"a": [1]}})],
    "graceful_shutdown_timeout_s": [(5, {"graceful_shutdown_timeout_s": 5})],
    "health_check_period_s": [(5, {"health_check_period_s": 5})],
    "health_check_timeout_s": [(5, {"health_check_timeout_s": 5})],
    "max_replicas_per_node": [(2, {"max_replicas_per_worker": 2})],
    "max_surge_percent": [(50, {"max_surge": 0.5}), (0, None)],
    "rolling_update_percentage": [(0.2, {"max_unavailable": 0.2}), (1, {"max_unavailable": 1})],
    "autoscaling_config": [
        (
            {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 3, "downscale_delay_s": 4},
            {
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": 4,
                    "upscale_delay_s": 3,
                    "downscale_delay_s": 4,
                }
            },
        ),
        ({"min_replicas": 2}, {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}),
        ({"min_replicas": 5, "max_replicas": 4}, None),
    ],
    "ray_actor_options": [
        ({"num_cpus": 1}, {}),
        ({"num_cpus": 4}, {"threads": 4}),
        ({"num_cpus": 1.5}, {"threads": 2}),
        ({"num_gpus": 0.5}, {"gpus": 0.5}),
        ({"num_gpus": 1.5}, None),
        ({"memory": 2e9}, {"memory": 2_000_000_000}),
        ({"resources": {"tpu": 1}}, {"resources": {"tpu": 1}}),
        ({"num_cpus": 0}, None),
        ({"num_cpus": 0.1}, None),
        ({"accelerator_type": "A100"}, None),
        ({"label_selector": {"a": "b"}}, None),
        ({"fallback_strategy": [1]}, None),
        ({"runtime_env": {"pip": ["torch"]}}, {"runtime_env": {"pip": ["torch"]}}),
        ({"runtime_env": {"conda": {"dependencies": ["torch"]}}}, None),
        ({"object_store_memory": 5}, None),
    ],
    "placement_group_bundles": [([{"CPU": 1}], None)],
    "placement_group_strategy": [("PACK", None)],
    "backpressure_config": [({"status_code": 429}, None)],
    "graceful_shutdown_wait_loop_s": [(2, None)],
    "logging_config": [({"log_level": "DEBUG"}, {"log_level": "DEBUG"})],
    "request_router_config": [({"initial_backoff_s": 1}, None)],
    "max_constructor_retry_count": [(3, None)],
    "gang_scheduling_config": [({"gang_size": 2}, None)],
    "deployment_actors": [([1], None)],
    "something_new": [(1, None)],
}


def of(**deployment: Any) -> Migrated:
    config = {"http_options": {"host": "127.0.0.1", "request_timeout_s": 5}}
    return migrate({**config, "applications": [{"import_path": "a:b", "deployments": [{"name": "D", **deployment}]}]})


def told(migrated: Migrated) -> str:
    return "\n".join(note.path for note in migrated.notes)


@pytest.mark.parametrize(
    ("key", "value", "ours"), [(key, *case) for key, cases in DEPLOYMENT.items() for case in cases]
)
def test_options_of_deployments(key: str, value: Any, ours: dict[str, Any] | None) -> None:
    migrated = of(**{key: value})
    entries = migrated.document["applications"][0].get("deployments", [])
    if ours:
        assert entries == [{"name": "D", **ours}]
        build_options(DeploymentOptions, {"num_replicas": "auto", **ours} if "autoscaling_config" in ours else {}, "D")
    else:
        assert entries == []
    if ours is None:
        notes = [note for note in migrated.notes if f"applications[0].deployments[0].{key}" in note.path]
        assert "dropped" in [note.kind for note in notes]
        assert all(len(note.text) > 10 for note in notes)


def test_http() -> None:
    http = {
        "host": "10.0.0.1",
        "port": 80,
        "root_path": "/x",
        "request_timeout_s": 3,
        "keep_alive_timeout_s": 90,
        "ssl_certfile": "c.pem",
        "ssl_keyfile": "k.pem",
        "ssl_ca_certs": "ca.pem",
        "ssl_keyfile_password": "secret",
        "location": "EveryNode",
        "num_cpus": 1,
        "middlewares": [1],
        "odd": 1,
    }
    migrated = migrate({"http_options": http, "applications": []})
    assert migrated.document["http"] == {
        "host": "10.0.0.1",
        "port": 80,
        "root_path": "/x",
        "request_timeout_s": 3,
        "keep_alive_timeout_s": 90,
        "tls_certificate": "c.pem",
        "tls_key": "k.pem",
        "tls_client_ca": "ca.pem",
    }
    build_options(HTTPOptions, migrated.document["http"], "http")
    for key in ("ssl_keyfile_password", "location", "num_cpus", "middlewares", "odd"):
        assert f"http_options.{key}" in told(migrated)
    # A password is not repeated in what is printed.
    assert "secret" not in str(migrated)
    half = migrate({"http_options": {"ssl_certfile": "c.pem", "ssl_ca_certs": "x"}, "applications": []})
    assert "tls_certificate" not in half.document["http"]
    assert "http_options.ssl" in told(half)


def test_the_top() -> None:
    top = {
        "proxy_location": "EveryNode",
        "grpc_options": {"port": 9000},
        "logging_config": {"encoding": "JSON"},
        "tracing_config": {"enabled": True},
        "controller_options": {"runtime_env": {}},
        "target_capacity": 50,
        "odd": 1,
    }
    migrated = migrate({**top, "applications": []})
    assert [note.path for note in migrated.notes][: len(top)] == list(top)
    # Ray's files listen on all interfaces, and wait for ever.
    assert migrated.document["http"] == {"host": "0.0.0.0"}
    assert "http_options.host" in told(migrated)
    assert "http_options.request_timeout_s" in told(migrated)
    nowhere = migrate({"proxy_location": "Disabled", "applications": [{"import_path": "a:b"}]})
    assert nowhere.document["applications"][0]["route_prefix"] is None
    assert "http" not in nowhere.document
    assert not told(migrate({"proxy_location": "HeadOnly", "applications": []})).startswith("proxy_location")


def test_applications() -> None:
    migrated = migrate(
        {
            "applications": [
                {
                    "name": "text",
                    "import_path": "ml.text.app",
                    "route_prefix": "/text",
                    "args": {"size": 3},
                    "runtime_env": {"pip": ["torch"], "env_vars": {"A": "b"}, "working_dir": "s3://x"},
                    "logging_config": {"log_level": "INFO"},
                    "autoscaling_policy": {"policy_function": "x:y"},
                    "external_scaler_enabled": True,
                    "odd": 1,
                },
                {"import_path": "ml.other:build"},
            ]
        }
    )
    assert migrated.document["applications"] == [
        {"name": "text", "import_path": "ml.text:app", "route_prefix": "/text", "args": {"size": 3}},
        {"name": "default", "import_path": "ml.other:build", "route_prefix": "/"},
    ]
    keys = ("runtime_env.pip", "runtime_env.env_vars", "runtime_env.working_dir", "logging_config")
    for key in (*keys, "autoscaling_policy", "external_scaler_enabled", "odd"):
        assert f"applications[0].{key}" in told(migrated)


def test_one_application_at_the_top_as_in_older_files() -> None:
    migrated = migrate(
        {"import_path": "a.b:c", "runtime_env": {"pip": ["x"]}, "deployments": [{"name": "D"}], "port": 1}
    )
    assert migrated.document["applications"] == [
        {
            "name": "default",
            "import_path": "a.b:c",
            "route_prefix": "/",
            "deployments": [{"name": "D", "runtime_env": {"pip": ["x"]}}],
        }
    ]
    assert "runtime_env.pip" in told(migrated)
    assert "port" in told(migrated).splitlines()


def test_environments_of_applications() -> None:
    """What an application has all its deployments have; their own goes first, and variables are put together."""
    everywhere = {"pip": {"packages": ["x==1"], "pip_check": False}, "env_vars": {"A": "1", "B": "1"}, "conda": "y"}
    own = {"pip": ["z"], "env_vars": {"B": "2"}, "working_dir": "s3://bucket/code.zip"}
    deployments = [{"name": "First"}, {"name": "Second", "ray_actor_options": {"runtime_env": own}}]
    application = {"import_path": "a:b", "runtime_env": everywhere, "deployments": deployments}
    migrated = migrate({"applications": [application]})
    first, second = migrated.document["applications"][0]["deployments"]
    assert first["runtime_env"] == {"pip": ["x==1"], "env_vars": {"A": "1", "B": "1"}}
    assert second["runtime_env"] == {"pip": ["z"], "env_vars": {"A": "1", "B": "2"}}
    for entry in (first, second):
        build_options(DeploymentOptions, {"runtime_env": entry["runtime_env"]}, "it")
    kinds = {(note.path.removeprefix("applications[0]."), note.kind) for note in migrated.notes}
    assert {
        ("runtime_env.pip", "changed"),
        ("runtime_env.pip", "dropped"),
        ("runtime_env.env_vars", "changed"),
        ("runtime_env.conda", "dropped"),
        ("deployments[1].ray_actor_options.runtime_env.working_dir", "dropped"),
    } <= kinds
    # Without names of deployments there is no place for it.
    bare = migrate({"applications": [{"import_path": "a:b", "runtime_env": {"pip": ["x"]}}]})
    assert "deployments" not in bare.document["applications"][0]
    assert next(n.kind for n in bare.notes if n.path == "applications[0].runtime_env.pip") == "dropped"


def test_autoscaling() -> None:
    config = {
        "target_num_ongoing_requests_per_replica": 4,
        "smoothing_factor": 2,
        "metrics_interval_s": 10,
        "look_back_period_s": 30,
        "aggregation_function": "max",
        "policy": {"policy_function": "a.b.c", "policy_kwargs": {"x": 1}},
        "initial_replicas": 3,
        "odd": 1,
    }
    migrated = of(autoscaling_config=config, num_replicas=2)
    assert migrated.document["applications"][0]["deployments"][0] == {
        "name": "D",
        "autoscaling_config": {
            "target_ongoing_requests": 4,
            "upscaling_factor": 2,
            "downscaling_factor": 1.0,
            "policy": ["a.b:c", {"x": 1}],
            "initial_replicas": 3,
            "max_replicas": 3,
        },
    }
    for key in ("metrics_interval_s", "look_back_period_s", "aggregation_function", "policy", "odd", "max_replicas"):
        assert f"autoscaling_config.{key}" in told(migrated)
    assert "deployments[0].num_replicas" in told(migrated)
    auto = of(num_replicas="auto", autoscaling_config={"min_replicas": 2, "policy": {"policy_function": DEFAULT}})
    entry = auto.document["applications"][0]["deployments"][0]
    assert entry == {"name": "D", "num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}


DEFAULT = "ray.serve.autoscaling_policy:default_autoscaling_policy"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no configuration file"),
        ([], "no configuration file"),
        ({"version": 1}, "no configuration file"),
        ({"applications": {}}, "applications is"),
        ({"applications": [1]}, r"applications\[0\] is 1"),
        ({"applications": [{}]}, r"applications\[0\]\.import_path is None"),
        ({"applications": [{"import_path": "a b"}]}, "import_path is 'a b'"),
        ({"applications": [{"import_path": "a:b", "deployments": [{}]}]}, r"deployments\[0\] has no name"),
        ({"applications": [{"import_path": "a:b", "args": 1}]}, "args is 1"),
        ({"http_options": 1, "applications": []}, "http_options is 1"),
    ],
)
def test_what_is_no_such_file(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        migrate(config)


texts = st.sampled_from(["", "auto", "a:b", "num_cpus", "min_replicas", "policy", "num_gpus", "memory", "resources"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 200), st.floats(-2, 2), texts)
values = st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(texts, scalars, max_size=2))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(DEPLOYMENT)), values, max_size=6))
def test_whatever_a_file_holds_the_document_is_valid_and_nothing_is_lost(deployment: dict[str, Any]) -> None:
    try:
        migrated = of(**deployment)
    except ConfigError:
        return
    (entry,) = migrated.document["applications"][0].get("deployments") or [{"name": "D"}]
    options = {name: value for name, value in entry.items() if name != "name"}
    if "autoscaling_config" in options:
        options["num_replicas"] = "auto"
    elif options.get("num_replicas") == "auto":
        del options["num_replicas"]
    build_options(DeploymentOptions, options, "D")
    noted = told(migrated).splitlines()

    def accounted(key: str, *ours: str) -> bool:
        at = f"applications[0].deployments[0].{key}"
        return any(name in entry for name in ours) or any(path == at or path.startswith(at + ".") for path in noted)

    for key, value in deployment.items():
        if key == "ray_actor_options":
            for name, amount in (value or {}).items():
                # One CPU is Ray's default, and what one thread is here.
                if amount not in (None, {}, []) and (name, amount) != ("num_cpus", 1):
                    assert accounted(f"{key}.{name}", RENAMED.get(name, name)), name
        elif value is not None:
            assert accounted(key, key, RENAMED.get(key, key)), key


RENAMED = {
    "max_concurrent_queries": "max_ongoing_requests",
    "max_surge_percent": "max_surge",
    "rolling_update_percentage": "max_unavailable",
    "max_replicas_per_node": "max_replicas_per_worker",
    "num_cpus": "threads",
    "num_gpus": "gpus",
}
