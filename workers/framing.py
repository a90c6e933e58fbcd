"""Length-prefixed msgpack frames over a stream socket: a pure splitter and a buffered sender."""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
RECEIVE_BYTES = 1 << 18

_encoder = msgspec.msgpack.Encoder()


def pack_frame(message: object) -> bytes:
    """``message`` as one frame: 4 bytes of length (little endian), then msgpack."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameSplitter:
    """Gathers bytes of any cut and gives back whole frames' bodies, in order."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies completed by ``data``."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return bodies


class FrameSender:
    """Sends frames on a non-blocking socket; what does not fit waits for ``flush``.

    The I/O process must never block on a send: the engine may itself be waiting for the I/O
    process to read its tokens, and both would wait for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pending = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes not yet taken by the kernel."""
        return len(self._pending)

    def send(self, message: object) -> None:
        """Queue one frame and send what fits. Raises OSError when the peer is gone."""
        self._pending += pack_frame(message)
        self.flush()

    def flush(self) -> None:
        """Send what fits now. Raises OSError when the peer is gone."""
        while self._pending:
            try:
                sent = self._sock.send(self._pending)
            except BlockingIOError:
                return
            del self._pending[:sent]


def receive_frame(sock: socket.socket, splitter: FrameSplitter) -> list[bytes]:
    """Block for at least one frame on a blocking socket; [] when the peer has closed."""
    while True:
        data = sock.recv(RECEIVE_BYTES)
        if not data:
            return []
        bodies = splitter.feed(data)
        if bodies:
            return bodies
