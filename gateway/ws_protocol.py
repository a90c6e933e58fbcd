"""uvicorn's websocket protocol, with joined writes and endings that reach (or give up) the peer."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

LINGER_S = 2.0


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """As uvicorn's, but:

    - after a frame that is no valid one (over 16 MiB: 1009) it reads on, discarding, until the peer
      has closed or ``LINGER_S`` is over. Closing a socket with unread data resets it, and the reset
      overtakes the close frame: the client would not learn why.
    - a peer that answers no pings is cut off instead of waited for until its buffers have emptied,
      which they never do.
    - text frames sent with ``more`` wait for the one behind them and go out in one write: behind
      its time, a gateway would else spend most of it in system calls of a hundred bytes.
    """

    async def send(self, message: Any) -> None:
        """An ASGI event; ``more`` is an addition to ``websocket.send``."""
        if message.get("more") and not self.close_sent and self.conn.state is State.OPEN:
            self.conn.send_text(message["text"].encode())
        else:
            await super().send(message)

    def handle_parser_exception(self) -> None:
        """Sends the close frame that the parser decided on; called again for what still comes."""
        if self.close_sent:
            return
        closing = self.conn.close_sent
        if closing is None:
            raise RuntimeError("the parser failed without closing")
        self.queue.put_nowait(
            {"type": "websocket.disconnect", "code": closing.code, "reason": closing.reason}
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def keepalive_timeout(self) -> None:
        """No pong came in time."""
        super().keepalive_timeout()
        self.transport.abort()
