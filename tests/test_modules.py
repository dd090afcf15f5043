"""Own modules that code imports while it runs, classes of them in arguments, and what a changed file does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dask_serve as serve
from dask_serve.shipping.code import open_blob, pack, unpack
from dask_serve.shipping.modules import imports
from dask_serve.shipping.revision import fingerprint

ROOT = Path(__file__).parent.parent

PACKAGE = {
    "parts/__init__.py": "from .core import Model\n",
    "parts/core.py": """
        from . import util
        from .deep import inner
        from .util import Config

        class Model:
            def __init__(self):
                self.config = Config(3)

            def at_the_top(self):
                return util.add(1) + inner.times(2)

            def relative(self):
                from . import lazy
                return lazy.all_of_it(3)

            def name_of_a_module(self):
                from .lazy import all_of_it
                return all_of_it(3)

            def absolute(self):
                import parts.lazy
                return parts.lazy.all_of_it(3)

            def renamed(self):
                import parts.deep.only_here as other
                return other.NAME

            def inside(self):
                def inner():
                    import flat
                    return [flat.x() for _ in "a"][0]
                return inner()

            def same_class(self):
                from .util import Config
                return isinstance(self.config, Config)

            def star(self):
                from parts.deep import inner
                import json, numpy.linalg
                return json.dumps(inner.times(1)), numpy.linalg.__name__

            def plugin(self, name):
                import importlib
                return importlib.import_module(name).x()

            def where(self):
                return __file__

            def take(self, config):
                return isinstance(config, Config), config.n

            def give(self):
                return self.config
    """,
    "parts/util.py": """
        def add(x):
            return x + 1

        class Config:
            def __init__(self, n):
                self.n = n
    """,
    "parts/deep/__init__.py": "",
    "parts/deep/inner.py": "def times(x): return x * 10\n",
    "parts/deep/only_here.py": "NAME = __name__\n",
    "parts/lazy.py": """
        from __future__ import annotations
        import dataclasses
        from dataclasses import InitVar
        from . import circle, util
        from .deep.inner import times
        import flat

        @dataclasses.dataclass
        class Row:
            x: int
            y: InitVar[int] = 0

        def all_of_it(x):
            return util.add(times(Row(x).x)) + flat.x() + circle.back()
    """,
    "parts/circle.py": "from . import lazy\ndef back(): return len(lazy.__name__)\n",
    "flat.py": "def x(): return 100\n",
    "names/plain.py": "from names import other\nVALUE = other.VALUE\n",
    "names/other.py": "VALUE = 7\n",
}


def write(home: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(textwrap.dedent(text))


def run_python(code: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PACK = "from dask_serve.shipping.code import pack; open('blob', 'wb').write(pack({}).blob)"


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write(home, PACKAGE)
    run_python("import parts; " + PACK.format("parts.Model"), home)
    return home / "blob"


OPEN = """
    import sys
    from dask_serve.shipping.code import unpack
    target, args, kwargs = unpack(open({!r}, "rb").read())
    model = target()
"""


def test_workers_need_no_files(blob, tmp_path):
    """Whatever the worker has of that name is another module."""
    write(tmp_path, {"flat.py": "def x(): return -1\n", "parts.py": "raise ImportError('not this one')\n"})
    code = (
        OPEN.format(str(blob))
        + """
    import flat
    names = "at_the_top relative name_of_a_module absolute renamed inside same_class star".split()
    print([getattr(model, name)() for name in names])
    print(flat.x(), [name for name in sys.modules if name.startswith("parts")], model.plugin("flat"))
    """
    )
    first, second = run_python(code, tmp_path).splitlines()
    assert first == "[22, 141, 141, 141, 'parts.deep.only_here', 100, True, ('10', 'numpy.linalg')]"
    # What is imported by a computed name is the worker's.
    assert second == "-1 [] -1"


def test_errors_are_those_of_an_import(blob, tmp_path):
    write(tmp_path, PACKAGE)
    write(tmp_path, {"flat.py": "import no_such_module\n"})
    run_python("import parts; " + PACK.format("parts.Model"), tmp_path)
    code = (
        OPEN.format(str(tmp_path / "blob"))
        + """
    for _ in range(2):
        try:
            model.inside()
        except ModuleNotFoundError as error:
            print(error)
    """
    )
    assert run_python(code, blob.parent.parent) == "No module named 'no_such_module'\nNo module named 'no_such_module'"


def test_nothing_is_run_in_the_session(tmp_path):
    write(
        tmp_path,
        {
            "model.py": """
                class Model:
                    def go(self):
                        import names.plain, heavy.part
                        return names.plain.VALUE
            """,
            "heavy/__init__.py": "open('was-run', 'w')\n",
            "heavy/part.py": "",
            **{name: text for name, text in PACKAGE.items() if name.startswith("names/")},
        },
    )
    run_python("import model; " + PACK.format("model.Model"), tmp_path)
    assert not (tmp_path / "was-run").exists()
    away = tmp_path / "away"
    away.mkdir()
    assert run_python(OPEN.format(str(tmp_path / "blob")) + "    print(model.go())", away) == "7"


def test_scripts(tmp_path):
    write(tmp_path, {"flat.py": "def x(): return 5\n", "script.py": "def f():\n    import flat\n    return flat.x()\n"})
    script = (tmp_path / "script.py").read_text() + PACK.format("f")
    (tmp_path / "script.py").write_text(script)
    run_python("import runpy; runpy.run_path('script.py', run_name='__main__')", tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    assert run_python(OPEN.format(str(tmp_path / "blob")) + "    print(model)", away) == "5"


def test_files_beside_the_module_are_where_the_directory_is(blob, tmp_path):
    home = str(blob.parent)
    target, _, _, _ = open_blob(blob.read_bytes(), moved=[(home, str(tmp_path))])
    assert target().where() == str(tmp_path / "parts" / "core.py")
    target, _, _, _ = open_blob(blob.read_bytes(), moved=[(home + "/par", str(tmp_path))])
    assert target().where() == home + "/parts/core.py"


def test_changes_are_seen_and_places_are_not(tmp_path):
    code = """
        import parts
        from dask_serve.shipping.code import pack
        from dask_serve.shipping.revision import fingerprint
        print(fingerprint(pack(parts.Model).blob))
    """
    write(tmp_path / "one", PACKAGE)
    write(tmp_path / "two", PACKAGE)
    one = run_python(code, tmp_path / "one")
    assert run_python(code, tmp_path / "two") == one
    write(tmp_path / "two", {"parts/circle.py": PACKAGE["parts/circle.py"] + "# changed\n"})
    assert run_python(code, tmp_path / "two") != one


def test_what_imports_nothing_of_its_own_is_as_ever():
    def f():
        import json

        return json

    assert unpack(pack(f).blob)[0].__builtins__["__import__"] is __import__
    assert open_blob(pack(f).blob)[3].names == ()
    assert list(imports(f.__code__, "")) == ["json"]


# -- a session that goes on


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory of a session, with modules in it."""
    write(tmp_path, {name: text for name, text in PACKAGE.items() if not name.startswith("names/")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in {"parts", "flat"}]:
        del sys.modules[name]


def test_arguments_and_results_are_of_the_same_classes(home, client):
    import parts
    from parts.util import Config

    handle = serve.run(serve.deployment(parts.Model).bind(), name="own", route_prefix=None, client=client)
    assert handle.take.remote(Config(5)).result() == (True, 5)
    assert handle.take.remote(config=Config("x" * 100_000)).result()[0]
    assert isinstance(handle.give.remote().result(), Config)
    assert handle.take.remote(handle.give.remote()).result() == (True, 3)
    assert handle.same_class.remote().result()
    assert handle.relative.remote().result() == 141
    # Results leave the session's own classes as they are.
    assert vars(Config)["__init__"].__globals__ is vars(sys.modules["parts.util"])
    # Edited, and deployed again from the same session: nothing of the worker's is in the way.
    write(home, {"flat.py": "def x(): return 200\n"})
    handle = serve.run(serve.deployment(parts.Model).bind(), name="own", route_prefix=None, client=client)
    assert handle.inside.remote().result() == 200
    assert handle.relative.remote().result() == 241
    serve.delete("own", client=client)


def revision_of(target):
    return fingerprint(pack(target).blob)


def test_reloaded_modules(home):
    write(
        home, {"flat.py": "import parts.deep.inner as inner\nclass Model:\n    def go(self): return inner.times(2)\n"}
    )
    import flat
    import parts.deep.inner

    before = revision_of(flat.Model)
    write(home, {"parts/deep/inner.py": "def times(x): return x * 11\n"})
    # What is loaded has not changed.
    assert revision_of(flat.Model) == before
    importlib.reload(parts.deep.inner)
    assert revision_of(flat.Model) != before
    assert unpack(pack(flat.Model).blob)[0]().go() == 22
    write(home, {"parts/deep/inner.py": PACKAGE["parts/deep/inner.py"]})
    importlib.reload(parts.deep.inner)
    importlib.reload(flat)
    assert revision_of(flat.Model) == before


def test_autoreload(home):
    """What notebooks do: `%autoreload 2`, an edited helper, and the same cell again."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    write(
        home,
        {
            "flat.py": """
                import dask_serve as serve
                from parts.deep.inner import times

                @serve.deployment
                class Model:
                    def go(self): return times(2)
            """
        },
    )
    cell = """
from dask_serve.shipping.graph import build
(blob,) = build(flat.Model.bind()).code.values()
open("blob", "wb").write(blob)
"""
    code = OPEN.format(str(home / "blob")) + "    print(model.go())"
    shell.run_cell("%load_ext autoreload\n%autoreload 2\nimport flat").raise_error()
    shell.run_cell(cell).raise_error()
    assert run_python(code, home.parent) == "20"
    write(home, {"parts/deep/inner.py": "def times(x): return x * 111\n"})
    os.utime(home / "parts/deep/inner.py", (2e9, 2e9))
    shell.run_cell(cell).raise_error()
    assert run_python(code, home.parent) == "222"
