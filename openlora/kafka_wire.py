"""Requests to the embedded broker by hand: one connection, one request at a time.

For the few requests that a live stream waits for. Through kafka-python each takes most of a
millisecond of the interpreter, and hands its lock from thread to thread meanwhile, beside tokens
that wait for it. What is not plain is left to kafka-python, by whoever asks.
"""

from __future__ import annotations

import socket
import struct

_MOST_BYTES = 1 << 27
"""Of an answer, which may hold a message that is larger than was asked for."""

_SIZE = struct.Struct(">i")
_HEAD = struct.Struct(">hhi")  # request, version, correlation


class NotPlain(Exception):
    """An answer that is kafka-python's to deal with."""


class KafkaWire:
    """One connection, made at the first request. Used by one thread.

    Args:
        client_id: what the broker knows us by.
        timeout_s: most time for a connection, and for an answer to begin or go on.
    """

    def __init__(self, client_id: str, timeout_s: float) -> None:
        name = client_id.encode()
        self._client = struct.pack(">h", len(name)) + name
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._address: tuple[str, int] | None = None
        self._correlation = 0

    def exchange(
        self,
        address: tuple[str, int],
        request: int,
        version: int,
        body: bytes,
        wait_s: float = 0.0,
    ) -> bytes:
        """The answer, from its correlation on. Request and answer have no tagged fields.

        ``wait_s``: how much longer the broker may take, having been asked to wait.

        Raises:
            OSError: the broker does not answer; the next request connects again.
            NotPlain: it answered something else; likewise.
        """
        try:
            return self._exchange(address, request, version, body, self._timeout_s + wait_s)
        except (OSError, NotPlain):
            self.close()
            raise

    def close(self) -> None:
        """The next request connects."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(
        self, address: tuple[str, int], request: int, version: int, body: bytes, timeout_s: float
    ) -> bytes:
        if address != self._address:  # the old one may still answer, with what it has
            self.close()
        if self._socket is None:
            self._address = address
            self._socket = socket.create_connection(address, self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._socket.gettimeout() != timeout_s:
            self._socket.settimeout(timeout_s)
        self._correlation = (self._correlation + 1) & 0x7FFFFFFF
        head = _HEAD.pack(request, version, self._correlation)
        size = _SIZE.pack(len(head) + len(self._client) + len(body))
        self._socket.sendall(b"".join((size, head, self._client, body)))
        data = self._receive(b"", _SIZE.size)
        (length,) = _SIZE.unpack_from(data)
        if not _SIZE.size <= length <= _MOST_BYTES:
            raise NotPlain(f"an answer of {length} bytes")
        answer = self._receive(data[_SIZE.size :], length)
        if len(answer) != length or _SIZE.unpack_from(answer)[0] != self._correlation:
            raise NotPlain(f"an answer of {len(answer)} bytes to something else")
        return answer

    def _receive(self, data: bytes, least: int) -> bytes:
        assert self._socket is not None
        while len(data) < least:
            more = self._socket.recv(max(1 << 16, least - len(data)))
            if not more:
                raise ConnectionResetError("the broker closed the connection")
            data += more
        return data
