"""What a plain deployment returns, and what becomes of it over HTTP."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from helpers import embedded_client, http_client
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, StreamingResponse

import dask_serve as serve
from dask_serve.replica.jsonable import to_json


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()


class Struct(msgspec.Struct):
    x: int
    tags: set[str] = set()


@dataclasses.dataclass
class Holder:
    array: Any
    when: dt.datetime


WHEN = dt.datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001
ID = uuid.UUID(int=7)


# -- rendering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, None, "ä", True]}, {"a": [1, 2.5, None, "ä", True]}),
        (Holder(np.arange(2), WHEN), {"array": [0, 1], "when": "2026-01-02T03:04:05"}),
        (Struct(1, {"t"}), {"x": 1, "tags": ["t"]}),
        ([np.float32(0.5), np.int64(3), np.bool_(True), np.str_("s"), Text("t")], [0.5, 3, True, "s", "t"]),
        ({"deep": [{"array": np.eye(2)}]}, {"deep": [{"array": [[1.0, 0.0], [0.0, 1.0]]}]}),
        ([float("nan"), float("inf"), np.float64("nan"), np.array([1.0, np.nan])], [None, None, None, [1.0, None]]),
        ({np.int64(1): 2, np.str_("a"): 3, None: 4, False: 5}, {"1": 2, "a": 3, "null": 4, "false": 5}),
        (np.array(["2026-01-02", "NaT"], dtype="M8[ns]"), ["2026-01-02T00:00:00", None]),
        ([np.datetime64("2026-01-02T03:04:05"), np.timedelta64(90, "s")], ["2026-01-02T03:04:05", "PT90S"]),
        (
            [WHEN, WHEN.date(), WHEN.time(), dt.timedelta(days=1)],
            [str(WHEN).replace(" ", "T"), "2026-01-02", "03:04:05", "P1D"],
        ),
        ([ID, Color.RED, Level.HIGH, decimal.Decimal("1.10")], [str(ID), "red", 3, "1.10"]),
        ([{1}, frozenset([2]), (3,), collections.deque([4])], [[1], [2], [3], [4]]),
        ([range(2), {"k": 1}.keys()], [[0, 1], ["k"]]),
        ([b"\x00\xff", pathlib.PurePosixPath("/a"), 2**70], ["AP8=", "/a", 2**70]),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (None, None),
    ],
)
def test_values_as_json(value, expected):
    assert json.loads(to_json(value)) == expected


def test_pandas_as_json():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {
            "n": [1, 2],
            "f": [0.5, None],
            "t": pd.to_datetime(["2026-01-02", None]),
            "c": pd.Categorical(["x", "y"]),
            "i": pd.array([1, None], dtype="Int64"),
        }
    )
    assert json.loads(to_json(frame)) == [
        {"n": 1, "f": 0.5, "t": "2026-01-02T00:00:00", "c": "x", "i": 1},
        {"n": 2, "f": None, "t": None, "c": "y", "i": None},
    ]
    assert json.loads(to_json({"s": frame["t"], "index": frame.index})) == {
        "s": ["2026-01-02T00:00:00", None],
        "index": [0, 1],
    }
    assert json.loads(to_json([pd.Timestamp("2026-01-02"), pd.NaT, pd.NA, pd.Timedelta("90s")])) == [
        "2026-01-02T00:00:00",
        None,
        None,
        "PT90S",
    ]


def test_attrs_and_pydantic_as_json():
    attrs = pytest.importorskip("attrs")
    pydantic = pytest.importorskip("pydantic")
    made = attrs.make_class("Made", ["x"])
    model = pydantic.create_model("Model", when=(dt.date, ...), inner=(dict[str, float], {}))
    value = {"attrs": made(np.int8(1)), "model": [model(when="2026-01-02")]}
    assert json.loads(to_json(value)) == {"attrs": {"x": 1}, "model": [{"when": "2026-01-02", "inner": {}}]}


@pytest.mark.parametrize("value", [object(), {"a": [1j]}, len, Color, (i for i in "ab"), {(1, 2): 3}])
def test_what_cannot_be_rendered_is_told_with_its_type_and_the_repair(value):
    with pytest.raises(TypeError, match=r"(a \w+|a key that is a tuple) cannot be rendered as JSON; return a str"):
        to_json(value)


# -- over HTTP -----------------------------------------------------------------------------------------------


class Answers:
    def __init__(self, directory: str) -> None:
        self.directory = pathlib.Path(directory)

    async def __call__(self, request: Request) -> Any:
        return await getattr(self, "on_" + request.url.path.rpartition("/")[2])(request)

    async def on_none(self, request):
        return None

    async def on_empty(self, request):
        return ""

    async def on_file(self, request):
        return FileResponse(self.directory / "file.txt", headers={"x-own": "1"})

    async def on_html(self, request):
        return HTMLResponse("<p>", background=BackgroundTask((self.directory / "background").touch))

    async def on_background(self, request):
        return (self.directory / "background").exists()

    async def on_failing_background(self, request):
        def fail():
            raise ValueError("the secret of the background")

        return PlainTextResponse("fine", background=BackgroundTask(fail))

    async def on_late_length(self, request):
        async def generate():
            yield b"ab"
            yield b"cd"

        return StreamingResponse(generate(), headers={"content-length": "4"})

    async def on_raw_path(self, request):
        return {"path": request.url.path, "raw": request.scope["raw_path"].decode()}

    async def on_detail(self, request):
        raise HTTPException(422, {"field": "x"})

    async def on_fastapi(self, request):
        import fastapi

        raise fastapi.HTTPException(409, "as FastAPI says it", {"x-own": "1"})

    async def on_unrenderable(self, request):
        return {"a": object()}

    async def on_error(self, request):
        raise ValueError("the secret of the user code")


class Raw:
    """An ASGI application by itself."""

    async def __call__(self, scope, receive, send):
        message = await receive()
        body = f"{scope['type']} {scope['path']} {message['body'].decode()}".encode()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": body})


def frame(request: Request) -> Any:
    import pandas as pd

    return pd.DataFrame({"a": [1, 2]})


def stray(request: Request) -> Any:
    yield from ("a", "b")


class Mute:
    def predict(self, x: Any) -> Any:
        return x


class Shown(Answers):
    pass


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("files")
    (directory / "file.txt").write_text("of the file" * 1000)
    return directory


@pytest.fixture(scope="module")
def http(directory: pathlib.Path) -> Iterator[httpx.Client]:
    with embedded_client(1, 2) as client:
        url = serve.start(port=0, client=client)
        for name, target, options, args in [
            ("answers", Answers, {}, (str(directory),)),
            ("shown", Shown, {"debug": True}, (str(directory),)),
            ("raw", Raw, {}, ()),
            ("frame", frame, {}, ()),
            ("stray", stray, {}, ()),
            ("mute", Mute, {}, ()),
            ("odd", Odd, {}, ()),
        ]:
            declared = serve.deployment(**options)(target)
            serve.run(declared.bind(*args), name=name, route_prefix=f"/{name}", client=client)
        with http_client(url) as http:
            yield http


def test_none_is_json_and_an_empty_text_is_empty(http):
    answer = http.get("/answers/none")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"null", "application/json")
    assert http.get("/answers/empty").content == b""


def test_a_def_may_return_a_frame_and_be_a_generator(http):
    assert http.get("/stray").text == "ab"
    pytest.importorskip("pandas")
    assert http.get("/frame").json() == [{"a": 1}, {"a": 2}]


def test_files_with_ranges_and_conditions(http, directory):
    answer = http.get("/answers/file")
    assert answer.text == (directory / "file.txt").read_text()
    assert answer.headers["content-length"] == str(len(answer.content))
    part = http.get("/answers/file", headers={"range": "bytes=3-6"})
    assert (part.status_code, part.text) == (206, answer.text[3:7])
    assert http.head("/answers/file").headers["content-length"] == answer.headers["content-length"]


def test_background_tasks_of_a_response(http):
    assert http.get("/answers/html").headers["content-type"] == "text/html; charset=utf-8"
    # It runs behind the answer.
    deadline = time.monotonic() + 10
    while not http.get("/answers/background").json():
        assert time.monotonic() < deadline
    for _ in range(3):
        # It answered before it failed.
        assert http.get("/answers/failing_background").text == "fine"


def test_a_stream_may_have_a_length(http):
    answer = http.get("/answers/late_length")
    assert (answer.content, answer.headers["content-length"]) == (b"abcd", "4")


def test_the_path_as_it_was_sent(http):
    assert http.get("/answers/a%2Fb%20c/raw_path").json() == {
        "path": "/answers/a/b c/raw_path",
        "raw": "/answers/a%2Fb%20c/raw_path",
    }


def test_http_exceptions_with_a_detail(http):
    answer = http.get("/answers/detail")
    assert (answer.status_code, answer.json()) == (422, {"detail": {"field": "x"}})
    pytest.importorskip("fastapi")
    answer = http.get("/answers/fastapi")
    assert (answer.status_code, answer.json()) == (409, {"detail": "as FastAPI says it"})
    assert answer.headers["x-own"] == "1"


@pytest.mark.parametrize("path", ["error", "unrenderable"])
def test_tracebacks_are_shown_with_debug_only(http, path):
    answer = http.get(f"/answers/{path}", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json()["request_id"] == "mine"
    for secret in ("secret", "Traceback", "object"):
        assert secret not in answer.text
    answer = http.get(f"/shown/{path}", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine"
    assert "Traceback" in answer.json()["traceback"]
    if path == "error":
        assert (answer.json()["type"], answer.json()["message"]) == ("ValueError", "the secret of the user code")
    else:
        assert "a object cannot be rendered as JSON" in answer.json()["message"]


def test_a_class_may_be_an_asgi_application(http):
    answer = http.post("/raw/x", content=b"body")
    assert (answer.status_code, answer.text, answer.headers["x-own"]) == (201, "http /raw/x body", "1")


def test_a_class_without_call_answers_404_with_the_repair(http):
    answer = http.get("/mute")
    assert answer.status_code == 404
    assert "__call__" in answer.json()["message"]
    assert "@serve.ingress" in answer.json()["message"]


class Odd:
    """Answers that HTTP has not: it is told in the request's path what."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, pieces, *length = scope["path"].rsplit("/", 1)[1].split("-")
        headers = [(b"content-length", length[0].encode())] if length else []
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        for _ in range(int(pieces)):
            await send({"type": "http.response.body", "body": b"body", "more_body": True})
        await send({"type": "http.response.body", "body": b"" if int(pieces) else b"body"})


@pytest.mark.parametrize("kind", ["204-0", "204-3", "204-0-4", "304-0", "304-3", "304-0-4"])
def test_answers_that_have_no_body_by_their_status(http, kind):
    """What user code sends with them must not be taken for the next answer of the connection."""
    with socket.create_connection((http.base_url.host, http.base_url.port)) as sock:
        get = "GET /odd/{} HTTP/1.1\r\nHost: here\r\n{}\r\n"
        sock.sendall((get.format(kind, "") + get.format("200-0", "Connection: close\r\n")).encode())
        first, second = b"".join(iter(lambda: sock.recv(65536), b"")).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(kind[:3].encode())
    assert first.endswith(b"\r\n\r\n")
    assert b"content-length" not in first
    assert second.startswith(b"200 ")


@pytest.mark.parametrize("kind", ["99-0", "101-0", "999-0", "200-0-many", "200-0-4.0"])
def test_a_status_or_length_that_http_forbids_is_an_error_of_user_code(http, kind):
    answer = http.get(f"/odd/{kind}")
    assert answer.status_code == 500
    assert answer.json()["message"] == "the deployment raised an exception"
