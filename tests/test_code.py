"""Shipping code by value, what is said when it cannot be, and revisions."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from distributed import Client, Future
from distributed.utils_test import gen_cluster

from dask_serve.config import DeploymentOptions
from dask_serve.exceptions import ConfigError
from dask_serve.shipping.code import own_modules, pack, resolved_key, unpack
from dask_serve.shipping.revision import fingerprint, revision

ROOT = Path(__file__).parent.parent
DEFAULTS = DeploymentOptions()


def run_python(code: str, cwd: Path, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def define(source: str, filename: str = "<cell>") -> types.SimpleNamespace:
    namespace = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), filename, "exec"), namespace)
    return types.SimpleNamespace(**namespace)


# -- pack and unpack ---------------------------------------------------------------------------------------------------


def test_round_trip():
    class Model:
        def __init__(self, factor, offset=0):
            self.factor, self.offset = factor, offset

        def __call__(self, x):
            return self.factor * x + self.offset

    packed = pack(Model, (3,), {"offset": 1})
    target, args, kwargs = unpack(packed.blob)
    assert target(*args, **kwargs)(2) == 7
    assert packed.keys == []
    assert packed.nbytes == len(packed.blob)


def test_writable_arrays():
    _, (array,), _ = unpack(pack(dict, (np.arange(5),)).blob)
    array += 1
    assert array.tolist() == [1, 2, 3, 4, 5]


def test_own_modules_are_this_test_and_no_libraries():
    names = {module.__name__ for module in own_modules()}
    assert __name__ in names or f"tests.{__name__}" in names
    assert not {name.partition(".")[0] for name in names} & {"dask_serve", "distributed", "dask", "numpy", "os", "re"}


def test_registration_is_undone():
    mine = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(mine)
    try:
        pack(len)
        assert cloudpickle.list_registry_pickle_by_value() == {mine.__name__}
    finally:
        cloudpickle.unregister_pickle_by_value(mine)
    with pytest.raises(ConfigError):
        pack(len, (threading.Lock(),))
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_workers_need_no_files(tmp_path):
    """Modules that import each other, a package, and names used through a module all travel."""
    home, away = tmp_path / "home", tmp_path / "away"
    (home / "parts").mkdir(parents=True)
    away.mkdir()
    (home / "parts" / "__init__.py").write_text("from . import left, right\n")
    (home / "parts" / "left.py").write_text("from . import right\nNAME = 'left'\ndef f(x): return right.g(x) + 1\n")
    (home / "parts" / "right.py").write_text("from . import left\ndef g(x): return [left.NAME, x][1] * 2\n")
    (home / "tools.py").write_text("import parts\nclass Base:\n    def go(self, x): return parts.left.f(x)\n")
    (home / "model.py").write_text("import tools\nclass Model(tools.Base):\n    pass\n")
    run_python(
        "import model; from dask_serve.shipping.code import pack; open('blob', 'wb').write(pack(model.Model).blob)",
        home,
    )
    code = """
        import sys
        from dask_serve.shipping.code import unpack
        target, args, kwargs = unpack(open(sys.argv[1] if len(sys.argv) > 1 else "../home/blob", "rb").read())
        print(target().go(5), [name for name in ("model", "tools", "parts") if name in sys.modules])
    """
    assert run_python(code, away) == "11 []"


def test_threads():
    class Model:
        pass

    failures = []

    def work():
        try:
            for _ in range(5):
                pack(Model, (1,))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert cloudpickle.list_registry_pickle_by_value() == set()


# -- futures -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Box:
    content: object


@gen_cluster(client=True)
async def test_futures(c: Client, s, a, b):
    x, y = await c.scatter(["x-value", "y-value"])
    assert isinstance(x, Future)
    packed = pack(dict, ([x, {"deep": Box(y)}],), {"again": x})
    assert sorted(packed.keys) == sorted([x.key, y.key])
    assert b"x-value" not in packed.blob
    _, ((first, second),), kwargs = unpack(packed.blob, {x.key: "X", y.key: "Y"})
    assert (first, second["deep"].content, kwargs) == ("X", "Y", {"again": "X"})
    with pytest.raises(LookupError, match="was not fetched"):
        unpack(packed.blob, {x.key: "X"})
    with pytest.raises(LookupError):
        resolved_key(x.key)
    # The same key is the same argument.
    assert fingerprint(pack(dict, (x,)).blob) == fingerprint(pack(dict, (Future(x.key, c),)).blob)
    assert fingerprint(pack(dict, (x,)).blob) != fingerprint(pack(dict, (y,)).blob)


@gen_cluster(client=True)
async def test_parts_of_collections_are_refused(c: Client, s, a, b):
    future = Future(("x", 0), c)
    with pytest.raises(ConfigError, match=r"client\.compute"):
        pack(dict, (future,))


# -- what cannot be pickled --------------------------------------------------------------------------------------------


class WithLock:
    limit = 3
    guard = threading.Lock()


def uses_global():
    def inner():
        return GUARD

    return inner()


GUARD = threading.Lock()


def closure():
    guard = threading.Lock()

    class Model:
        def __call__(self):
            return guard

    return Model


class Holder:
    def __init__(self):
        self.inner = types.SimpleNamespace(conn={"main": threading.Lock()})


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (WithLock, (), {}, "class WithLock, attribute 'guard', a _thread.lock"),
        (uses_global, (), {}, "function uses_global, global variable 'GUARD', a _thread.lock"),
        (closure(), (), {}, "attribute '__call__', closure variable 'guard', a _thread.lock"),
        (Box, (threading.Lock(),), {}, r"bound argument 0 \('content'\), a _thread.lock"),
        (Box, (), {"content": [1, threading.Lock()]}, "bound argument 'content', item 1, a _thread.lock"),
        (Box, (Holder(),), {}, "attribute 'inner', attribute 'conn', item 'main', a _thread.lock"),
    ],
)
def test_culprits_are_named(target, args, kwargs, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        pack(target, args, kwargs, where="deployment 'd'")
    assert str(caught.value).startswith("deployment 'd' cannot be sent to the workers: ")
    assert "Create it in `__init__`" in str(caught.value)


def test_large_arguments_warn():
    with pytest.warns(UserWarning, match=r"d: bound arguments of 11.44 MiB .*'content'.*client.scatter") as caught:
        pack(Box, (bytes(12_000_000),), where="d")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(Box, (bytes(9_000_000),))


# -- revisions ---------------------------------------------------------------------------------------------------------

SOURCE = '''
import enum, abc, json
from typing import Generic, TypeVar

T = TypeVar("T")

class Color(enum.Enum):
    RED = 1

class Base(abc.ABC, Generic[T]):
    names = {"one", "two", "three", "four"}

    def base(self):
        return super().__repr__()

class Model(Base):
    """A model."""

    known = frozenset(["a", "b", "c"])

    def __init__(self, weights):
        self.weights = weights

    @property
    def color(self):
        return Color.RED

    @staticmethod
    def parse(text):
        return json.loads(text)

    async def __call__(self, x: int) -> float:
        return helper(x, lambda y: y + CONSTANT) if x in {"p", "q", "r"} else None

CONSTANT = 3

def helper(x, function):
    return function(x) * 1.5
'''

ARGUMENTS = ([1, 2.5, None, {"k": (True, b"bytes")}, {"s", "t", "u"}, np.arange(3.0)],)


def of(source: str, filename: str = "<cell>") -> str:
    return fingerprint(pack(define(source, filename).Model, ARGUMENTS).blob)


def test_redefinition_is_the_same():
    assert of(SOURCE) == of(SOURCE, "<another-cell>") == of("\n\n# moved\n" + SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CONSTANT = 3", "CONSTANT = 4"),
        ("* 1.5", "* 1.25"),
        ('"three"', '"five"'),
        ("RED = 1", "RED = 2"),
        ('"r"}', '"z"}'),
        ("x: int", "x: str"),
        ("super().__repr__()", "super().__str__()"),
        ("self.weights = weights", "self.scale = weights"),
        ("json.loads", "json.dumps"),
    ],
)
def test_changes_are_seen(old, new):
    assert old in SOURCE
    assert of(SOURCE) != of(SOURCE.replace(old, new))


def test_arguments_count():
    one, same, other = (fingerprint(pack(dict, (value,)).blob) for value in ({"a": [1]}, {"a": [1]}, {"a": [2]}))
    assert one == same != other
    assert len({fingerprint(pack(dict, (value,)).blob) for value in (1, True, 1.0, "1", b"1", (1,), [1], None)}) == 8
    shared = [1]
    assert fingerprint(pack(dict, ([shared, shared],)).blob) != fingerprint(pack(dict, ([[1], [1]],)).blob)


def test_circles():
    circle: list = []
    circle.append(circle)
    assert fingerprint(pack(dict, (circle,)).blob) == fingerprint(pack(dict, (circle,)).blob)


def test_deep_nesting():
    deep: list = []
    for _ in range(250):
        deep = [deep]
    assert len(fingerprint(pack(dict, (deep,)).blob)) == 32


def test_nothing_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    fingerprint(pack(dict, (Trap(),)).blob)
    assert not (tmp_path / "sprung").exists()


def test_options_and_version():
    packed, other = pack(dict, (1,)), pack(dict, (2,))
    base = revision(packed, DEFAULTS)
    assert revision(packed, DeploymentOptions(num_replicas=5, user_config={"a": 1})) == base
    assert revision(packed, DeploymentOptions(threads=2)) != base
    assert revision(packed, DeploymentOptions(resources={"GPU": 1})) != base
    v1 = DeploymentOptions(version="1")
    assert revision(packed, v1, "app/d") == revision(other, v1, "app/d") != base
    assert revision(packed, v1, "app/d") != revision(packed, v1, "app/e")
    assert revision(packed, v1, "app/d") != revision(packed, DeploymentOptions(version="2"), "app/d")


REVISE = """
    import model
    from dask_serve.shipping.code import pack
    from dask_serve.shipping.revision import fingerprint
    print(fingerprint(pack(model.Model, ({"x", "y", "z"},)).blob))
"""


def test_sessions_agree_and_helpers_count(tmp_path):
    source = SOURCE.replace("return json.loads(text)", "return tool.f(text)")
    (tmp_path / "model.py").write_text("import tool\n" + source)
    (tmp_path / "tool.py").write_text("def f(x): return x + 1\n")
    first = run_python(REVISE, tmp_path, PYTHONHASHSEED="1")
    # The second time modules come from their .pyc files, and other strings are interned.
    second = run_python(
        "import json, xml.dom.minidom, concurrent.futures\n" + textwrap.dedent(REVISE), tmp_path, PYTHONHASHSEED="2"
    )
    assert first == second
    (tmp_path / "tool.py").write_text("def f(x): return x + 2\n\n")
    assert run_python(REVISE, tmp_path, PYTHONHASHSEED="1") != first
