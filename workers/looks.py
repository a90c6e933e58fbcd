"""Looks: fetches of the embedded broker by hand, over a connection of their own.

Nothing is awaited there: a look asks for what is there now. Going through kafka-python, each costs
a worker 2 ms of a core, in which its tokens wait for the interpreter; here it is two system calls
and a comparison with the last answer, as long as nothing came. What is not plain (an error, moved
partitions, a broker that went away) is left to kafka-python.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kafka.structs import TopicPartition

from openlora.kafka_wire import KafkaWire, NotPlain

LOOK_MS = 1
"""The wait of a look: the embedded broker answers one without a wait with nothing, whatever is
there, and one that waits goes through all partitions again after a half of it, three quarters, ….
"""
LONG_MS, LONGEST_MS = 4, 1024
"""The wait where a look was cut short. Of a partition with a message to give, that broker lists all
from the first one on, half a millisecond a thousand; what it has not done when the wait is over is
answered with nothing. With messages to give, it answers at once however long it may wait."""
TIMEOUT_S = 0.4
"""Beyond the wait. Short: while a broker hangs, jobs that are in memory already wait as well."""
_FETCH, _VERSION = 1, 11
_PARTITION_BYTES = 1 << 20
_EARLIEST_EPOCH = _NO_SESSION = _CLIENT = -1

_SIZE = struct.Struct(">i")
_ANSWER_HEAD = struct.Struct(">iihii")  # correlation, throttle, error, session, topics
_OFFSET = struct.Struct(">iiqqi")  # partition, leader epoch, offset, log start, most bytes
_STATE = struct.Struct(">ihqqqi")  # partition, error, high water, stable, log start, aborted
_REST = struct.Struct(">ii")  # preferred replica, bytes of records


Wanted = list[tuple[TopicPartition, int]]
"""Partitions and the offsets to read from."""
Found = list[tuple[TopicPartition, int, memoryview]]
"""Partitions, their high waters and records."""


class Looks:
    """One connection, made at the first look. Used by one thread.

    Args:
        client_id: what the broker knows us by.
        max_bytes: what one answer may hold at most, beyond a first message that is larger.
    """

    def __init__(self, client_id: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._wire = KafkaWire(client_id, TIMEOUT_S)
        self._asked: Wanted = []
        self._question = b""
        self._empty_answer: bytes | None = None
        self._long_ms = LONG_MS

    def look(self, address: tuple[str, int], wanted: Wanted) -> Found | None:
        """→ partition, high water and records of each of ``wanted``; None where all is as it was
        and empty.

        ``wanted``: those of a topic together.

        Raises:
            OSError: the broker does not answer; the next look connects again.
            NotPlain: it answered with something else. Nothing was lost.
        """
        if wanted != self._asked:
            self._asked, self._question = [*wanted], self._ask(wanted, LOOK_MS)
            self._empty_answer = None
        try:
            answer = self._wire.exchange(address, _FETCH, _VERSION, self._question)
            if answer[4:] == self._empty_answer:
                return None
            found = _read_all(answer, wanted)
            if behind := self._cut_short(found, wanted):
                return self._look_longer(address, found, behind)
        except NotPlain:
            self.close()
            raise
        if not any(len(records) for _, _, records in found):
            self._empty_answer = answer[4:]
        return found

    def forget(self) -> None:
        """The next look says all that it sees, also where that is as it was."""
        self._empty_answer = None

    def close(self) -> None:
        """The next look connects."""
        self._wire.close()

    def _cut_short(self, found: Found, wanted: Wanted) -> Wanted:
        """Of which there are messages that did not come, though the answer had room for them."""
        if 2 * sum(len(records) for _, _, records in found) > self._max_bytes:
            return []
        offsets = dict(wanted)
        return [
            (partition, offsets[partition])
            for partition, high_water, records in found
            if high_water > offsets.get(partition, high_water) and not len(records)
        ]

    def _look_longer(self, address: tuple[str, int], found: Found, behind: Wanted) -> Found:
        """``found``, with what ``behind`` has."""
        all_found = {partition: (high, records) for partition, high, records in found}
        while behind:
            if self._long_ms > LONGEST_MS:
                self._long_ms = LONG_MS
                raise NotPlain(f"{behind[0][0]} has messages and does not give them")
            asked = behind
            question = self._ask(behind, self._long_ms)
            answer = self._wire.exchange(address, _FETCH, _VERSION, question, self._long_ms / 1000)
            for partition, high, records in _read_all(answer, behind):
                all_found[partition] = (high, records)
            found = [(partition, *state) for partition, state in all_found.items()]
            behind = self._cut_short(found, behind)
            if behind == asked:
                self._long_ms *= 4
        return found

    def _ask(self, wanted: Wanted, wait_ms: int) -> bytes:
        topics: dict[str, list[bytes]] = {}
        for (topic, partition), offset in wanted:
            topics.setdefault(topic, []).append(
                _OFFSET.pack(partition, _EARLIEST_EPOCH, offset, -1, _PARTITION_BYTES)
            )
        parts = [
            struct.pack(">iiiibii", _CLIENT, wait_ms, 1, self._max_bytes, 0, 0, _NO_SESSION),
            _SIZE.pack(len(topics)),
        ]
        for topic, partitions in topics.items():
            name = topic.encode()
            parts += [struct.pack(">h", len(name)), name, _SIZE.pack(len(partitions)), *partitions]
        parts.append(struct.pack(">ih", 0, 0))  # no partitions to forget, no rack
        return b"".join(parts)


def _read_all(answer: bytes, wanted: Wanted) -> Found:
    try:
        found = list(_read(answer))
    except (struct.error, UnicodeDecodeError) as error:
        raise NotPlain(f"answer of {len(answer)} bytes: {error}") from error
    if {partition for partition, _, _ in found} != {partition for partition, _ in wanted}:
        raise NotPlain("an answer of other partitions than those asked for")
    return found


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
