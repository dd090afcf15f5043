"""Documents without a cluster: reading, checking, building and writing them; defaults from Dask's configuration."""

from __future__ import annotations

import json
import logging
import pickle
import re
from typing import Any

import dask
import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import given as with_values
from hypothesis import settings
from hypothesis import strategies as st

import dask_serve as serve
from dask_serve import defaults
from dask_serve.config import DeploymentOptions, HTTPOptions
from dask_serve.controller.desired import DesiredState
from dask_serve.controller.leaving import Leaving  # noqa: F401 - its setting is declared in defaults
from dask_serve.document import shipped
from dask_serve.document.building import build_all
from dask_serve.document.declaration import ApplicationEntry, Document, given
from dask_serve.document.difference import difference
from dask_serve.document.problems import DocumentError
from dask_serve.document.rendering import render, render_desired
from dask_serve.document.validation import parse
from dask_serve.exceptions import ConfigError
from dask_serve.options import documented
from dask_serve.policy.desired import Source
from dask_serve.policy.history import By, Entry
from dask_serve.replica.room import FRACTION
from dask_serve.shipping.graph import build

#: Keys of YAML have an end; variables are another matter.
TEXT = st.text(max_size=50).map(lambda text: text.replace("$", ""))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def mistakes(text: str, environment: dict[str, str] | None = None) -> list[tuple[int, str, str]]:
    """Return line, field and message of what is wrong."""
    with pytest.raises(DocumentError) as caught:
        parse(text, "shop.yaml", environment or {})
    return [(problem.line, problem.field, problem.message) for problem in caught.value.problems]


def one(text: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    found = mistakes(text, environment)
    assert len(found) == 1, found
    return found[0]


GOOD = """
version: 1
http:
  port: 9000
  trusted_proxies: ["10.0.0.1"]
applications:
  - name: shop
    import_path: shop.main:build
    route_prefix: /shop
    args: {factor: 3}
    deployments:
      - name: Price
        num_replicas: 2
        memory: 4 GiB
        user_config: {on: [1, null, {x: no}]}
      - name: Model
        autoscaling_config: {min_replicas: 0, max_replicas: 4}
  - name: other
    import_path: other:app
    route_prefix: null
"""


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_document_is_read():
    checked = parse(GOOD, environment={})
    assert checked.http == {"port": 9000, "trusted_proxies": ["10.0.0.1"]}
    shop, other = checked.document.applications
    assert (shop.name, shop.import_path, shop.route_prefix, shop.args) == (
        "shop",
        "shop.main:build",
        "/shop",
        {"factor": 3},
    )
    price, model = map(given, shop.deployments)
    assert price == {"num_replicas": 2, "memory": "4 GiB", "user_config": {"on": [1, None, {"x": "no"}]}}
    assert model["autoscaling_config"].max_replicas == 4
    assert other.route_prefix is None


def test_json_is_a_document_too():
    plain = yaml.safe_load(GOOD.replace("{on:", "{'on':").replace("x: no", "x: 'no'"))
    plain["applications"][0]["args"]["text"] = "a/b 😀 \t"
    for written in (json.dumps(plain), json.dumps(plain, indent="\t")):
        found = parse(written, environment={}).document.applications[0]
        assert found.args == {"factor": 3, "text": "a/b 😀 \t"}


@settings(max_examples=50)
@with_values(JSON)
def test_any_json_arrives_as_it_is(value: Any):
    text = json.dumps({"version": 1, "applications": [{"import_path": "a:b", "args": {"value": value}}]})
    assert parse(text, environment={}).document.applications[0].args["value"] == value


def test_words_mean_what_they_mean_in_yaml_1_2():
    args = "{a: on, b: 1:30, c: 1e3, d: 0x10, e: 010, f: 2020-01-01}"
    text = f"version: 1\napplications:\n- import_path: a:b\n  args: {args}"
    args = parse(text, environment={}).document.applications[0].args
    assert args == {"a": "on", "b": "1:30", "c": 1000.0, "d": 16, "e": 10, "f": "2020-01-01"}


def test_anchors_and_merges():
    text = """
version: 1
applications:
  - import_path: a:b
    deployments:
      - &usual {name: A, threads: 2, num_replicas: 3}
      - <<: *usual
        name: B
        threads: 4
"""
    second = parse(text, environment={}).document.applications[0].deployments[1]
    assert given(second) == {"threads": 4, "num_replicas": 3}


# -- variables ---------------------------------------------------------------------------------------------------------


def test_variables_are_filled_in():
    text = """
version: 1
http:
  port: ${PORT}
  host: ${HOST:-127.0.0.1}
applications:
  - import_path: ${MODULE}:app
    args: {a: "${PORT}", b: "$${PORT} costs 5$", c: "x${EMPTY:-y}z"}
"""
    checked = parse(text, environment={"PORT": "9000", "MODULE": "shop", "EMPTY": ""})
    assert checked.http == {"port": 9000, "host": "127.0.0.1"}
    application = checked.document.applications[0]
    assert application.import_path == "shop:app"
    assert application.args == {"a": "9000", "b": "${PORT} costs 5$", "c": "xyz"}
    assert checked.tree.raw["applications"][0]["args"]["a"] == "${PORT}"


def test_variables_are_filled_in_once():
    checked = parse("version: 1\napplications:\n- import_path: a:b\n  name: ${A}", environment={"A": "${B}"})
    assert checked.document.applications[0].name == "${B}"


def test_what_a_variable_holds_is_checked():
    assert one("version: 1\nhttp:\n  port: ${PORT}", {"PORT": "http"}) == (
        3,
        "http.port",
        "'http' is not valid: expected `int | null`, got `str`",
    )


def test_a_variable_that_is_not_set():
    line, field, message = one("version: 1\nhttp:\n  host: ${NOWHERE}")
    assert (line, field) == (3, "http.host")
    assert "NOWHERE is not set" in message
    assert "${NOWHERE:-...}" in message


def test_a_variable_that_is_not_set_is_one_mistake():
    """The option wants a number, which the variable's name is not either."""
    line, field, message = one("version: 1\nhttp:\n  port: ${NOWHERE}")
    assert (line, field) == (3, "http.port")
    assert "NOWHERE is not set" in message


@pytest.mark.parametrize("text", ["${9}", "${}", "${a b}", "${open"])
def test_what_is_no_variable(text: str):
    assert "names no variable" in one(f"version: 1\nhttp:\n  host: '{text}'")[2]


def test_a_variable_inside_brackets_needs_quotes():
    assert "put ${...} into quotes" in one("version: 1\nhttp: {host: ${HOST}}", {"HOST": "x"})[2]


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD = """version: 1
htpp: {}
http:
  prot: 1
  port: 70000
  host: 3
  trusted_proxies: [1.2.3.4, 7]
applications:
  - import_path: ab
    num_replicas: 2
  - name: default
    route_prefix: x/
    deployments:
      - name: D
        num_replica: 2
        ray_actor_options: {}
        max_concurrent_queries: 3
        threads: 1.5
        debug: yes
      - name: D
        num_replicas: 0
        autoscaling_config: {min_replicas: 5, max_replicas: 2}
        memory: 4 Gigs
        middleware: 3
        version: 3
      - num_replicas: 1
      - 17
      - name: F
        autoscaling_config: {min_replica: 1}
  - import_path: a:b
    args: []
"""


def test_all_mistakes_are_told_each_with_its_line():
    first, second, third = (f"applications[{index}]" for index in range(3))
    expected = [
        (2, "htpp", "did you mean 'http'"),
        (4, "http.prot", "did you mean 'port'"),
        (5, "http.port", "70000 is not valid: expected `int` <= 65535"),
        (6, "http.host", "3 is not valid: expected `str`, got `int`; put it in quotes"),
        (7, "http.trusted_proxies[1]", "put it in quotes"),
        (9, f"{first}.import_path", "write MODULE:NAME"),
        (10, f"{first}.num_replicas", "it is a key of a deployment"),
        (11, second, "'import_path' is missing"),
        (11, f"{second}.name", "there is an application of that name already, 'default' in line 9"),
        (12, f"{second}.route_prefix", "must start with '/'"),
        (15, f"{second}.deployments[0].num_replica", "did you mean 'num_replicas'"),
        (16, f"{second}.deployments[0].ray_actor_options", "write threads, gpus, memory"),
        (17, f"{second}.deployments[0].max_concurrent_queries", "called max_ongoing_requests here"),
        (18, f"{second}.deployments[0].threads", "expected `int`, got `float`"),
        (19, f"{second}.deployments[0].debug", "'yes' is not valid: expected `bool`"),
        (20, f"{second}.deployments[1].name", "a deployment of that name already, 'D' in line 14"),
        (21, f"{second}.deployments[1].num_replicas", "0 is not valid"),
        (22, f"{second}.deployments[1].autoscaling_config", "min_replicas=5 is more than max_replicas=2"),
        (23, f"{second}.deployments[1].memory", "'4 GiB'"),
        (24, f"{second}.deployments[1].middleware", "it is a key of `http`"),
        (25, f"{second}.deployments[1].version", "put it in quotes"),
        (26, f"{second}.deployments[2]", "'name' is missing"),
        (27, f"{second}.deployments[3]", "it is a mapping of names to values, not 17"),
        (29, f"{second}.deployments[4].autoscaling_config.min_replica", "did you mean 'min_replicas'"),
        (30, f"{third}.name", "'default' in line 9"),
        (30, f"{third}.route_prefix", "an application with that route already, '/' in line 9"),
        (31, f"{third}.args", "expected a mapping, got a list"),
    ]
    found = mistakes(BAD)
    assert [(line, field) for line, field, _ in found] == [(line, field) for line, field, _ in expected]
    for (_, _, message), (_, field, text) in zip(found, expected, strict=True):
        assert text in message, field


def test_the_message_has_all_of_them_and_survives_a_pickle():
    with pytest.raises(DocumentError) as caught:
        parse("version: 1\nhtpp: {}\nx: 1", "shop.yaml")
    text = str(caught.value)
    assert text.splitlines()[0] == "shop.yaml has 2 mistakes, and nothing was changed"
    assert text.splitlines()[1].startswith("line 2: htpp: ")
    assert isinstance(caught.value, ConfigError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "it is empty; it begins with `version: 1`"),
        ("- a", 1, "a document is a mapping"),
        ("applications: []", 1, "begin the document with `version: 1`"),
        ("\nversion: 2\nfoo: 1", 2, "the document has version 2, and dask_serve"),
        ("version: '1'", 1, "the document has version '1'"),
        ("version: true", 1, "the document has version True"),
        ("http_options: {}\napplications: []", 1, "`dask serve migrate`"),
        ("a: [1\nb: 3", 2, "this is not YAML"),
        ("a: 1\n---\nb: 1", 2, "expected a single document"),
        ("\x00", 1, "special characters"),
        ("version: 1\nversion: 1", 2, "it is given twice, in line 1 too"),
        ("version: 1\nhttp: &x\n  a: *x", 2, "repeats what it is in"),
        ("version: 1\n? [a]\n: 1", 2, "a key is a text"),
        ("version: 1\nhttp: !!python/object:os.system {}", 2, "means nothing here"),
        ("version: !!int x", 1, "leave the tag out"),
        ("[" * 800, 1, "too much is nested"),
        (
            "version: 1\na: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
            2,
            "too long",
        ),
    ],
)
def test_what_is_no_document(text: str, line: int, message: str):
    found = mistakes(text)
    assert found[0][0] >= line
    assert any(message in told for _, _, told in found), found


def test_options_that_belong_together_are_checked_together():
    assert "tls_certificate and tls_key belong together" in one("version: 1\nhttp:\n  tls_key: x")[2]


# -- building ----------------------------------------------------------------------------------------------------------


@serve.deployment(num_replicas=3, max_ongoing_requests=7)
class Price:
    def __init__(self, factor: int = 1) -> None:
        pass

    def reconfigure(self, config: Any) -> None:
        pass


@serve.deployment
class Shop:
    def __init__(self, price: Any = None) -> None:
        pass


@serve.deployment(gpus=2)
class Gpu:
    pass


def load(path: str, arguments: Any) -> Any:
    if path == "broken:app":
        raise RuntimeError("no module of that name")
    if path == "gpu:app":
        return Gpu.bind()
    return Shop.bind(Price.bind(**arguments))


def built(text: str) -> Any:
    checked = parse(text, "shop.yaml", {"SECRET": "123"})
    return [application.spec for application in build_all(checked, load)]


SHOP = """
version: 1
applications:
  - import_path: shop:app
    name: shop
    args: {factor: "${SECRET}"}
    deployments:
      - name: Price
        num_replicas: 1
"""


def test_options_of_a_document_take_the_place_of_those_of_the_code():
    (spec,) = built(SHOP)
    price = next(deployment for deployment in spec.deployments if deployment.name == "Price")
    assert (price.options.num_replicas, price.options.max_ongoing_requests) == (1, 7)
    assert spec.source == Source(
        import_path="shop:app", args='args:\n  factor: "${SECRET}"', overrides={"Price": ["num_replicas"]}
    )


def test_what_runs_is_written_without_what_nobody_said():
    specs = built(SHOP.replace("num_replicas: 1", "runtime_env: {env_vars: {A: b}}"))
    document = yaml.safe_load(render(specs))
    (price,) = (one for one in document["applications"][0]["deployments"] if one["name"] == "Price")
    assert price["runtime_env"] == {"env_vars": {"A": "b"}}


def test_what_does_not_fit_the_code_is_told_with_its_line():
    text = """version: 1
applications:
  - import_path: broken:app
  - import_path: shop:app
    name: shop
    route_prefix: /shop
    deployments:
      - name: Prize
      - name: Other
  - import_path: gpu:app
    name: gpu
    route_prefix: /gpu
    deployments:
      - name: Gpu
        resources: {GPU: 1}
"""
    with pytest.raises(DocumentError) as caught:
        built(text)
    found = [(p.line, p.message) for p in caught.value.problems]
    assert [line for line, _ in found] == [3, 8, 9, 14]
    assert found[0][1] == "no module of that name"
    assert "did you mean 'Price'?" in found[1][1]
    assert "it has 'Price', 'Shop'" in found[2][1]
    assert "ask for GPUs twice" in found[3][1]


def test_an_option_that_is_taken_out_of_the_document_is_the_code_s_again():
    (spec,) = built(SHOP.replace("        num_replicas: 1\n", ""))
    assert {d.name: d.options.num_replicas for d in spec.deployments} == {"Price": 3, "Shop": 1}


# -- differences -------------------------------------------------------------------------------------------------------


def state(*specs: Any, http: HTTPOptions | None = None) -> DesiredState:
    entries = [Entry(version=1, spec=spec, by=By("me@here"), time=0.0, reason="deployed") for spec in specs]
    return DesiredState(applications=entries, http=http, explicit=["port"] if http else [])


def test_the_same_again_is_no_difference():
    specs = built(SHOP)
    assert difference(state(*specs, http=HTTPOptions(port=1)), built(SHOP), (HTTPOptions(port=1), ["port"])) == []


def test_differences_in_words():
    before = state(*built(SHOP), *built(SHOP.replace("name: shop", "name: old")), http=HTTPOptions(port=1))
    text = SHOP.replace("num_replicas: 1", "num_replicas: 2").replace("SECRET}", "SECRET:-1}")
    specs = built(text + "  - {import_path: 'shop:app', name: new, route_prefix: /new}\n")
    assert difference(before, specs, (HTTPOptions(port=2), ["port"]), prune=True) == [
        "~ http port: 1 → 2",
        "~ application 'shop'",
        '    args: {"factor":"${SECRET}"} → {"factor":"${SECRET:-1}"}',
        "    ~ deployment 'Price', in place",
        "        num_replicas: 1 → 2",
        "+ application 'new' at /new",
        "    + deployment 'Price', replicas: 3",
        "    + deployment 'Shop', replicas: 1",
        "- application 'old'",
    ]
    # Variables without quotes are numbers, or texts.
    bare = built(SHOP.replace('{factor: "${SECRET}"}', "\n      factor: ${SECRET}"))
    assert '    args: {"factor":"${SECRET}"} → {"factor":"${SECRET:-1}"}' in difference(
        state(*bare), built(text), (HTTPOptions(), [])
    )
    restarted = SHOP.replace("num_replicas: 1", "threads: 4").replace('"${SECRET}"', "4")
    lines = difference(before, built(restarted), (HTTPOptions(), []))
    assert "    ~ deployment 'Price', its replicas are replaced" in lines
    assert "        threads: 1 → 4" in lines


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_as_the_same():
    specs = built(SHOP)
    text = render(specs, (HTTPOptions(port=0, host="0.0.0.0"), ["port", "host"]), explain=True)
    assert [spec.deployments for spec in built(text)] == [spec.deployments for spec in specs]
    assert parse(text, environment={"SECRET": "1"}).http == {"host": "0.0.0.0", "port": 0}
    # The document gave it, though it is the default.
    assert "num_replicas: 1" in text
    assert "${SECRET}" in text
    assert "123" not in text
    assert text.startswith("# yaml-language-server: $schema=file://")


@settings(max_examples=50)
@with_values(JSON)
def test_any_user_config_is_written_so_that_it_is_read_as_the_same(value: Any):
    spec = build(Price.options(user_config={"value": value}).bind(), source=Source(import_path="a:b")).spec
    (entry,) = parse(render([spec]), environment={}).document.applications[0].deployments
    assert given(entry)["user_config"] == {"value": value}


@pytest.mark.parametrize("config", [{}, {"min_replicas": 0}])
def test_deployments_that_follow_their_load_are_written(config: dict[str, Any]):
    deployment = Price.options(num_replicas="auto", autoscaling_config=config)
    spec = build(deployment.bind(), source=Source(import_path="a:b")).spec
    (entry,) = parse(render([spec]), environment={}).document.applications[0].deployments
    assert Price.options(**given(entry)).all_options == deployment.all_options


def test_what_was_deployed_from_python_is_said_to_be():
    text = render_desired(state(build(Shop.bind(), "shop", "/shop").spec, http=HTTPOptions(port=9)))
    assert "# Deployed from Python by me@here" in text
    assert "port: 9" in text
    found = mistakes(text)
    assert [(field, "not valid" in message) for _, field, message in found] == [("applications[0].import_path", True)]


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_shipped_files_are_up_to_date():
    told = "run `python -m dask_serve.document.shipped`"
    assert shipped.SCHEMA.read_text() == shipped.schema_text(), told
    assert defaults.DEFAULTS.read_text() == shipped.defaults_text(), told


def test_every_option_is_documented():
    for kind in (HTTPOptions, DeploymentOptions, ApplicationEntry, Document, defaults.Settings, defaults.RestSettings):
        assert documented(kind).keys() == set(kind.__struct_fields__)


def test_the_schema_agrees_with_the_validation():
    schema = json.loads(shipped.schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    plain = yaml.safe_load(GOOD)
    assert list(validator.iter_errors(plain)) == []
    plain["http"]["port"] = "${PORT}"
    assert list(validator.iter_errors(plain)) == []
    for wrong in ({"version": 2}, {"version": 1, "htpp": {}}, {"version": 1, "http": {"port": "x"}}):
        assert list(validator.iter_errors(wrong))
    described = schema["$defs"]["DeploymentEntry"]["properties"]["num_replicas"]
    assert described["default"] == 1
    assert described["description"].startswith("How many replicas")


def test_shipped_defaults_are_those_that_are_declared():
    shipped_defaults = yaml.safe_load(defaults.DEFAULTS.read_text())["serve"]
    for section, kind in (("http", HTTPOptions), ("deployment", DeploymentOptions)):
        values = {name.replace("-", "_"): value for name, value in shipped_defaults[section].items()}
        assert msgspec.convert(values, kind) == kind()
    assert shipped_defaults["results-limit"] == FRACTION
    # Of Dask's own list: other tests begin with a configuration of their own.
    assert any("serve" in values for values in dask.config.defaults)


def test_every_key_that_is_read_is_declared():
    declared = yaml.safe_load(defaults.DEFAULTS.read_text())
    package = defaults.DEFAULTS.parent
    read = {
        key
        for path in package.rglob("*.py")
        for key in re.findall(r'config\.get\(\s*"(serve\.[a-z.-]+)"', path.read_text())
    }
    assert "serve.state-file" in read
    missing = []
    for key in sorted(read):
        found: Any = declared
        for part in key.split("."):
            found = found.get(part, missing) if isinstance(found, dict) else missing
        if found is missing:
            missing.append(key)
    assert missing == [], "declare them in dask_serve/defaults.py"


# -- Dask's configuration ----------------------------------------------------------------------------------------------


def test_nothing_is_configured_by_default():
    assert defaults.configured_http() == (HTTPOptions(), [])
    assert defaults.configured("deployment") == {}


def test_deployments_have_the_options_that_are_configured():
    with dask.config.set({"serve.deployment.max-ongoing-requests": 9, "serve.deployment.memory": "1 GiB"}):

        @serve.deployment(max_ongoing_requests=3)
        class One:
            pass

        @serve.deployment
        class Two:
            pass

    assert (One.max_ongoing_requests, Two.max_ongoing_requests) == (3, 9)
    assert One.all_options.memory == 2**30


def test_a_number_of_replicas_that_is_given_goes_before_one_that_is_configured():
    with dask.config.set({"serve.deployment.num-replicas": "auto"}):
        assert serve.deployment(Price.func_or_class).num_replicas == "auto"
        assert serve.deployment(num_replicas=2)(Price.func_or_class).num_replicas == 2


def test_an_argument_goes_before_the_configuration():
    with dask.config.set({"serve.http.port": 9000, "serve.http.body_limit": 5}):
        options = defaults.overlaid(HTTPOptions(port=1), ["port"])
    assert (options.port, options.body_limit) == (1, 5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("serve.http.port", "x", "serve.http in Dask's configuration: option port = 'x' is not valid"),
        ("serve.http.prot", 1, "did you mean 'port'"),
        ("serve.http", 3, "serve.http in Dask's configuration is a mapping, not 3"),
        ("serve.http.tls-key", "x", "tls_certificate and tls_key belong together"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(key: str, value: Any, message: str):
    with dask.config.set({key: value}), pytest.raises(ConfigError, match=message):
        defaults.configured_http()


def test_where_a_wrong_value_comes_from(tmp_path, monkeypatch):
    with dask.config.set({"serve.http.port": "x"}):
        monkeypatch.setenv("DASK_SERVE__HTTP__PORT", "x")
        with pytest.raises(ConfigError, match=r"from the environment variable DASK_SERVE__HTTP__PORT\); mend it there"):
            defaults.configured_http()
        monkeypatch.delenv("DASK_SERVE__HTTP__PORT")
        (tmp_path / "serve.yaml").write_text("serve: {http: {port: x}}")
        monkeypatch.setattr(dask.config, "paths", [str(tmp_path)])
        with pytest.raises(ConfigError, match=r"serve\.yaml\); mend it there"):
            defaults.configured_http()


def test_a_slip_in_the_name_of_a_section_is_a_warning(caplog, monkeypatch):
    monkeypatch.setenv("DASK_SERVE__HTPP__PORT", "1")
    with caplog.at_level(logging.WARNING, "dask_serve"), dask.config.set({"serve.htpp": {"port": 1}}):
        defaults.configured("http")
    assert "did you mean serve.http? (from the environment variable DASK_SERVE__HTPP__PORT)" in caplog.text
