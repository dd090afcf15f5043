"""W3C trace context: where a request belongs in the traces of those who send it. Passed on, never made."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["MAX_STATE", "Trace", "read_trace"]

#: ``traceparent`` and ``tracestate``, the latter "" where there is none.
Trace = tuple[str, str]

#: Characters that a ``tracestate`` may have; a longer one is dropped. The recommendation asks for 512 at least.
MAX_STATE = 4096

# Version, trace, parent, flags. Later versions may add fields behind, and ff is none.
_parent = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?").fullmatch
_printable = re.compile(r"[ -~\t]*").fullmatch


def read_trace(parents: Sequence[bytes], states: Sequence[bytes]) -> Trace | None:
    """Return the trace that a request's headers name.

    Parameters
    ----------
    parents, states : sequence of bytes
        Values of all its headers ``traceparent`` and ``tracestate``, in order.

    Returns
    -------
    tuple of str, or None
        None where there is no ``traceparent``, more than one, or one that is not valid: then the state means nothing.
    """
    if len(parents) != 1:
        return None
    parent = parents[0].strip(b" \t").decode("latin-1")
    found = _parent(parent)
    if found is None or (found[1] == "00" and found[2]):
        return None
    state = ",".join(stripped for value in states if (stripped := value.strip(b" \t").decode("latin-1")))
    return parent, state if len(state) <= MAX_STATE and _printable(state) else ""
