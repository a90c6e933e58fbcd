"""Does a server answer? One real request over a raw socket: no client library is needed."""

from __future__ import annotations

import socket
import struct

_TIMEOUT_S = 1.0
_METADATA = 3
_CORRELATION_ID = 7


def kafka_answers(host: str, port: int) -> bool:
    """Whether a Kafka-protocol broker answers Metadata v1 with at least one broker."""
    client = b"openlora"
    # Topics: an empty array asks for none, so that the answer stays small.
    body = struct.pack(">hhih", _METADATA, 1, _CORRELATION_ID, len(client)) + client
    body += struct.pack(">i", 0)
    try:
        with socket.create_connection((host, port), _TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            size, correlation_id, brokers = struct.unpack(">iii", _receive(connection, 12))
    except OSError:
        return False
    return bool(size >= 8 and correlation_id == _CORRELATION_ID and brokers > 0)


def redis_answers(host: str, port: int, password: str) -> bool:
    """Whether a Redis-protocol server takes the password and answers PING (not still loading)."""
    secret = password.encode()
    auth = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n" % (len(secret), secret)
    try:
        with socket.create_connection((host, port), _TIMEOUT_S) as connection:
            connection.sendall(auth + b"*1\r\n$4\r\nPING\r\n")
            return _receive(connection, 12) == b"+OK\r\n+PONG\r\n"
    except OSError:
        return False


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed before it answered")
        data += part
    return data
