"""WebSockets as uvicorn speaks them, plus a close frame that reaches a client which is still sending."""

from __future__ import annotations

from typing import Any, Literal

from .errors import request_id_in

__all__ = ["websocket_protocol"]

#: Seconds that such a client may take to read why.
LINGER = 1.0


def websocket_protocol() -> type[Any] | Literal["auto"]:
    """Return the class for uvicorn's settings, which old releases of it choose by themselves."""
    try:
        from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
    except ImportError:
        return "auto"

    from .lingering import linger

    class SocketProtocol(WebSocketsSansIOProtocol):
        """One connection, once it has become a WebSocket."""

        def handle_connect(self, event: Any) -> None:
            """Begin it; where websockets refuses by itself, the answer has a request id as all others."""
            accept = self.conn.accept

            def accept_or_refuse(request: Any) -> Any:
                response = accept(request)
                if response.status_code != 101:
                    sent = [(b"x-request-id", request.headers.get("X-Request-ID", "").encode("latin-1", "replace"))]
                    response.headers["X-Request-ID"] = request_id_in(sent)
                return response

            self.conn.accept = accept_or_refuse  # type: ignore[method-assign]
            super().handle_connect(event)

        def handle_parser_exception(self) -> None:
            """End it because of what the client sent: a message that is too large, or no message at all."""
            transport = self.transport
            # uvicorn writes the close frame, and closes at once.
            self.transport = _Open(transport)  # type: ignore[assignment]
            super().handle_parser_exception()
            self.transport = transport
            linger(transport, self, LINGER)

    return SocketProtocol


class _Open:
    """Stands for a transport that is not closed yet."""

    def __init__(self, transport: Any) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing

    def close(self) -> None:
        """Leave that to others."""
