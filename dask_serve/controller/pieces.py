"""Large code travels in pieces: Dask reads and writes a message without letting anything else on the loop run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distributed.protocol import Serialized, deserialize, to_serialize

__all__ = ["AT_ONCE", "PART", "Parts", "Uploads", "buffers_of", "cut", "nbytes_of", "parts_of"]

#: Bytes of one message.
PART = 1 << 20
#: How many are under way at a time.
AT_ONCE = 4


class Parts:
    """Code that came in several messages, each as it came."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts


class Uploads:
    """Code that sessions are sending, until they deploy it."""

    def __init__(self) -> None:
        self._uploads: dict[str, dict[int, Any]] = {}
        self._owners: dict[str, str] = {}

    def put(self, upload: str, number: int, part: Any, client: str) -> None:
        """Take a part; one whose answer was lost comes twice."""
        self._uploads.setdefault(upload, {})[number] = part
        self._owners[upload] = client

    def take(self, code: Mapping[str, Any]) -> dict[str, Any]:
        """Return code with what was uploaded in place of (name, number of parts); without what is not here whole."""
        taken = {}
        for revision, blob in code.items():
            if isinstance(blob, (list, tuple)):
                upload, number = blob
                parts = self._forget(upload)
                # Another scheduler may have got the first of them.
                if len(parts) == number:
                    taken[revision] = Parts([parts[n] for n in range(number)])
            else:
                taken[revision] = blob
        return taken

    def remove_client(self, client: str) -> None:
        """Nobody will deploy what this client was sending."""
        for upload in [upload for upload, owner in self._owners.items() if owner == client]:
            self._forget(upload)

    def _forget(self, upload: str) -> dict[int, Any]:
        self._owners.pop(upload, None)
        return self._uploads.pop(upload, {})


def cut(blob: bytes) -> list[Any]:
    """Cut code into messages of Dask's."""
    view = memoryview(blob)
    return [to_serialize(bytes(view[start : start + PART])) for start in range(0, max(len(view), 1), PART)]


def parts_of(blob: Any) -> list[Any]:
    """Return the messages that code came in."""
    return blob.parts if isinstance(blob, Parts) else [blob]


def buffers_of(blob: Any) -> Iterator[memoryview]:
    """Return the bytes of code, as Dask's connections deliver it."""
    return (_buffer(part) for part in parts_of(blob))


def nbytes_of(blob: Any) -> int:
    """Return how many bytes code has, about."""
    return sum(_nbytes(part) for part in parts_of(blob))


def _nbytes(part: Any) -> int:
    frames = getattr(part, "frames", None)
    if frames is not None:
        return sum(memoryview(frame).nbytes for frame in frames)
    return len(getattr(part, "data", part))


def _buffer(part: Any) -> memoryview:
    if isinstance(part, Serialized):
        part = deserialize(part.header, part.frames)
    return memoryview(getattr(part, "data", part)).cast("B")
