"""Declarations, and the graph that is built from them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pickle
import sys
import types
import warnings
from typing import NamedTuple

import cloudpickle
import msgspec
import pytest

import dask_serve as serve
from dask_serve.config import AutoscalingConfig, DeploymentOptions
from dask_serve.deployment import Application, Deployment, deployment, methods
from dask_serve.exceptions import ConfigError
from dask_serve.shipping.code import unpack
from dask_serve.shipping.graph import build


@deployment
class Plain:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def predict(self, x):
        return x


@deployment(num_replicas=2, name="double", max_ongoing_requests=7)
def twice(x):
    return 2 * x


@deployment()
async def slow(x):
    return x


# -- declaring ---------------------------------------------------------------------------------------------------------


def test_declarations():
    assert isinstance(Plain, Deployment)
    assert (Plain.name, Plain.num_replicas, Plain.max_ongoing_requests) == ("Plain", 1, 100)
    assert (twice.name, twice.num_replicas, twice.max_ongoing_requests) == ("double", 2, 7)
    assert slow.func_or_class(1).close() is None
    assert serve.deployment is deployment
    assert repr(twice) == "<Deployment 'double', 2 replicas>"


def test_user_config_needs_somebody_who_takes_it():
    class Tuned:
        def reconfigure(self, config): ...

    tuned = deployment(user_config={"a": 1})(Tuned)
    assert (tuned.user_config, tuned.options(user_config=None).user_config) == ({"a": 1}, None)
    with pytest.raises(ConfigError, match=r"deployment 'Plain' has user_config=1, but Plain no method reconfigure"):
        Plain.options(user_config=1)
    with pytest.raises(ConfigError, match=r"deployment 'double': a function takes no user_config"):
        twice.options(user_config={})


@pytest.mark.parametrize("function", [deployment, Deployment.options])
def test_every_option_is_a_parameter(function):
    parameters = inspect.signature(function).parameters
    named = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert named == {*DeploymentOptions.__struct_fields__, "name"}


def test_options_copies():
    other = twice.options(num_replicas=5)
    assert (other.num_replicas, other.name, other.max_ongoing_requests) == (5, "double", 7)
    assert other.options(max_ongoing_requests=8, name="x").max_ongoing_requests == 8
    assert (twice.num_replicas, twice.name) == (2, "double")
    with pytest.raises(ConfigError, match="num_replicas"):
        twice.options(num_replicas=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_replicas": 0}, r"option '?num_replicas'? = 0 is not valid"),
        ({"num_replica": 1}, "did you mean 'num_replicas'"),
        (
            {"ray_actor_options": {"label_selector": {}}},
            r"ray_actor_options\['label_selector'\] has no counterpart here",
        ),
        ({"ray_actor_options": {"runtime_env": {"conda": "x"}}}, "runtime_env of .* has no option 'conda'"),
        ({"ray_actor_options": {"num_tpus": 1}}, "is not known; known keys: 'num_cpus'"),
        ({"ray_actor_options": 1}, "ray_actor_options = 1 is not valid: it is a dict"),
        ({"ray_actor_options": {"num_cpus": 2}, "threads": 2}, "is threads= here, which is given too"),
        ({"num_cpus": "2"}, "num_cpus = '2' is not valid: give a number"),
        ({"max_concurrent_queries": 0}, "max_ongoing_requests = 0 is not valid"),
        ({"num_replicas": "automatic"}, 'a number from 1 on, or "auto"'),
        ({"num_replicas": 2, "autoscaling_config": {}}, "exclude each other"),
        ({"autoscaling_config": None}, "give num_replicas="),
        ({"autoscaling_config": {"min_replica": 0}}, "did you mean 'min_replicas'"),
        ({"autoscaling_config": {"min_replicas": -1}}, "option min_replicas = -1 is not valid"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas=3 is more than max_replicas=2"),
        ({"autoscaling_config": {"initial_replicas": 0}}, "initial_replicas=0 is not between min_replicas=1"),
        ({"autoscaling_config": {"policy": "function"}}, "write 'module:function'"),
        ({"autoscaling_config": {"policy": ["a:b", {"x": object()}]}}, "must be JSON-able"),
        ({"autoscaling_config": 3}, "autoscaling_config = 3 is not valid"),
        ({"max_replicas_per_node": 3}, "use max_replicas_per_worker="),
        ({"gpus": 1.5}, "gpus = 1.5 is not valid: give a whole number"),
        ({"gpu": 1}, "did you mean 'gpus'"),
        ({"gpus": 1, "resources": {"GPU": 1}}, "ask for GPUs twice"),
        ({"memory": "4 gigs"}, "memory = '4 gigs' is not valid: give bytes, or text such as '4 GiB'"),
        ({"memory": 0}, "memory = 0 is not valid"),
        ({"health_check_period_s": 0}, "health_check_period_s = 0 is not valid"),
        ({"retries_on_loss": -1}, "retries_on_loss = -1 is not valid"),
        ({"workers": "w1"}, "workers = 'w1' is not valid: expected `list`, got `str`"),
        ({"resources": None}, "resources = None is not valid: expected `dict`, got `None`"),
        ({"request_timeout_s": "1 s"}, "request_timeout_s = '1 s' is not valid: expected `float \\| None`, got `str`"),
        ({"user_config": object()}, "'user_config' must be JSON-able"),
        ({"name": ""}, "non-empty str"),
        ({"name": "a/b"}, "a/b"),
        ({"name": "a#b"}, "a#b"),
        ({"name": 3}, "not 3"),
    ],
)
def test_wrong_options(options, expected):
    with pytest.raises(ConfigError, match=expected):

        @deployment(**options)
        class Model:
            pass


def test_numbers_that_follow_the_load():
    auto = Plain.options(num_replicas="auto")
    assert auto.all_options.autoscaling_config == AutoscalingConfig()
    to_zero = Plain.options(autoscaling_config={"min_replicas": 0, "max_replicas": 5})
    assert to_zero.num_replicas == "auto"
    assert to_zero.all_options.autoscaling_config == AutoscalingConfig(min_replicas=0, max_replicas=5)
    assert repr(to_zero) == "<Deployment 'Plain', 0 to 5 replicas>"
    assert Plain.options(autoscaling_config=AutoscalingConfig(max_replicas=2)).num_replicas == "auto"
    assert to_zero.options(threads=2).all_options.autoscaling_config == to_zero.all_options.autoscaling_config
    assert to_zero.options(num_replicas=3).all_options.autoscaling_config is None


def test_wrong_targets():
    with pytest.raises(ConfigError, match="takes a class or a function"):
        deployment(object())
    with pytest.raises(ConfigError, match="is a deployment already"):
        deployment(Plain)
    with pytest.raises(ConfigError, match="takes a class or a function"):
        deployment(functools.partial(print))


@pytest.mark.parametrize("name", ["remote", "options", "deployment_name", "app_name"])
def test_reserved_methods(name):
    with pytest.raises(ConfigError, match=rf"no method may be called '{name}'.*rename it"):
        deployment(type("Model", (), {name: lambda self: None}))


def test_calling_says_bind():
    with pytest.raises(ConfigError, match=r"Plain.bind\(...\)"):
        Plain(1)
    with pytest.raises(ConfigError, match=r"double.bind\(...\)"):
        twice(1)


def test_bind_checks_the_constructor():
    @deployment
    class Model:
        def __init__(self, path, *, size=1): ...

    assert Model.bind("p", size=2).args == ("p",)
    with pytest.raises(ConfigError, match=r"Model\(path, \*, size=1\): missing a required argument: 'path'"):
        Model.bind()
    with pytest.raises(ConfigError, match="unexpected keyword argument 'sice'"):
        Model.bind("p", sice=2)
    with pytest.raises(ConfigError, match="make it a class"):
        twice.bind(1)


def test_methods():
    class Base:
        def inherited(self): ...

        @property
        def value(self): ...

    class Model(Base):
        limit = 3

        class Config: ...

        def predict(self): ...

        @staticmethod
        def helper(): ...

        @classmethod
        def make(cls): ...

        def _private(self): ...

    assert methods(Model) == ["helper", "inherited", "make", "predict"]
    assert methods(twice.func_or_class) == ["__call__"]
    assert methods(type("C", (Model,), {"__call__": lambda self: 1}))[0] == "__call__"


def test_application():
    app = Plain.bind(1, a=2)
    assert isinstance(app, Application)
    assert (app.name, app.args, app.kwargs) == ("Plain", (1,), {"a": 2})
    with pytest.raises(AttributeError, match=r"handle = serve\.run"):
        app.predict()
    with pytest.raises(AttributeError, match=r"handle = serve\.run"):
        app.remote(1)


# -- building ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Parts:
    first: object
    rest: list


def handle(app, name):
    return f"handle of {app}/{name}"


def opened(built, name):
    spec = next(spec for spec in built.spec.deployments if spec.name == name)
    return unpack(built.code[spec.revision], {}, handle)


def test_single():
    built = build(twice.bind(), "app", "/x")
    spec = built.spec
    assert (spec.name, spec.route_prefix, spec.ingress) == ("app", "/x", "double")
    (one,) = spec.deployments
    assert (one.name, one.methods, one.keys, one.options.num_replicas) == ("double", ["__call__"], [], 2)
    function, args, kwargs = opened(built, "double")
    assert (function(4), args, kwargs) == (8, (), {})
    assert build(twice.bind(), "app", "/x") == built


def test_applications_become_handles():
    leaf, other = twice.bind(), slow.bind()
    middle = Plain.options(name="middle").bind(leaf)
    root = Plain.bind(middle, [leaf, (other,)], parts=Parts({"k": leaf}, [other]), plain=3)
    built = build(root, "app")
    assert sorted(spec.name for spec in built.spec.deployments) == ["Plain", "double", "middle", "slow"]
    assert built.spec.ingress == "Plain"
    _, args, kwargs = opened(built, "Plain")
    double, slowly = "handle of app/double", "handle of app/slow"
    assert args == ("handle of app/middle", [double, (slowly,)])
    assert kwargs == {"parts": Parts({"k": double}, [slowly]), "plain": 3}
    assert opened(built, "middle")[1] == (double,)


class Pair(NamedTuple):
    first: object
    second: object


class Record(msgspec.Struct):
    part: object


class LikeAttrs:
    """What attrs makes of a class, as far as it matters here."""

    __attrs_attrs__ = (types.SimpleNamespace(name="part"),)

    def __init__(self, part):
        self.part = part


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda app: Pair(1, [app]), lambda pair: pair.second[0]),
        (Record, lambda record: record.part),
        (LikeAttrs, lambda made: made.part),
        (lambda app: types.SimpleNamespace(deep={"k": app}), lambda space: space.deep["k"]),
        (lambda app: {"k": ({1, 2}, frozenset([app]))}, lambda d: next(iter(d["k"][1]))),
    ],
)
def test_applications_in_other_containers(wrap, unwrap):
    built = build(Plain.bind(wrap(twice.bind())), "app")
    assert unwrap(opened(built, "Plain")[1][0]) == "handle of app/double"


def test_the_default_handle(monkeypatch):
    class DeploymentHandle:
        def __init__(self, app, deployment):
            self.names = app, deployment

    monkeypatch.setitem(sys.modules, "dask_serve.handle", types.SimpleNamespace(DeploymentHandle=DeploymentHandle))
    built = build(Plain.bind(twice.bind()), "app")
    _, (found,), _ = unpack(built.code[next(s.revision for s in built.spec.deployments if s.name == "Plain")])
    assert found.names == ("app", "double")


def test_same_application_is_one_deployment():
    leaf = twice.bind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build(Plain.bind(leaf, leaf, [leaf]))
    assert len(built.spec.deployments) == 2


def test_same_name_is_numbered():
    with pytest.warns(UserWarning, match="several deployments called 'double'.*'double_1'"):
        built = build(Plain.bind(twice.bind(), twice.bind(), twice.bind()))
    assert opened(built, "Plain")[1] == tuple(f"handle of default/{n}" for n in ("double", "double_1", "double_2"))


def test_circles_in_arguments():
    items: list = [twice.bind()]
    items.append(items)
    args = opened(build(Plain.bind(items)), "Plain")[1]
    assert args[0][0] == "handle of default/double"
    assert args[0][1] is args[0]


AMBIENT = twice.bind()


@deployment
class MentionsGlobal:
    def __call__(self):
        return AMBIENT


def test_applications_in_code_are_left_behind():
    built = build(MentionsGlobal.bind())
    assert [spec.name for spec in built.spec.deployments] == ["MentionsGlobal"]
    target, _, _ = opened(built, "MentionsGlobal")
    with pytest.raises(ConfigError, match="bind it into the deployment that uses it"):
        target()().remote()


def test_other_spellings():
    @serve.deployment(
        ray_actor_options={"num_cpus": 1.5, "num_gpus": 0.5, "memory": "4 GiB", "resources": {"disk": 1}},
        max_concurrent_queries=7,
        max_queued_requests=-1,
    )
    class Model:
        pass

    options = Model.all_options
    assert (options.threads, options.gpus, options.memory, options.resources) == (2, 0.5, 4 * 2**30, {"disk": 1})
    assert (options.max_ongoing_requests, options.max_queued_requests) == (7, None)
    assert Model.options(num_gpus=2).all_options.gpus == 2


@pytest.mark.parametrize("name", ["warm_up", "check_health", "shutdown"])
def test_hooks_take_no_arguments(name):
    def hook(self, x):
        pass

    with pytest.raises(ConfigError, match=f"{name}\\(\\) is called without arguments .*a required argument: 'x'"):
        serve.deployment(type("Model", (), {name: hook}))
    with pytest.raises(ConfigError, match=f"{name!r} is called .* is no method here"):
        serve.deployment(type("Model", (), {name: 3}))
    for fine in (lambda self, x=1: None, staticmethod(lambda: None), classmethod(lambda cls: None)):
        serve.deployment(type("Model", (), {name: fine}))


def test_revisions():
    def revisions(app, **options):
        return {spec.name: spec.revision for spec in build(app, **options).spec.deployments}

    one = revisions(Plain.bind(twice.bind()))
    assert revisions(Plain.bind(twice.bind())) == one
    assert revisions(Plain.options(num_replicas=3).bind(twice.bind()), route_prefix="/other") == one
    changed = revisions(Plain.bind(twice.options(threads=2).bind()))
    assert (changed["Plain"], changed["double"] == one["double"]) == (one["Plain"], False)
    assert revisions(Plain.bind(slow.bind()))["Plain"] != one["Plain"]


@pytest.mark.parametrize("route", ["", "x", "/x/", "//", "/a{b}", "/a b", "/a?b", 3])
def test_wrong_routes(route):
    with pytest.raises(ConfigError, match="route_prefix"):
        build(twice.bind(), "app", route)


@pytest.mark.parametrize("route", ["/", "/x", "/x/y-z", None])
def test_routes(route):
    assert build(twice.bind(), "app", route).spec.route_prefix == route


def test_wrong_application_name():
    with pytest.raises(ConfigError, match="the name of an application"):
        build(twice.bind(), "")


def test_unpicklable_names_the_deployment():
    with pytest.raises(ConfigError, match=r"^deployment 'Plain' cannot be sent.*bound argument 'gen', a builtins.gen"):
        build(Plain.bind(gen=(x for x in ())))


def test_a_deployment_is_no_handle():
    @deployment
    class Model: ...

    with pytest.raises(AttributeError, match=r"serve.run\(Model.bind\(...\)\)"):
        Model.remote(1)
    assert pickle.loads(cloudpickle.dumps(Model)).name == "Model"


def test_no_class_derives_from_a_deployment():
    @serve.deployment
    class Base:
        pass

    with pytest.raises(ConfigError, match="cannot derive from the deployment 'Base'"):

        class Derived(Base):
            pass
