from __future__ import annotations

import gc
import mmap
import os
import random
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
from helpers import wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dask_serve.wire import memory
from dask_serve.wire.memory import allocate, copied, idle_bytes

MB = 1 << 20


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a pool of its own, which no other thread uses."""
    gc.collect()
    monkeypatch.setattr(memory, "_pool", memory._Pool(memory.IDLE_LIMIT))


def array(nbytes: int, value: int = 0) -> np.ndarray:
    made = np.frombuffer(allocate(nbytes), np.uint8)
    made[:] = value
    return made


def address(made: np.ndarray) -> int:
    return made.__array_interface__["data"][0]


@pytest.mark.parametrize("nbytes", [0, 1, memory.POOLED_FROM - 1, memory.POOLED_FROM, 3 * MB + 1, 64_000_000])
def test_memory_is_writable_and_aligned(nbytes: int):
    view = allocate(nbytes)
    assert (view.nbytes, view.format, view.readonly, view.contiguous) == (nbytes, "B", False, True)
    made = np.frombuffer(view, np.uint8)
    assert made.flags.writeable
    assert not nbytes or address(made) % 16 == 0
    made[-1:] = 7


def test_it_is_used_again_when_nobody_refers_to_it():
    first = array(8_000_000)
    at = address(first)
    part = first[1_000_000:].view(np.uint16)[::3]
    del first
    other = array(8_000_000, 1)
    assert address(other) != at
    assert idle_bytes() == 0
    assert not part.any()
    del part
    assert idle_bytes() >= 8_000_000
    again = array(7_900_000, 2)
    assert address(again) == at
    assert idle_bytes() == 0
    assert (other == 1).all()


def test_in_a_cycle():
    loop: list = [array(MB)]
    loop.append(loop)
    del loop
    assert idle_bytes() == 0
    gc.collect()
    assert idle_bytes() == MB


def test_copies():
    for data in (b"small", bytearray(b"\1" * MB), memoryview(np.full(MB, 3, np.uint8))):
        copy = copied(data)
        assert copy == data
        assert not memoryview(copy).readonly


class Arrays(RuleBasedStateMachine):
    """Whatever is made and dropped in whatever order, no array that is left changes."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.kept: list[tuple[int, np.ndarray]] = []

    @rule(nbytes=st.integers(memory.POOLED_FROM, 5 * memory.POOLED_FROM))
    def make(self, nbytes: int) -> None:
        self.number = (self.number + 1) % 256
        self.kept.append((self.number, array(nbytes, self.number)))

    @rule(at=st.integers(0, 50), skip=st.integers(0, 1000))
    def keep_a_view(self, at: int, skip: int) -> None:
        if at < len(self.kept):
            number, made = self.kept[at]
            self.kept[at] = number, made[skip:]

    @rule(at=st.integers(0, 50))
    def drop(self, at: int) -> None:
        if at < len(self.kept):
            del self.kept[at]

    @invariant()
    def intact(self) -> None:
        for number, made in self.kept:
            assert made[0] == number
            assert (made == number).all()


TestArrays = Arrays.TestCase
TestArrays.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


def test_many_threads():
    """They take and give back at once; what one has, no other gets."""
    failures = []

    def work(number: int) -> None:
        rng = random.Random(number)
        kept: list[np.ndarray] = []
        for _ in range(300):
            kept.append(array(rng.choice([200_000, 300_000, 3 * MB]), number))
            if len(kept) > rng.randrange(6):
                made = kept.pop(rng.randrange(len(kept)))
                if not (made == number).all():
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_more_than_the_limit_is_idle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_pool", memory._Pool(10 * MB))
    made = [array(4 * MB) for _ in range(5)]
    made.clear()
    assert idle_bytes() == 8 * MB
    memory.limit_idle(20 * MB)
    assert idle_bytes() == 8 * MB
    memory.limit_idle(5 * MB)
    assert idle_bytes() == 4 * MB
    huge = array(memory.IDLE_LIMIT + 1)
    del huge
    assert idle_bytes() == 4 * MB


def test_what_is_idle_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "IDLE_SECONDS", 0.2)
    process = psutil.Process()
    threads = process.num_threads()
    for _ in range(2):
        made = array(64 * MB, 1)
        held = process.memory_info().rss
        del made
        assert idle_bytes() == 64 * MB
        wait_until(lambda: not idle_bytes())
        wait_until(lambda held=held: process.memory_info().rss < held - 60 * MB)
        wait_until(lambda: process.num_threads() <= threads)


def test_the_longest_idle_go_first():
    made = [array(MB, i) for i in range(3)]
    last = address(made[2])
    del made[0], made[0]
    between = time.monotonic()
    made.clear()
    memory._pool.trim(between)
    assert idle_bytes() == MB
    assert address(array(MB)) == last


@pytest.mark.parametrize("missing", ["MAP_PRIVATE", "MADV_HUGEPAGE"])
def test_systems_without(monkeypatch: pytest.MonkeyPatch, missing: str):
    monkeypatch.delattr(mmap, missing)
    made = array(4 * MB, 1)
    assert made.flags.writeable
    del made
    assert idle_bytes() == (0 if missing == "MAP_PRIVATE" else 4 * MB)


def test_no_more_mappings(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert (array(MB, 1) == 1).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork():
    """A child begins with nothing idle, gives back what it inherited, and its parent's arrays do not change."""
    script = """
        import os, sys, time
        import numpy as np
        from dask_serve.wire import memory

        memory.IDLE_SECONDS = 0.2
        def array(value):
            made = np.frombuffer(memory.allocate(4 << 20), np.uint8)
            made[:] = value
            return made

        kept, idle = array(1), array(2)
        del idle
        assert memory.idle_bytes() == 4 << 20
        child = os.fork()
        assert memory.idle_bytes() == (4 << 20 if child else 0)
        if child == 0:
            kept[:] = 3
            del kept
            assert memory.idle_bytes() == 4 << 20
            deadline = time.monotonic() + 20
            while memory.idle_bytes():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os._exit(42)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert (kept == 1).all()
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_the_end_of_the_interpreter():
    """With blocks in use, idle, and in a cycle that is never collected."""
    script = """
        import gc
        from dask_serve.wire.memory import allocate
        gc.disable()
        kept, idle, cycle = allocate(1 << 20), allocate(1 << 20), [allocate(1 << 20)]
        cycle.append(cycle)
        del idle, cycle
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60, stderr=subprocess.PIPE
    )
    assert done.stderr == b""
