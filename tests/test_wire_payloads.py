from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.exceptions import PayloadError, UserCodeError
from dask_serve.wire import payloads
from dask_serve.wire.frames import Frame, FrameReader, encode_frame
from dask_serve.wire.payloads import RemoteTraceback, attached, dump_exception, dumps, load_exception, loads


def over_the_wire(parts: list) -> list:
    out: list = []
    encode_frame(3, 1, b"", parts, out)
    whole = b"".join(out)
    reader = FrameReader()
    (frame,) = [frame for i in range(0, len(whole), 65_536) for frame in reader.feed(whole[i : i + 65_536])]
    assert isinstance(frame, Frame)
    return frame.parts


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children) | st.tuples(children, children),
    max_leaves=20,
)


@given(values)
def test_round_trip(value):
    assert loads(over_the_wire(dumps(value))) == value


@pytest.mark.parametrize("count", [10, 300_000])
def test_arrays_arrive_writable_and_uncopied(count: int):
    sent = {
        "a": np.arange(count),
        "odd": np.ones(count + 1, bool),
        "b": np.asfortranarray(np.ones((3, count))),
        "empty": np.empty(0),
    }
    parts = over_the_wire(dumps(sent))
    received = loads(parts)
    for name, array in sent.items():
        assert np.array_equal(received[name], array)
        assert received[name].flags.writeable
        assert received[name].flags.aligned
        assert any(np.shares_memory(received[name], np.frombuffer(part, np.uint8)) for part in parts) or not array.size
    received["a"][:] = 7
    assert sent["a"][-1] == count - 1


def test_read_only_stays_read_only():
    array = np.arange(10)
    array.flags.writeable = False
    assert not loads(over_the_wire(dumps(array))).flags.writeable


def test_not_contiguous():
    array = np.arange(100).reshape(10, 10)[::2, ::3]
    assert np.array_equal(loads(over_the_wire(dumps(array))), array)


def test_what_is_sent_is_a_snapshot():
    array, data = np.arange(1000), bytearray(b"before")
    parts = dumps((array, data))
    array[:] = 0
    data[:] = b"after!"
    received, text = loads(over_the_wire(parts))
    assert received[999] == 999
    assert text == b"before"


def test_too_many_buffers_go_in_band(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(payloads, "_MAX_PARTS", 3)
    arrays = [np.full(2, i) for i in range(5)]
    parts = dumps(arrays)
    assert len(parts) == 1
    assert all(np.array_equal(a, b) for a, b in zip(loads(parts), arrays, strict=True))
    assert payloads.size_of(parts) == len(parts[0])


def test_lambdas_and_local_classes():
    offset = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value + offset

    function, value = loads(dumps((lambda x: x + offset, Local(1))))
    assert function(2) == 5
    assert value.value == 4


def test_main_travels_by_value():
    """What ``__main__`` defines does not exist in the worker's ``__main__``."""
    script = """
        import sys
        from dask_serve.wire.payloads import dumps

        class Point:
            def __init__(self, x):
                self.x = x

        def double(point):
            return 2 * point.x

        (part,) = dumps((double, Point(21)))
        sys.stdout.buffer.write(part)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=True)
    function, point = loads([done.stdout])
    assert function(point) == 42


@pytest.mark.parametrize("value", [threading.Lock(), {"a": [threading.Lock()]}, (i for i in ()), sys._getframe()])
def test_cannot_be_pickled(value):
    with pytest.raises(PayloadError, match=r"cannot be pickled: TypeError: .*pickle"):
        dumps(value)


def test_reduce_that_raises():
    class Odd:
        def __reduce__(self):
            raise ZeroDivisionError("no way")

    with pytest.raises(PayloadError, match="ZeroDivisionError: no way"):
        dumps(Odd())


class Ref:
    def __init__(self, index: int) -> None:
        self.index = index


REDUCERS = {Ref: lambda ref: (attached, (ref.index,))}


@pytest.mark.parametrize("other", [None, lambda: 1], ids=["pickle", "cloudpickle"])
def test_attachments_at_any_depth(other):
    sent = (Ref(0), {"deep": [Ref(1), (Ref(0),)]}, np.arange(5), other)
    received = loads(over_the_wire(dumps(sent, REDUCERS.get)), ["zero", "one"])
    assert received[:2] == ("zero", {"deep": ["one", ("zero",)]})
    assert np.array_equal(received[2], np.arange(5))


class Nested:
    """Unpickles a payload while it is unpickled itself."""

    def __init__(self, parts: list) -> None:
        self.parts = parts

    def __reduce__(self):
        return loads, (self.parts, ["inner"])


def test_nested_attachments():
    inner = [bytes(part) for part in dumps([Ref(0)], REDUCERS.get)]
    assert loads(dumps([Ref(0), Nested(inner), Ref(0)], REDUCERS.get), ["outer"]) == ["outer", ["inner"], "outer"]


def test_values_are_forgotten():
    parts = dumps(Ref(0), REDUCERS.get)
    assert loads(parts, ["here"]) == "here"
    with pytest.raises(Exception, match=r"index out of range|current"):
        loads(parts)
    with pytest.raises(IndexError):
        loads(dumps([Ref(0), Ref(4)], REDUCERS.get), ["only one"])
    with pytest.raises(Exception, match=r"index out of range|current"):
        loads(parts)


# -- exceptions of user code


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class TakesTwo(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class HoldsALock(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class TurnsInto(Exception):
    def __reduce__(self):
        return str, ("no exception",)


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name}")


def test_exceptions_arrive_as_themselves():
    error = raised(KeyError("missing"))
    error.hint = "look under m"
    text, parts = dump_exception(error)
    first, second = load_exception(text, parts), load_exception(text, parts)
    assert type(first) is KeyError
    assert first.args == ("missing",)
    assert first.hint == "look under m"
    assert first is not second
    assert isinstance(first.__cause__, RemoteTraceback)
    assert "in raised" in str(first.__cause__)
    assert "KeyError: 'missing'" in str(first.__cause__)


def test_classes_made_on_the_fly():
    class Local(ValueError):
        pass

    error = load_exception(*dump_exception(raised(Local("here"))))
    assert type(error).__name__ == "Local"
    assert isinstance(error, ValueError)


def test_frozen_exceptions():
    error = load_exception(*dump_exception(raised(Frozen(3))))
    assert isinstance(error, Frozen)
    assert error.args == (3,)
    assert isinstance(error.__cause__, RemoteTraceback)


@pytest.mark.parametrize("error", [TakesTwo(1, 2), HoldsALock("with a lock"), TurnsInto("something else")])
def test_exceptions_that_do_not_survive(error: Exception):
    """They pickle, and do not unpickle (or to something else): the text is all there is, and it is all there."""
    text, parts = dump_exception(raised(error))
    assert parts == []
    received = load_exception(text, parts)
    assert isinstance(received, UserCodeError)
    message = str(received)
    assert message.splitlines()[0].endswith(f"{type(error).__name__}: {error}")
    assert "Traceback (most recent call last)" in message
    assert "in raised" in message


def test_exception_that_unpickles_only_there():
    """The caller lacks the module: it cannot load what the replica could."""
    text, _ = dump_exception(raised(ValueError("far away")))
    assert "far away" in str(load_exception(text, [b"cnot_a_module\nNope\n."]))
    assert "user code failed" in str(load_exception("", []))
