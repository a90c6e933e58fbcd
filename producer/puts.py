"""Puts: jobs into the embedded broker by hand, all that are there in one request.

A job's way through kafka-python takes 0.8 ms of a gateway's interpreter, in two threads that hold
up the tokens of all its clients meanwhile; here it is a tenth of that. The client's first token
waits for it as well. What does not work out at once (an unknown topic, an error, a broker that went
away) is left to kafka-python, with its retries. It may have been written nevertheless: a job that
is there twice is claimed once.
"""

from __future__ import annotations

import logging
import math
import random
import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kafka.record.default_records import DefaultRecordBatchBuilder

from openlora.kafka_wire import KafkaWire, NotPlain
from openlora.protocol.names import EMBEDDED_CLUSTER_ID
from producer.partitioner import partition_of

Published = tuple[str, int, int]
"""Topic, partition and offset of a message that the broker acknowledged."""

MOST_BYTES = 512 << 10
"""Of the messages in a request; a larger one is left to kafka-python."""
TIMEOUT_S = 0.4
"""Short: kafka-python has its 4.5 s behind it, and the sweeper begins at 5 s."""
LIBRARY_S = 1.0
"""So long kafka-python does it behind one that did not work out: it learns what has changed."""
_PRODUCE, _VERSION = 0, 7
_ALL_REPLICAS = -1
_WAIT_MS = 1000

_REQUEST = struct.Struct(">hhii")  # transactional ID, acks, wait, topics
_SIZE = struct.Struct(">i")
_PART = struct.Struct(">ii")  # partition, bytes of records
_ANSWER = struct.Struct(">ihqqq")  # partition, error, offset, append time, log start

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One to publish.

    ``partition``: where its key would not put it. ``until``: when (monotonic) it is too late to
    begin.
    """

    future: Future[Published]
    topic: str
    key: bytes | None
    value: bytes
    partition: int | None = None
    until: float = math.inf


class Puts:
    """One connection. Used by one thread.

    Args:
        cluster: kafka-python's ``ClusterMetadata``, which its producer keeps.
        client_id: what the broker knows us by.
    """

    def __init__(self, cluster: Any, client_id: str) -> None:
        self._cluster = cluster
        self._wire = KafkaWire(client_id, TIMEOUT_S)
        self._library_until = 0.0

    def put(self, messages: Sequence[Message]) -> list[Message]:
        """Publishes and ends the futures of those that the broker took; → the others."""
        is_embedded = self._cluster.cluster_id == EMBEDDED_CLUSTER_ID
        if not is_embedded or time.monotonic() < self._library_until:
            return [*messages]
        left: list[Message] = []
        by_place: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message in messages:
            partition = self._partition_of(message)
            if partition is None:
                left.append(message)
            else:
                by_place[message.topic, partition].append(message)
        if not by_place:
            return left
        try:
            answer = self._wire.exchange(self._leader(), _PRODUCE, _VERSION, _ask(by_place))
            offsets = dict(_read(answer))
        except (OSError, NotPlain) as error:
            _logger.info("messages not put by hand (%s); kafka-python sends them", error)
            self._wire.close()
            offsets = {}
        for place, together in by_place.items():
            offset = offsets.get(place)
            if offset is None:
                self._library_until = time.monotonic() + LIBRARY_S
                left += together
                continue
            for number, message in enumerate(together):
                message.future.set_result((*place, offset + number))
        return left

    def close(self) -> None:
        """The next ``put`` connects."""
        self._wire.close()

    def _partition_of(self, message: Message) -> int | None:
        """As kafka-python chooses it; None where it must."""
        if len(message.value) + len(message.key or b"") > MOST_BYTES:
            return None
        partitions = self._cluster.partitions_for_topic(message.topic)
        if not partitions or partitions != set(range(len(partitions))):
            return None
        if message.partition is not None:
            return message.partition if message.partition in partitions else None
        if message.key is None:
            return random.randrange(len(partitions))
        return partition_of(message.key, len(partitions))

    def _leader(self) -> tuple[str, int]:
        """Of all partitions: the embedded broker is one."""
        for broker in self._cluster.brokers():
            return broker.host, broker.port
        raise NotPlain("no broker is known")


def _ask(by_place: dict[tuple[str, int], list[Message]]) -> bytes:
    topics: dict[str, list[bytes]] = defaultdict(list)
    now_ms = time.time_ns() // 1_000_000
    for (topic, partition), messages in by_place.items():
        batch = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=0,
            is_transactional=False,
            producer_id=-1,
            producer_epoch=-1,
            base_sequence=-1,
            batch_size=1 << 30,  # the messages are bounded already
        )
        for number, message in enumerate(messages):
            batch.append(number, now_ms, message.key, message.value, [])
        records = bytes(batch.build())
        topics[topic].append(_PART.pack(partition, len(records)) + records)
    parts = [_REQUEST.pack(-1, _ALL_REPLICAS, _WAIT_MS, len(topics))]
    for topic, partitions in topics.items():
        name = topic.encode()
        parts += [struct.pack(">h", len(name)), name, _SIZE.pack(len(partitions)), *partitions]
    return b"".join(parts)


def _read(answer: bytes) -> Iterator[tuple[tuple[str, int], int]]:
    """Where the broker put a partition's first message; of those that it took."""
    try:
        (topics,) = _SIZE.unpack_from(answer, _SIZE.size)
        at = 2 * _SIZE.size
        for _ in range(topics):
            (length,) = struct.unpack_from(">h", answer, at)
            topic = answer[at + 2 : at + 2 + length].decode()
            (partitions,) = _SIZE.unpack_from(answer, at + 2 + length)
            at += 2 + length + _SIZE.size
            for _ in range(partitions):
                partition, error, offset, _, _ = _ANSWER.unpack_from(answer, at)
                at += _ANSWER.size
                if error or offset < 0:
                    _logger.info("%s %d answers error %d", topic, partition, error)
                else:
                    yield (topic, partition), offset
    except (struct.error, UnicodeDecodeError) as error:
        raise NotPlain(f"answer of {len(answer)} bytes: {error}") from error
