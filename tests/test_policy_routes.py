from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_serve.exceptions import ConfigError
from dask_serve.policy.routes import Routes, check_free, check_prefix
from dask_serve.routing.table import RouteEntry

ROUTES = Routes(RouteEntry(prefix, prefix + "!") for prefix in ["/", "/api", "/api/v2", "/apis"])


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("/", "/"),
        ("/x", "/"),
        ("", "/"),
        ("/api", "/api"),
        ("/api/", "/api"),
        ("/api/x/y", "/api"),
        ("/apix", "/"),
        ("/api/v2", "/api/v2"),
        ("/api/v2/x", "/api/v2"),
        ("/api/v22", "/api"),
        ("/apis/1", "/apis"),
    ],
)
def test_longest_prefix_of_whole_segments(path, prefix):
    assert ROUTES.match(path).prefix == prefix


def test_no_route():
    assert Routes().match("/") is None
    assert Routes([RouteEntry("/a", "a")]).match("/b") is None
    assert Routes([RouteEntry("/a", "a")]).match("/") is None


segments = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=4)


@given(st.lists(segments, max_size=6), segments)
def test_same_as_comparing_segments(prefixes, path):
    routes = Routes(RouteEntry("/" + "/".join(prefix), "") for prefix in prefixes)
    fitting = [prefix for prefix in prefixes if path[: len(prefix)] == prefix]
    found = routes.match("/" + "/".join(path))
    if fitting:
        assert found.prefix == "/" + "/".join(max(fitting, key=len))
    else:
        assert found is None


@pytest.mark.parametrize("prefix", ["/", "/a", "/a/b", "/a-b_c.d", "/-x"])
def test_good_prefixes(prefix):
    check_prefix(prefix)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "must start with '/'"),
        ("api", "as in '/api'"),
        ("/api/", "use '/api'"),
        ("//", "use '/'"),
        ("/a//b", "empty segment"),
        ("/a b", "spaces"),
        ("/a?b", "spaces or any of"),
        ("/{id}", "spaces or any of"),
        ("/-", "proxies' own routes"),
        ("/-/healthz", "proxies' own routes"),
    ],
)
def test_bad_prefixes(prefix, message):
    with pytest.raises(ConfigError, match="route_prefix=") as error:
        check_prefix(prefix)
    assert message in str(error.value)


def test_two_applications_on_one_route():
    taken = {"one": "/", "two": None, "three": "/x"}
    check_free("one", "/", taken)
    check_free("four", "/y", taken)
    with pytest.raises(ConfigError, match="'three' and 'four' cannot both have route_prefix='/x'"):
        check_free("four", "/x", taken)
