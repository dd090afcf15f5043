"""Which headers are a trace."""

from __future__ import annotations

import pytest

from dask_serve.policy.tracing import MAX_STATE, read_trace

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "parent",
    [PARENT, b" %s\t" % PARENT, PARENT[:-2] + b"00", b"01" + PARENT[2:], b"cc" + PARENT[2:] + b"-what-comes-later"],
)
def test_traces(parent):
    assert read_trace([parent], []) == (parent.decode().strip(), "")


@pytest.mark.parametrize(
    "parents",
    [
        [],
        [PARENT, PARENT],
        [b""],
        [PARENT.upper()],
        [b"ff" + PARENT[2:]],
        [PARENT + b"-more"],
        [PARENT + b"0"],
        [PARENT[:-1]],
        [PARENT.replace(b"0af7651916cd43dd8448eb211c80319c", b"0" * 32)],
        [PARENT.replace(b"b7ad6b7169203331", b"0" * 16)],
        [b"\xff" + PARENT[1:]],
    ],
)
def test_what_is_no_trace(parents):
    assert read_trace(parents, [b"a=1"]) is None


def test_states():
    assert read_trace([PARENT], [b"a=1,b=2", b" c=3 ", b""]) == (PARENT.decode(), "a=1,b=2,c=3")
    assert read_trace([PARENT], [b"a" * MAX_STATE]) == (PARENT.decode(), "a" * MAX_STATE)
    assert read_trace([PARENT], [b"a" * (MAX_STATE + 1)]) == (PARENT.decode(), "")
    assert read_trace([PARENT], [b"a=\xff"]) == (PARENT.decode(), "")
