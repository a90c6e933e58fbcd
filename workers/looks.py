"""Looks: fetches of the embedded broker by hand, over a connection of their own.

Nothing is awaited there: a look asks for what is there now. Going through kafka-python, each costs
a worker 2 ms of a core, in which its tokens wait for the interpreter; here it is two system calls
and a comparison with the last answer, as long as nothing came. What is not plain (an error, moved
partitions, a broker that went away) is left to kafka-python.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator

from kafka.errors import KafkaError
from kafka.structs import TopicPartition

LOOK_MS = 1
"""The wait of a look: the embedded broker answers one without a wait with nothing, whatever is
there, and one that waits goes through all partitions again after a half of it, three quarters, ….
"""
TIMEOUT_S = 2.0
_FETCH, _VERSION = 1, 11
_PARTITION_BYTES = 1 << 20
_MOST_BYTES = 1 << 27
"""Of an answer, which may hold a first message that is larger than was asked for."""
_EARLIEST_EPOCH = _NO_SESSION = _CLIENT = -1

_SIZE = struct.Struct(">i")
_HEAD = struct.Struct(">hhi")
_ANSWER_HEAD = struct.Struct(">iihii")  # correlation, throttle, error, session, topics
_OFFSET = struct.Struct(">iiqqi")  # partition, leader epoch, offset, log start, most bytes
_STATE = struct.Struct(">ihqqqi")  # partition, error, high water, stable, log start, aborted
_REST = struct.Struct(">ii")  # preferred replica, bytes of records


class NotPlain(KafkaError):  # type: ignore[misc]
    """An answer that is kafka-python's to deal with."""


class Looks:
    """One connection, made at the first look. Used by one thread.

    Args:
        client_id: what the broker knows us by.
        max_bytes: what one answer may hold at most, beyond a first message that is larger.
    """

    def __init__(self, client_id: str, max_bytes: int) -> None:
        self._client_id = client_id.encode()
        self._max_bytes = max_bytes
        self._socket: socket.socket | None = None
        self._address: tuple[str, int] | None = None
        self._correlation = 0
        self._asked: list[tuple[TopicPartition, int]] = []
        self._question = b""
        self._empty_answer: bytes | None = None

    def look(
        self, address: tuple[str, int], wanted: list[tuple[TopicPartition, int]]
    ) -> list[tuple[TopicPartition, int, memoryview]] | None:
        """→ partition, high water and records of each of ``wanted``; None where all is as it was
        and empty.

        ``wanted``: partitions and the offsets to read from, those of a topic together.

        Raises:
            OSError: the broker does not answer; the next look connects again.
            NotPlain: it answered with something else. Nothing was lost.
        """
        if wanted != self._asked:
            self._asked, self._question = [*wanted], self._ask(wanted)
            self._empty_answer = None
        try:
            answer = self._exchange(address)
            if answer[4:] == self._empty_answer:
                return None
            found = list(_read(answer))
            if {partition for partition, _, _ in found} != {partition for partition, _ in wanted}:
                raise NotPlain("an answer of other partitions than those asked for")
        except (OSError, struct.error, UnicodeDecodeError, NotPlain) as error:
            self.close()
            if isinstance(error, struct.error | UnicodeDecodeError):
                raise NotPlain(f"answer of {len(answer)} bytes: {error}") from error
            raise
        if not any(len(records) for _, _, records in found):
            self._empty_answer = answer[4:]
        return found

    def forget(self) -> None:
        """The next look says all that it sees, also where that is as it was."""
        self._empty_answer = None

    def close(self) -> None:
        """The next look connects."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, wanted: Iterable[tuple[TopicPartition, int]]) -> bytes:
        topics: dict[str, list[bytes]] = {}
        for (topic, partition), offset in wanted:
            topics.setdefault(topic, []).append(
                _OFFSET.pack(partition, _EARLIEST_EPOCH, offset, -1, _PARTITION_BYTES)
            )
        parts = [
            struct.pack(">h", len(self._client_id)) + self._client_id,
            struct.pack(">iiiibii", _CLIENT, LOOK_MS, 1, self._max_bytes, 0, 0, _NO_SESSION),
            _SIZE.pack(len(topics)),
        ]
        for topic, partitions in topics.items():
            name = topic.encode()
            parts += [struct.pack(">h", len(name)), name, _SIZE.pack(len(partitions)), *partitions]
        parts.append(struct.pack(">ih", 0, 0))  # no partitions to forget, no rack
        return b"".join(parts)

    def _exchange(self, address: tuple[str, int]) -> bytes:
        if address != self._address:  # the old one may still answer, with what it has
            self.close()
        if self._socket is None:
            self._address = address
            self._socket = socket.create_connection(address, TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._correlation = (self._correlation + 1) & 0x7FFFFFFF
        head = _HEAD.pack(_FETCH, _VERSION, self._correlation)
        size = _SIZE.pack(len(head) + len(self._question))
        self._socket.sendall(b"".join((size, head, self._question)))
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


def _read(answer: bytes) -> Iterator[tuple[TopicPartition, int, memoryview]]:
    _, _, error, _, topics = _ANSWER_HEAD.unpack_from(answer)
    _refuse(error)
    view, at = memoryview(answer), _ANSWER_HEAD.size
    for _ in range(topics):
        (length,) = struct.unpack_from(">h", answer, at)
        topic = answer[at + 2 : at + 2 + length].decode()
        at += 2 + length
        (partitions,) = _SIZE.unpack_from(answer, at)
        at += _SIZE.size
        for _ in range(partitions):
            partition, error, high_water, _, _, aborted = _STATE.unpack_from(answer, at)
            _refuse(error)
            if aborted > 0:
                raise NotPlain(f"{topic} {partition} has aborted transactions")
            at += _STATE.size
            _, size = _REST.unpack_from(answer, at)
            at += _REST.size
            end = at + max(0, size)
            if end > len(answer):
                raise NotPlain(f"{topic} {partition} ends behind the answer")
            yield TopicPartition(topic, partition), high_water, view[at:end]
            at = end


def _refuse(error: int) -> None:
    if error:
        raise NotPlain(f"error {error}")
