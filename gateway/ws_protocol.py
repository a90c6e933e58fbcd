"""uvicorn's websocket protocol, with joined writes and endings that reach (or give up) the peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from gateway.joint_writes import Write, raw_descriptor

LINGER_S = 2.0
TEXT_FRAMES = "openlora.text_frames"
"""Name of the ASGI extension whose value is the connection's ``follower.FrameWriter``."""

_TEXT = b"\x81"  # FIN, opcode 1; a server does not mask
_KNOWN_LENGTHS = 1024


def frame_head(length: int) -> bytes:
    """What precedes the ``length`` bytes of a whole text frame (RFC 6455, section 5.2)."""
    if length < 126:
        return _TEXT + bytes((length,))
    if length < 1 << 16:
        return _TEXT + b"\x7e" + length.to_bytes(2, "big")
    return _TEXT + b"\x7f" + length.to_bytes(8, "big")


_HEADS = tuple(map(frame_head, range(_KNOWN_LENGTHS)))


def join_frames(texts: Sequence[str]) -> bytes:
    """``texts`` on the wire, a frame for each."""
    if len(texts) == 1:  # a step's one token for this connection
        data = texts[0].encode()
        length = len(data)
        return (_HEADS[length] if length < _KNOWN_LENGTHS else frame_head(length)) + data
    parts = []
    for text in texts:
        data = text.encode()
        length = len(data)
        parts.append(_HEADS[length] if length < _KNOWN_LENGTHS else frame_head(length))
        parts.append(data)
    return b"".join(parts)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """As uvicorn's, but:

    - after a frame that is no valid one (over 16 MiB: 1009) it reads on, discarding, until the peer
      has closed or ``LINGER_S`` is over. Closing a socket with unread data resets it, and the reset
      overtakes the close frame: the client would not learn why.
    - a peer that answers no pings is cut off instead of waited for until its buffers have emptied,
      which they never do.
    - it is a ``FrameWriter``, found in the scope's extensions: frames that are there together go
      out in one write, without a task's turn or an ASGI event for each. Compression is off
      (``gateway.main``), so that a frame is its text behind a length.
    - a handshake that is refused is no error of the application's.
    """

    __slots__ = ("_buffered", "_descriptor", "_write")

    def connection_made(self, transport: Any) -> None:
        """The handshake's bytes follow."""
        super().connection_made(transport)
        self._descriptor = raw_descriptor(transport)
        self._buffered = transport.get_write_buffer_size
        self._write = transport.write

    async def run_asgi(self) -> None:
        """Calls the application, with the frame writer in its scope."""
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[TEXT_FRAMES] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        """An ASGI event of the application's."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            # Refused and answered. uvicorn logs an error for it, as for an application that
            # answers nothing: anybody could fill the log.
            self.handshake_complete = True

    @property
    def takes_frames(self) -> bool:
        """Whether the transport's buffer has room."""
        return self.writable.is_set()

    async def drain(self) -> None:
        """Returns once there is room, or nobody to send to any more."""
        await self.writable.wait()

    def write_frames(self, texts: Sequence[str]) -> None:
        """Sends each of ``texts`` as a frame. What comes after the close is dropped: the connection
        is told of that by its ``receive``."""
        if self._is_open():
            self.transport.write(join_frames(texts))

    def gather_frames(self, texts: Sequence[str], writes: list[Write]) -> bool:
        """As ``write_frames``, by ``write_all(writes)``: that must follow before the event loop
        goes on, since it takes the socket for this connection's and its buffer for empty. False
        where the transport's buffer has no room: nothing is sent then."""
        if self._descriptor < 0 or self._buffered():
            if not self.writable.is_set():
                return False
            self.write_frames(texts)
        elif self.conn.state is OPEN and not self.transport.is_closing():
            # as _is_open says, but without a call: this is for each token
            writes.append((self._descriptor, join_frames(texts), self._write))
        return True

    def _is_open(self) -> bool:
        # uvicorn's close_sent and disconnected need no look: where one is set, these have changed.
        return self.conn.state is OPEN and not self.transport.is_closing()

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
