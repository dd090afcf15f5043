"""Frames without I/O: bytes in, frames out, and back.

One frame on the wire::

    body length  u64 | request id u32 | header length u32 | payload parts u16 | kind u8
    header       msgpack, its type given by the kind (`messages`)
    part lengths u64 each, for all payload parts but the first
    payload      the parts behind the first, and then the first, which takes the rest

Numbers are little-endian. Nothing here looks into a header or a payload. The first part (a pickle of any length) comes
last so that the arrays behind it are aligned in the receiver's buffer: numpy is several times slower on others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

from .memory import allocate, copied

__all__ = ["Buffer", "Frame", "FrameError", "FrameReader", "LargeBody", "encode_frame"]

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct("<QIIHB")
_HEAD_SIZE = _HEAD.size
_PART = struct.Struct("<Q")

#: Bodies above this are received into a buffer of their own instead of being joined from pieces.
_LARGE = 64 * 1024
#: In the buffer of a large body the second part begins at a multiple of this.
_ALIGNED = 16
#: No body may claim more than this (64 GiB): a guard against garbage, not a tuning knob.
MAX_BODY = 1 << 36


class FrameError(Exception):
    """The bytes are no frame of ours; the connection that sent them has to be closed."""


class Frame(Struct, frozen=True, gc=False):
    """One frame: what it is, what it belongs to, and what it carries."""

    kind: int
    request: int
    header: bytes
    #: Payload parts. Parts after the first are writable, so that arrays made on them are too.
    parts: list[Buffer]


def encode_frame(kind: int, request: int, header: bytes, parts: Sequence[Buffer], out: list[Buffer]) -> int:
    """Append one frame's buffers to ``out`` (payload parts uncopied) and return its size in bytes."""
    count = len(parts)
    if count == 0:
        size = len(header)
        out.append(_HEAD.pack(size, request, len(header), 0, kind) + header)
        return size + _HEAD_SIZE
    if count == 1:
        part = parts[0]
        size = len(header) + len(part)
        out.append(_HEAD.pack(size, request, len(header), 1, kind) + header)
        out.append(part)
        return size + _HEAD_SIZE
    lengths = b"".join([_PART.pack(len(part)) for part in parts[1:]])
    size = len(header) + len(lengths) + sum(map(len, parts))
    out.append(_HEAD.pack(size, request, len(header), count, kind) + header + lengths)
    out.extend(parts[1:])
    out.append(parts[0])
    return size + _HEAD_SIZE


class LargeBody:
    """A body that is received into memory of its own, with a gap before it that aligns the second part.

    A claim alone takes no memory: pages that nothing was written to are not there.

    Parameters
    ----------
    head : tuple
        What stands before the body.

    Raises
    ------
    FrameError
        It claims more memory than there is.

    Attributes
    ----------
    missing : int
        Bytes that have not come yet.
    """

    __slots__ = ("_head", "_memory", "missing")

    def __init__(self, head: tuple[int, int, int, int, int]) -> None:
        size, _, header_size, count, kind = head
        gap = -(header_size + 8 * (count - 1)) % _ALIGNED if count > 1 else 0
        self._head = head
        try:
            self._memory = allocate(gap + size)
        except MemoryError:
            raise FrameError(
                f"a frame of kind {kind} claims a body of {size} bytes, for which there is no memory"
            ) from None
        self.missing = size

    def room(self) -> memoryview:
        """Return where the next bytes belong; whoever puts them there lowers `missing`."""
        return self._memory[-self.missing :]

    def fill(self, data: bytes | memoryview) -> int:
        """Take the next bytes, and return how many of them belong here."""
        take = min(self.missing, len(data))
        if take:
            self.room()[:take] = data if take == len(data) else memoryview(data)[:take]
            self.missing -= take
        return take

    def frame(self) -> Frame:
        """Return the frame, once nothing is missing."""
        return _cut_large(self._head, self._memory)


class FrameReader:
    """Cut a byte stream into frames, wherever the network cut it.

    Attributes
    ----------
    limit : int
        The largest body accepted, in bytes; small until the peer has proved who it is.
    large : LargeBody or None
        A large body under way. Its bytes may also be put there directly; the next `feed` sees that, be it of nothing.
    """

    __slots__ = ("_rest", "large", "limit")

    def __init__(self, limit: int = MAX_BODY) -> None:
        self.limit = limit
        self.large: LargeBody | None = None
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes and yield the frames that are complete now.

        One by one, because what a frame says may change what the next is allowed: behind the frame that proves who the
        peer is, and in the same read, may stand one of any size.

        Raises
        ------
        FrameError
            The bytes break the format; frames before the break are lost with the connection.
        """
        start = 0
        large = self.large
        if large is not None:
            start = large.fill(data)
            if large.missing:
                return
            self.large = None
            yield large.frame()
            large = None
        elif self._rest:
            data = self._rest + data
        end = len(data)
        while end - start >= _HEAD_SIZE:
            head = _HEAD.unpack_from(data, start)
            size = head[0]
            if size > self.limit or head[2] + 8 * (head[3] - 1) > size or (not head[3] and head[2] != size):
                raise FrameError(f"a frame of kind {head[4]} claims a body of {size} bytes")
            begin = start + _HEAD_SIZE
            stop = begin + size
            if stop > end:
                if size > _LARGE:
                    self.large = LargeBody(head)
                    self.large.fill(memoryview(data)[begin:end])
                    start = end
                break
            start = stop
            if head[3] > 1:
                yield _cut_small(head, data, begin, stop)
            else:
                at = begin + head[2]
                yield Frame(head[4], head[1], data[begin:at], [data[at:stop]] if head[3] else [])
        self._rest = bytes(data[start:]) if start < end else b""


def _cut_small(head: tuple[int, int, int, int, int], data: bytes, begin: int, stop: int) -> Frame:
    _, request, header_size, count, kind = head
    at = begin + header_size
    header = data[begin:at]
    edges = _edges(data, at, count, stop)
    parts: list[Buffer] = [data[edges[-2] : stop]]
    parts.extend(bytearray(data[edges[i] : edges[i + 1]]) for i in range(count - 1))
    return Frame(kind, request, header, parts)


def _cut_large(head: tuple[int, int, int, int, int], view: memoryview) -> Frame:
    size, request, header_size, count, kind = head
    stop = len(view)
    at = stop - size + header_size
    header = bytes(view[at - header_size : at])
    if count <= 1:
        return Frame(kind, request, header, [view[at:]] if count else [])
    edges = _edges(view, at, count, stop)
    parts: list[Buffer] = [view[edges[-2] :]]
    for begin, end in pairwise(edges[:-1]):
        part = view[begin:end]
        # Behind a part of an odd length.
        parts.append(part if begin % 8 == 0 else copied(part))
    return Frame(kind, request, header, parts)


def _edges(data: bytes | memoryview, at: int, count: int, stop: int) -> list[int]:
    """Return where each part begins, as they are on the wire (the first one last), and where the last of them ends."""
    begin = at + 8 * (count - 1)
    edges = [begin]
    for i in range(count - 1):
        begin += _PART.unpack_from(data, at + 8 * i)[0]
        if begin > stop:
            raise FrameError(f"payload part {i + 1} ends {begin - stop} bytes behind its frame")
        edges.append(begin)
    edges.append(stop)
    return edges
