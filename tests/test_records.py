"""The last log records of a process: what is kept, how much of it, and for whom."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

from dask_serve.context import ReplicaContext, replica_context
from dask_serve.records import LONGEST, MOST, MOST_BYTES, Records, keep_records, told_since


def messages(kept: Records) -> list[str]:
    return [record["message"] for record in kept.since(0)]


def test_memory_is_bounded():
    kept = Records()
    for number in range(MOST + 10):
        kept.add({"message": str(number)})
    assert len(kept.since(0)) == MOST
    assert [record["message"] for record in kept.since(MOST + 8)] == [str(MOST + 8), str(MOST + 9)]
    for _ in range(MOST):
        kept.add({"message": "x" * LONGEST})
    assert sum(len(record["message"]) for record in kept.since(0)) <= MOST_BYTES


def test_loggers_are_left_as_they_are(kept):
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    assert keep_records() is kept
    assert (root.handlers, root.level) == (handlers, level)
    silent = logging.getLogger("test_records.silent")
    silent.propagate = False
    silent.setLevel(logging.INFO)
    silent.info("one %s", "two")
    silent.debug("not enabled")
    assert messages(kept) == ["one two"]


def test_records_know_their_replica(kept):
    log = logging.getLogger("test_records")
    log.warning("of the process")
    token = replica_context.set(ReplicaContext("shop", "Model", "shop/Model/1", "tcp://w:1", None))
    log.warning("of the replica")
    replica_context.reset(token)
    first, second = kept.since(0)
    assert "replica" not in first
    assert (second["application"], second["deployment"], second["replica"]) == ("shop", "Model", "shop/Model/1")


def test_exceptions_are_text(kept):
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("test_records").exception("it failed")
    (text,) = messages(kept)
    assert text.startswith("it failed\nTraceback")
    assert text.endswith("ValueError: wrong")


def test_a_record_that_cannot_be_formatted_harms_nobody(kept):
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    log = logging.getLogger("test_records")
    record = log.makeRecord("test_records", logging.WARNING, "", 0, "%s", (Broken(),), None)
    assert record.name == "test_records"
    log.warning("well")
    assert messages(kept) == ["well"]


def test_what_the_cluster_says_of_itself_is_left_out(kept):
    log = logging.getLogger("distributed.of_tests")
    log.setLevel(logging.INFO)
    log.info("a worker came")
    log.warning("a worker is stuck")
    assert messages(kept) == ["a worker is stuck"]


def test_readers_get_what_is_new(kept):
    log = logging.getLogger("test_records")
    log.warning("one")
    first = told_since({})
    log.warning("two")
    second = told_since({first["id"]: first["records"][-1]["number"]})
    assert [record["message"] for record in second["records"]] == ["two"]
    assert len(told_since({"of another process": 7})["records"]) == 2


def test_threads_lose_nothing(kept):
    log = logging.getLogger("test_records")

    def write() -> None:
        for number in range(100):
            log.warning("%d", number)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record["number"] for record in kept.since(0)] == list(range(1, 401))


def test_a_process_keeps_none_unless_told_to():
    code = "from dask_serve.records import told_since, records; assert told_since({}) == {} and records() is None"
    subprocess.run([sys.executable, "-c", code], check=True)
