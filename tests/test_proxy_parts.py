"""Parts of the proxy that need no connection: the form of errors, how long to wait, who the client is, options."""

from __future__ import annotations

import json

import pytest

from dask_serve.config import HTTPOptions
from dask_serve.exceptions import ConfigError
from dask_serve.options import build_options, parse_options
from dask_serve.proxy.errors import error_answer, request_id_in, wants_text
from dask_serve.proxy.forwarded import TrustedProxies, is_local


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        (b"", False),
        (b"*/*", False),
        (b"text/plain", True),
        (b"text/*;q=0.5", True),
        (b"text/plain, application/json", False),
        (b"text/plain;q=0.2, application/json;q=0.1", True),
        (b"text/plain;q=nonsense", False),
        (b"text/html, */*;q=0.8", False),
        (b"TEXT/PLAIN", True),
    ],
)
def test_who_wants_text(accept, text):
    assert wants_text([(b"accept", accept)]) is text


def test_an_error():
    headers, body = error_answer((503, "BackPressureError", "full"), "id-1", [], 7)
    assert json.loads(body) == {"type": "BackPressureError", "message": "full", "request_id": "id-1"}
    assert dict(headers)[b"retry-after"] == b"7"
    assert dict(headers)[b"x-request-id"] == b"id-1"
    assert b"retry-after" not in dict(error_answer((504, "RequestTimeoutError", "late"), "id-1", [])[0])


def test_request_ids():
    assert request_id_in([(b"x-request-id", b"mine")]) == "mine"
    made = {request_id_in([(b"x-request-id", bad)]) for bad in (b"", b"a b", b"x" * 129, b"\xff")}
    assert len(made) == 4


def scope(client, **headers):
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "client": client, "scheme": "http", "headers": sent}


@pytest.mark.parametrize(
    ("client", "headers", "local"),
    [
        (("127.0.0.1", 5), {}, True),
        (("::1", 5), {}, True),
        (None, {}, True),
        (("192.0.2.1", 5), {}, False),
        (("127.0.0.1", 5), {"x_forwarded_for": "127.0.0.1"}, False),
        (None, {"forwarded": "for=127.0.0.1"}, False),
        (("testclient", 5), {}, False),
    ],
)
def test_who_is_local(client, headers, local):
    assert is_local(scope(client, **headers)) is local


@pytest.mark.parametrize(
    ("client", "said", "found"),
    [
        (("10.0.0.1", 5), "198.51.100.7", "198.51.100.7"),
        (("10.0.0.1", 5), "1.1.1.1, 198.51.100.7, 10.0.0.2", "198.51.100.7"),
        (("10.0.0.1", 5), "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        (("10.0.0.1", 5), "nonsense", "10.0.0.1"),
        (("192.0.2.1", 5), "198.51.100.7", "192.0.2.1"),
        (None, "198.51.100.7", "198.51.100.7"),
    ],
)
def test_who_the_client_is(client, said, found):
    asked = scope(client, x_forwarded_for=said)
    TrustedProxies(["10.0.0.0/8", "unix"]).read(asked)
    assert asked["client"][0] == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"root_path": "models"}, "root_path = 'models'"),
        ({"root_path": "/models/"}, "without a slash"),
        ({"tls_key": "key.pem"}, "belong together"),
        ({"tls_client_ca": "ca.pem"}, "needs tls_certificate"),
        ({"trusted_proxies": ["localhost"]}, "'localhost'"),
        ({"middleware": ["gzip"]}, "module:Class"),
        ({"middleware": [1]}, "option middleware"),
        ({"head_limit": 10}, ">= 1024"),
        ({"max_connections": 0}, "max_connections = 0"),
        ({"max_conections": 1}, "did you mean 'max_connections'"),
        ({"body_timeout_s": 0}, "body_timeout_s = 0"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said.replace("(", "\\(")):
        build_options(HTTPOptions, options, "serve.start")


def test_options_of_a_command_line():
    texts = ["body_limit=5", "tokens_file=/a=b", 'middleware=["a:B"]', "port=null"]
    assert parse_options(texts) == {"body_limit": 5, "tokens_file": "/a=b", "middleware": ["a:B"], "port": None}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_options(["body_limit"])
