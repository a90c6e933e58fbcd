"""uvicorn's HTTP protocol, which by itself takes a request's head of any length, for any time."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.frames import error_fields
from openlora.errors import PayloadTooLarge

MAX_HEAD_BYTES = 1 << 16
"""Of a request's line and headers, and of what is neither body nor its end behind them."""
HEAD_TIMEOUT_S = 30.0
"""What the first head of a connection may take to come."""


class HttpProtocol(HttpToolsProtocol):
    """Cuts off who sends a head without end: the parser keeps all of it, and goes through what it
    has with each part that comes, while every stream of this gateway waits."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A request is to follow."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what comes until the parser makes something of it."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _too_large() -> bytes:
    error = PayloadTooLarge(f"the head of the request is over {MAX_HEAD_BYTES} bytes; send less")
    body = msgspec.json.encode({"error": error_fields(error)})
    head = (
        "HTTP/1.1 431 Request Header Fields Too Large\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


_TOO_LARGE = _too_large()
