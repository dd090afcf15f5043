"""What frames say: the kinds, and the header of each.

Headers are msgpack arrays: a field may be added at the end with a default; a version that does not know it skips it.
A kind may be added at the end too: who does not know it ignores it, so that it may be news, and nothing that waits for
an answer. All else needs a new version of the wire.

A request's first frame is a CALL (or FETCH); it is answered exactly once: by RESULT, ERROR, FULL or DRAINING, or by
CHUNKs and an END (or ERROR).

A CALL with `more` set is followed by frames of the caller: CHUNKs and an END for the rest of an HTTP body, EVENTs for a
WebSocket. None of them leaves before the door's first WINDOW for the call, which says that it is accepted: until then
FULL or DRAINING may come back. Over HTTP the payload of those CHUNKs is bytes, their header is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

__all__ = [
    "BODY_WINDOW",
    "LEAST",
    "MODEL_ID_HEADERS",
    "WINDOW",
    "WINDOW_STEP",
    "Attachment",
    "BodyEnd",
    "Call",
    "Chunk",
    "Event",
    "Failure",
    "Hello",
    "HttpHead",
    "Kind",
    "Models",
    "Proof",
    "ReplicaName",
    "Reply",
    "Want",
    "encode",
    "is_websocket",
    "model_id_of",
]

#: The wire's versions that this code speaks, the preferred one first.
VERSIONS: Final = (1,)

#: Bytes of a stream that may be under way: yielded in the replica, and not consumed by the caller.
WINDOW: Final = 256 * 1024
#: The caller tells what it has consumed in steps of this many bytes.
WINDOW_STEP: Final = WINDOW // 4
#: Bytes of a request's body that may be under way: sent by the caller, and not read by user code. Uploads come from one
#: client in pieces as large as its socket gives, and each turn of the window passes four threads.
BODY_WINDOW: Final = 512 * 1024
#: What an item counts at least, so that small ones are bounded too.
LEAST: Final = 1024


class Kind:
    """The kinds of frames. Plain integers: they are compared on the request path."""

    HELLO: Final = 1
    PROOF: Final = 2
    CALL: Final = 3
    RESULT: Final = 4
    ERROR: Final = 5
    FULL: Final = 6
    CHUNK: Final = 7
    END: Final = 8
    WINDOW: Final = 9
    CANCEL: Final = 10
    WANT: Final = 11
    CREDIT: Final = 12
    RETURN: Final = 13
    DRAINING: Final = 14
    PING: Final = 15
    PONG: Final = 16
    FETCH: Final = 17
    RELEASE: Final = 18
    EVENT: Final = 19
    MODELS: Final = 20

    #: The last one. Kinds above it are of later versions.
    LAST: Final = MODELS


class Hello(Struct, array_like=True, gc=False):
    """First frame of each side, before anybody is trusted."""

    versions: list[int]
    nonce: bytes
    #: The listener's incarnation; empty from the dialler.
    process: str = ""
    #: The listener's proof; empty from the dialler, who sends it as PROOF.
    proof: bytes = b""


class Proof(Struct, array_like=True, gc=False):
    """The dialler's proof."""

    proof: bytes


class HttpHead(Struct, array_like=True, gc=False):
    """The head of an HTTP request, as ASGI has it."""

    method: str
    path: str
    root_path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    scheme: str
    http_version: str
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    #: The path as it was sent; empty where encoding ``path`` gives the same.
    raw_path: bytes = b""


class Attachment(Struct, array_like=True, gc=False, frozen=True):
    """Where the value of a ref or a Dask future among the arguments is; exactly one of the three forms."""

    #: In the store of another process.
    process: str = ""
    door: str = ""
    name: str = ""
    #: In this call's payload: that many parts, the first attachment's first, at its end.
    parts: int = 0
    #: On the cluster under this Dask key, whose tuples arrive as lists.
    key: Any = None


class Call(Struct, array_like=True, gc=False):
    """One request. Its payload: pickled arguments, or the body of an HTTP request."""

    replica: str
    method: str
    request_id: str
    #: Seconds that remain until the deadline; None: no deadline. Relative, because clocks differ.
    remaining: float | None
    #: Sent on a credit of this replica.
    credit: bool
    #: Set for HTTP; None: a call from Python.
    http: HttpHead | None = None
    #: Refs among the arguments: where their values are.
    attachments: list[Attachment] = []
    #: The model that the call is for, or "".
    model_id: str = ""
    #: It lets online requests go first.
    background: bool = False
    #: The answer is a stream: the method returns a generator.
    stream: bool = False
    #: Admitted even where results have no room.
    urgent: bool = False
    #: The payload is only the first piece of the body; or this is a WebSocket, whose messages follow.
    more: bool = False
    #: ``traceparent`` and ``tracestate`` of the request that makes a call from Python. Over HTTP they are headers.
    trace: tuple[str, str] | None = None


class Reply(Struct, array_like=True, gc=False):
    """Header of RESULT, FULL, DRAINING and END: the replica's load, and what kind of answer it is."""

    #: Requests admitted by the replica at this moment, this one taken off.
    running: int = 0
    #: Sum of the WANTs it knows.
    wanted: int = 0
    #: Credits granted to the receiver with this answer.
    credits: int = 0
    #: The value stays in the process's store under this name; empty: it is in the payload. Of a FETCH, whose answer
    #: has it in the payload in any case, empty: there is little room left, and the owner should take it over.
    stored: str = ""
    #: Bytes of the stored value.
    nbytes: int = 0
    #: HTTP status; 0 for calls from Python.
    status: int = 0
    headers: list[tuple[bytes, bytes]] = []
    #: No online request has come to the replica for a while.
    quiet: bool = False


class Failure(Struct, array_like=True, gc=False):
    """Header of ERROR. Its payload, if any: the pickled exception of user code."""

    running: int
    wanted: int
    credits: int
    #: Name of a class in `dask_serve.exceptions`, or "" for an exception of user code.
    error: str
    #: For people: the message, or the traceback of user code as text.
    message: str
    #: True once a part of the answer was sent.
    started: bool = False
    #: Of a BackPressureError: the seconds after which trying again makes sense.
    retry_after: float | None = None


class Chunk(Struct, array_like=True, gc=False):
    """A piece of a streamed answer; the first one of an HTTP answer carries its head."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = []
    #: Of a stream of Python objects: how its items lie in the payload (`chunks`).
    items: list[int] = []


class Event(Struct, array_like=True, gc=False):
    """One step of a WebSocket. The payload of a message is the message."""

    #: "accept", "message", "close" or "disconnect".
    type: str
    #: Of a close or a disconnect.
    code: int = 0
    reason: str = ""
    #: The message is text in UTF-8.
    text: bool = False
    #: Of an accept.
    subprotocol: str | None = None
    headers: list[tuple[bytes, bytes]] = []


class BodyEnd(Struct, array_like=True, gc=False):
    """Header of an END that a caller sends: the body is whole, or the rest of it will never come."""

    whole: bool = True


class Window(Struct, array_like=True, gc=False):
    """How many bytes of a stream, or of a body, the receiver has consumed and will take again."""

    nbytes: int


class Want(Struct, array_like=True, gc=False):
    """A level: how many requests wait at this router, and for how many seconds the oldest has."""

    replica: str
    count: int
    oldest: float
    #: The next one is urgent.
    urgent: bool = False
    #: How many of them are online ones; None: all.
    online: int | None = None


class ReplicaName(Struct, array_like=True, gc=False):
    """Header of CREDIT and RETURN, and of a DRAINING that answers no call."""

    replica: str


class Models(Struct, array_like=True, gc=False):
    """Header of MODELS, sent by a door when it changes: the models that a replica has, and those that it loads."""

    replica: str
    ready: list[str]
    loading: list[str]


class Names(Struct, array_like=True, gc=False):
    """Header of FETCH and RELEASE: names in the process's store."""

    names: list[str]


def is_websocket(head: HttpHead) -> bool:
    """Whether a request is the beginning of a WebSocket."""
    return head.scheme in {"ws", "wss"}


def model_id_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the model that an HTTP request is for, or ""."""
    for name, value in headers:
        if name in MODEL_ID_HEADERS:
            return value.decode("latin-1")
    return ""


#: The second form passes gateways that drop headers with underscores.
MODEL_ID_HEADERS: Final = (b"serve_multiplexed_model_id", b"serve-multiplexed-model-id")

encode = msgspec.msgpack.Encoder().encode

decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_proof = msgspec.msgpack.Decoder(Proof).decode
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_failure = msgspec.msgpack.Decoder(Failure).decode
decode_chunk = msgspec.msgpack.Decoder(Chunk).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_body_end = msgspec.msgpack.Decoder(BodyEnd).decode
decode_window = msgspec.msgpack.Decoder(Window).decode
decode_want = msgspec.msgpack.Decoder(Want).decode
decode_replica = msgspec.msgpack.Decoder(ReplicaName).decode
decode_models = msgspec.msgpack.Decoder(Models).decode
decode_names = msgspec.msgpack.Decoder(Names).decode
