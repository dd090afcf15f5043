from __future__ import annotations

import contextlib
import itertools
import struct

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dask_serve.wire import frames
from dask_serve.wire.frames import MAX_BODY, Frame, FrameError, FrameReader, encode_frame

HEAD = struct.Struct("<QIIHB")


def encoded(*sent: Frame) -> bytes:
    out: list = []
    for frame in sent:
        before = len(out)
        size = encode_frame(frame.kind, frame.request, frame.header, frame.parts, out)
        assert size == sum(map(len, out[before:]))
    return b"".join(out)


def plain(frame: Frame) -> tuple:
    return frame.kind, frame.request, bytes(frame.header), [bytes(part) for part in frame.parts]


def read(reader: FrameReader, pieces: list[bytes]) -> list[Frame]:
    return [frame for piece in pieces for frame in reader.feed(piece)]


def cut(data: bytes, bounds: list[int]) -> list[bytes]:
    edges = [0, *sorted(bounds), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


small_frames = st.builds(
    Frame,
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=40),
    st.lists(st.binary(max_size=60), max_size=5),
)


@given(st.lists(small_frames, min_size=1, max_size=4))
def test_cut_at_every_byte(sent: list[Frame]):
    data = encoded(*sent)
    expected = [plain(frame) for frame in sent]
    for at in range(len(data) + 1):
        assert [plain(frame) for frame in read(FrameReader(), [data[:at], data[at:]])] == expected
    one_by_one = [data[i : i + 1] for i in range(len(data))]
    assert [plain(frame) for frame in read(FrameReader(), one_by_one)] == expected


big_parts = st.lists(
    st.one_of(
        st.integers(0, 100),
        st.integers(frames._LARGE - 60, frames._LARGE + 60),
        st.integers(2 * frames._LARGE, 3 * frames._LARGE),
    ).map(lambda size: bytes(i % 251 for i in range(size))),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.lists(st.builds(Frame, st.just(3), st.just(7), st.binary(max_size=30), big_parts), max_size=3), st.data())
def test_large_cut_anywhere(sent: list[Frame], data):
    """Also in the head, in the part lengths, and with the next frame behind the end of a large one."""
    whole = encoded(*sent)
    bounds = data.draw(st.lists(st.integers(0, len(whole)), max_size=8))
    received = read(FrameReader(), cut(whole, bounds))
    assert [plain(frame) for frame in received] == [plain(frame) for frame in sent]


@pytest.mark.parametrize("offset", range(-30, 31))
def test_every_cut_around_the_head_of_a_large_frame(offset: int):
    sent = [Frame(1, 1, b"h", []), Frame(3, 2, b"header", [b"a" * 70_000, b"", b"b" * 9]), Frame(2, 3, b"", [b"x"])]
    whole = encoded(*sent)
    at = len(encoded(sent[0])) + HEAD.size + offset
    end = len(whole) - len(encoded(sent[2])) + offset
    expected = [plain(frame) for frame in sent]
    assert [plain(frame) for frame in read(FrameReader(), cut(whole, [max(at, 0), end]))] == expected


@pytest.mark.parametrize("size", [10, frames._LARGE * 2])
@pytest.mark.parametrize("pieces", [1, 3])
def test_parts_behind_the_first_are_writable(size: int, pieces: int):
    whole = encoded(Frame(3, 1, b"h", [b"pickle", b"\1" * size, b"\2" * size]))
    step = len(whole) // pieces + 1
    (frame,) = read(FrameReader(), [whole[i : i + step] for i in range(0, len(whole), step)])
    for part in frame.parts[1:]:
        array = np.frombuffer(part, np.uint8)
        array += 1
    assert bytes(frame.parts[1]) == b"\2" * size
    assert bytes(frame.parts[2]) == b"\3" * size


@pytest.mark.parametrize("header_size", range(20))
def test_arrays_in_large_frames_are_aligned(header_size: int):
    sent = [np.arange(10_000.0), np.ones(3, bool), np.arange(10.0), np.arange(3, dtype="i1"), np.ones(1)]
    parts = [b"pickle of any length", *(memoryview(array).cast("B") for array in sent)]
    whole = encoded(Frame(3, 1, b"h" * header_size, parts))
    (frame,) = read(FrameReader(), [whole[:50], whole[50:]])
    assert bytes(frame.parts[0]) == parts[0]
    for array, part in zip(sent, frame.parts[1:], strict=True):
        received = np.frombuffer(part, array.dtype)
        assert received.flags.aligned
        assert np.array_equal(received, array)


@given(st.lists(st.binary(max_size=300), max_size=6))
@example([HEAD.pack(2**64 - 1, 0, 0, 0, 0)])
@example([HEAD.pack(10, 0, 2**32 - 1, 65535, 0)])
@example([HEAD.pack(100, 0, 0, 3, 0) + b"\xff" * 100])
@example([b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_garbage_from_a_stranger(pieces: list[bytes]):
    reader = FrameReader(4096)
    try:
        for frame in read(reader, pieces):
            assert len(frame.header) + sum(map(len, frame.parts)) <= 4096
    except FrameError:
        pass


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_garbage_behind_the_handshake(first: bytes, second: bytes):
    with contextlib.suppress(FrameError):
        read(FrameReader(), [encoded(Frame(1, 1, b"", [])), first, second])


@given(small_frames, st.data())
def test_a_broken_byte_breaks_nothing_but_its_connection(frame: Frame, data):
    whole = bytearray(encoded(frame, frame))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        for received in read(FrameReader(1 << 20), [bytes(whole)]):
            assert len(received.parts) <= 65535
    except FrameError:
        pass


@pytest.mark.parametrize("header_size", [0, 3, 5, 12, 13])
def test_without_parts_the_header_is_the_body(header_size: int):
    """A header that claims more than the body would reach into the next frame."""
    data = HEAD.pack(4, 1, header_size, 0, 9) + b"abcd" + encoded(Frame(1, 1, b"next frame", []))
    with pytest.raises(FrameError, match="kind 9"):
        read(FrameReader(), [data])


def test_limit():
    whole = encoded(Frame(3, 1, b"h", [b"x" * 5000]))
    with pytest.raises(FrameError, match="kind 3 claims a body of 5001 bytes"):
        read(FrameReader(4096), [whole[: HEAD.size]])
    assert len(read(FrameReader(5001), [whole])) == 1
    with pytest.raises(FrameError):
        read(FrameReader(), [HEAD.pack(MAX_BODY + 1, 1, 0, 0, 3)])


def test_limit_raised_by_the_frame_before():
    """The proof, and in the same read a call larger than a stranger may send."""
    whole = encoded(Frame(2, 0, b"proof", []), Frame(3, 1, b"h", [b"x" * 100_000]))
    for at in (len(whole), HEAD.size + 5, HEAD.size + 20, HEAD.size + 5 + HEAD.size + 10):
        reader = FrameReader(4096)
        received = []
        for piece in (whole[:at], whole[at:]):
            for frame in reader.feed(piece):
                received.append(frame.kind)
                reader.limit = MAX_BODY
        assert received == [2, 3]


def test_claims_allocate_nothing():
    process = psutil.Process()
    before = process.memory_info().rss
    reader = FrameReader()
    list(reader.feed(HEAD.pack(1 << 30, 1, 0, 1, 3) + b"x" * 1000))
    assert reader.large.missing == (1 << 30) - 1000
    assert process.memory_info().rss - before < 64 << 20


def test_a_claim_beyond_all_memory(monkeypatch: pytest.MonkeyPatch):
    def refuse(nbytes: int) -> memoryview:
        raise MemoryError

    monkeypatch.setattr(frames, "allocate", refuse)
    with pytest.raises(FrameError, match=f"kind 3 claims a body of {MAX_BODY} bytes, for which there is no memory"):
        read(FrameReader(), [HEAD.pack(MAX_BODY, 1, 0, 1, 3)])


@pytest.mark.parametrize("step", [1 << 30, 77_777, 4096])
def test_a_large_body_in_steps(step: int):
    sent = Frame(3, 1, b"header", [bytes(range(256)) * 1000, b"\5" * 99, b"", b"\6" * 300_000])
    whole = encoded(sent, sent)
    pieces = [whole[i : i + step] for i in range(0, len(whole), step)]
    assert [plain(frame) for frame in read(FrameReader(), pieces)] == [plain(sent)] * 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.lists(st.builds(Frame, st.just(3), st.just(7), st.binary(max_size=30), big_parts), max_size=3), st.data())
def test_bytes_put_in_place(sent: list[Frame], data):
    """Whatever of a large body is written into its memory, and whatever is fed."""
    rest = encoded(*sent)
    reader = FrameReader()
    received = []
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        if reader.large is not None and data.draw(st.booleans()):
            size = min(size, reader.large.missing)
            reader.large.room()[:size] = rest[:size]
            reader.large.missing -= size
            received += reader.feed(b"")
        else:
            received += reader.feed(rest[:size])
        rest = rest[size:]
    assert [plain(frame) for frame in received] == [plain(frame) for frame in sent]
    assert reader.large is None
