"""Answers for clients of HTTP/1.0, which know neither chunks nor ``100 Continue``."""

from __future__ import annotations

from typing import Any

__all__ = ["restrain"]


class _AsLongAsItGets(int):
    """A length from which uvicorn takes what was sent, until the connection closes."""

    def __lt__(self, other: object) -> bool:
        return False

    def __sub__(self, other: object) -> _AsLongAsItGets:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


_LENGTH = _AsLongAsItGets()


def restrain(cycle: Any) -> None:
    """Let a request's answer end with the connection where it does not say how long it is.

    Parameters
    ----------
    cycle : RequestResponseCycle
        uvicorn's; it does not keep connections of such clients, and would answer with chunks.
    """
    cycle.waiting_for_100_continue = False
    cycle.chunked_encoding = False
    cycle.expected_content_length = _LENGTH
