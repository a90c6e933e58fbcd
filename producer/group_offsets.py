"""How far the workers' group is on partitions that no living worker tells of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer
from kafka.admin import KafkaAdminClient
from kafka.errors import CoordinatorNotAvailableError, KafkaError
from kafka.structs import TopicPartition

from openlora.errors import SetupError
from openlora.protocol.names import WORKER_GROUP

_TIMEOUT_S = 3.0
_POLL_MS = 50
_FETCH_BYTES = 1024

Partition = tuple[str, int]


def read_group_offsets(
    bootstrap_servers: str, partitions: Iterable[Partition]
) -> dict[Partition, tuple[int, int]]:
    """(committed, end) by partition: the next offset that a new owner would read, and the end.

    The end is the high water of a fetch from there: the embedded broker answers the question for
    its end offsets wrongly. Partitions that did not answer within 3 s are left out.

    Raises:
        SetupError: the broker does not answer.
    """
    wanted = [TopicPartition(*partition) for partition in partitions]
    if not wanted:
        return {}
    try:
        committed = _committed(bootstrap_servers)
        return _ends(bootstrap_servers, {tp: committed.get(tp, 0) for tp in wanted})
    except (KafkaError, OSError, ValueError) as error:
        raise SetupError(f"Kafka at {bootstrap_servers} does not answer: {error!r}") from error


def _committed(bootstrap_servers: str) -> dict[Any, int]:
    admin: Any = KafkaAdminClient(
        bootstrap_servers=bootstrap_servers.split(","),
        bootstrap_timeout_ms=int(_TIMEOUT_S * 1000),
        request_timeout_ms=int(_TIMEOUT_S * 1000),
    )
    try:
        offsets = admin.list_group_offsets({WORKER_GROUP: None})
    except CoordinatorNotAvailableError:
        return {}  # no group has committed anything on this broker yet
    finally:
        admin.close()
    return {tp: at.offset for tp, at in offsets.get(WORKER_GROUP, {}).items() if at.offset >= 0}


def _ends(bootstrap_servers: str, starts: Mapping[Any, int]) -> dict[Partition, tuple[int, int]]:
    consumer: Any = KafkaConsumer(
        bootstrap_servers=bootstrap_servers.split(","),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where a topic was made anew, below what was committed
        fetch_max_wait_ms=10,
        max_partition_fetch_bytes=_FETCH_BYTES,
        bootstrap_timeout_ms=int(_TIMEOUT_S * 1000),
        allow_auto_create_topics=False,
        metrics_enabled=False,
    )
    try:
        consumer.assign(list(starts))
        for partition, offset in starts.items():
            consumer.seek(partition, offset)
        missing = set(starts)
        ends: dict[Partition, tuple[int, int]] = {}
        deadline = time.monotonic() + _TIMEOUT_S
        while missing and time.monotonic() < deadline:
            consumer.poll(_POLL_MS, max_records=1)
            for partition in list(missing):
                end = consumer.highwater(partition)
                if end is not None:
                    missing.discard(partition)
                    consumer.pause(partition)
                    start = min(starts[partition], end)
                    ends[partition.topic, partition.partition] = (start, end)
        return ends
    finally:
        with suppress(KafkaError):
            consumer.close(autocommit=False)
