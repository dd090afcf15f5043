"""What log records say of where they were made, in which form, and from which level on."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from dask_serve.context import BatchContext, ReplicaContext, RequestContext, replica_context, request_context
from dask_serve.levels import Levels, loggers_of
from dask_serve.logs import JSONFormatter, TextFormatter
from dask_serve.printed import BEGUN, Printed
from dask_serve.records import ACCESS, IDS, MOST, Records


@pytest.fixture
def in_replica():
    """Puts the present code into a replica of a deployment."""
    tokens = []

    def enter(deployment: str = "Model", request: RequestContext | None = None) -> None:
        replica = ReplicaContext("shop", deployment, f"shop/{deployment}/1", "tcp://w:1", None)
        tokens.append((replica_context.set(replica), request_context.set(request)))

    yield enter
    for replica, request in reversed(tokens):
        replica_context.reset(replica)
        request_context.reset(request)


def record_of(text: str, *args: object) -> logging.LogRecord:
    return logging.getLogger("test_logs").makeRecord("test_logs", logging.WARNING, "", 0, text, args, None)


def test_every_record_says_where_it_was_made(kept, in_replica):
    assert record_of("outside").serve_replica == ""
    in_replica(request=RequestContext("r-1"))
    record = record_of("inside")
    place = record.serve_application, record.serve_deployment, record.serve_replica, record.serve_request_id
    assert place == ("shop", "Model", "shop/Model/1", "r-1")


def test_code_may_have_such_fields_of_its_own(kept, in_replica):
    in_replica(request=RequestContext("r-1"))
    own = {"request_id": "mine", "application": "mine", "deployment": "mine", "replica": "mine"}
    logging.getLogger("test_logs").warning("well", extra=own)
    assert [record["request"] for record in kept.since(0)] == ["r-1"]


def test_what_is_printed(in_replica):
    kept, out = Records(), io.StringIO()
    printed = Printed(out, kept)
    print("outside", file=printed)
    in_replica(request=RequestContext("r-1"))
    print("one", 2, sep=", ", file=printed)
    print("begun", end=" ", file=printed)
    print("and ended\nanother", file=printed)
    told = kept.since(0)
    assert [record["message"] for record in told] == ["one, 2", "begun and ended", "another"]
    assert {(record["replica"], record["request"], record["logger"]) for record in told} == {
        ("shop/Model/1", "r-1", "print")
    }
    assert out.getvalue() == "outside\none, 2\nbegun and ended\nanother\n"
    for number in range(BEGUN + 10):
        in_replica(request=RequestContext(str(number)))
        print("never ended", end="", file=printed)
    assert len(printed._begun) == BEGUN


def test_a_batch_names_its_requests(kept, in_replica):
    in_replica(request=BatchContext([RequestContext("a"), RequestContext("b")]))
    assert record_of("two").serve_request_id == "a,b"
    in_replica(request=BatchContext([RequestContext(str(n)) for n in range(IDS + 3)]))
    assert record_of("many").serve_request_id == "0,1,2,3,4,5,6,7,+3"


def test_forms_of_a_line(kept, in_replica):
    assert json.loads(JSONFormatter().format(record_of("a\n%s", "b"))).keys() == {"time", "level", "logger", "message"}
    in_replica(request=RequestContext("r-1"))
    told = json.loads(JSONFormatter().format(record_of("a\n%s", "b")))
    assert (told["message"], told["level"], told["logger"]) == ("a\nb", "WARNING", "test_logs")
    assert (told["application"], told["deployment"], told["request_id"]) == ("shop", "Model", "r-1")
    assert TextFormatter().format(record_of("text")).endswith(" - test_logs - WARNING - text [shop/Model/1 r-1]")
    try:
        raise ValueError("wrong")
    except ValueError:
        failed = record_of("failed")
        failed.exc_info = sys.exc_info()
    assert "ValueError: wrong" in json.loads(JSONFormatter().format(failed))["exception"]
    assert TextFormatter().format(failed).splitlines()[0].endswith("failed [shop/Model/1 r-1]")


def test_the_access_log_pushes_nothing_out():
    kept = Records()
    kept.add({"logger": "x", "message": "important"})
    for number in range(MOST + 5):
        kept.add({"logger": ACCESS, "message": str(number)})
    kept.add({"logger": "x", "message": "last"})
    found = kept.since(0)
    assert found[0]["message"] == "important"
    assert found[-1]["message"] == "last"
    assert [record["number"] for record in found] == sorted(record["number"] for record in found)
    assert len(found) == MOST + 2


# -- levels ------------------------------------------------------------------------------------------------------------


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
def heard():
    handler = Heard()
    logging.getLogger("shop_code").addHandler(handler)
    yield handler
    logging.getLogger("shop_code").removeHandler(handler)


def test_the_loggers_of_a_deployment():
    class Model:
        pass

    Model.__module__ = "shop_code.models.text"
    assert loggers_of(Model)[0] == "shop_code"
    assert "dask_serve.replica" in loggers_of(Model)
    assert "" not in loggers_of(object())


def test_a_level_is_that_of_a_deployment(heard, in_replica):
    levels = Levels()
    outer, inner = logging.getLogger("shop_code"), logging.getLogger("shop_code.models")

    def say() -> list[str]:
        inner.debug("debug")
        inner.warning("warning")
        outer.info("info")
        return heard.take()

    assert say() == ["warning"]
    levels.set("shop/Model/1", ("shop", "Model"), "DEBUG", ["shop_code"])
    levels.set("shop/Quiet/1", ("shop", "Quiet"), "ERROR", ["shop_code"])
    # Code of none, of a deployment that wants nothing, of both others.
    assert say() == ["warning"]
    in_replica("Other")
    assert say() == ["warning"]
    in_replica("Model")
    assert say() == ["debug", "warning", "info"]
    in_replica("Quiet")
    assert say() == []
    levels.set("shop/Quiet/1", ("shop", "Quiet"), "INFO", ["shop_code"])
    assert say() == ["warning", "info"]
    levels.set("shop/Quiet/1", ("shop", "Quiet"), None, ())
    levels.set("shop/Model/1", ("shop", "Model"), None, ())
    assert say() == ["warning"]
    assert (outer.level, outer.filters, inner.filters) == (logging.NOTSET, [], [])


def test_loggers_keep_their_own_level(heard, in_replica):
    levels = Levels()
    outer = logging.getLogger("shop_code")
    outer.setLevel(logging.ERROR)
    try:
        levels.set("shop/Model/1", ("shop", "Model"), "INFO", ["shop_code"])
        outer.warning("of nobody")
        in_replica("Model")
        outer.info("of the model")
        assert heard.take() == ["of the model"]
        levels.set("shop/Model/1", ("shop", "Model"), None, ())
        assert outer.level == logging.ERROR
    finally:
        outer.setLevel(logging.NOTSET)
