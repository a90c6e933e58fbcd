"""How far the owned partitions are, for the heartbeat."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kafka.errors import IllegalStateError
from kafka.structs import TopicPartition

from openlora.protocol.status import PartitionStatus
from workers.kafka_client import position_of
from workers.offsets import Offsets, Partition


def report_partitions(
    consumer: Any,
    offsets: Offsets,
    paused: Collection[TopicPartition],
    undelivered: Mapping[Partition, int],
) -> Iterator[PartitionStatus]:
    """One status per owned partition, from what is known without asking the broker.

    ``high_water`` is -1 where nothing was fetched yet. The broker's end offsets are not used: the
    embedded broker answers wrongly there, while the high water of a fetch is right everywhere.
    ``undelivered``: where messages were fetched but not handed on, the first one's offset; that is
    the position then, since a job before the position counts as one that gets claimed.
    """
    for partition in sorted(offsets.partitions()):
        kafka_partition = TopicPartition(*partition)
        try:
            high_water = consumer.highwater(kafka_partition)
            if high_water is None:
                yield PartitionStatus(*partition, committed=0, position=0, high_water=-1)
                continue
            position = undelivered.get(partition)
            if position is None:
                position = position_of(consumer, kafka_partition)
        except (IllegalStateError, KeyError):
            continue  # just revoked, by kafka-python's own thread; the event is on its way
        if position is None:
            continue  # looked for again, after the topic was cut or made anew
        committed = offsets.committed_offset(partition)
        if committed is None:
            committed = offsets.first_open(partition)
        yield PartitionStatus(
            *partition,
            committed=position if committed is None else committed,
            position=position,
            high_water=max(high_water, position),
            paused=kafka_partition in paused,
        )


def beyond_end(consumer: Any, offsets: Offsets) -> list[Partition]:
    """Owned partitions that end before the position: the topic was made anew.

    Brokers answer a fetch from there with an error, and kafka-python begins at the start; the
    embedded broker answers with nothing, until the new topic has grown as long as the old one.
    """
    found = []
    for partition in offsets.partitions():
        kafka_partition = TopicPartition(*partition)
        try:
            high_water = consumer.highwater(kafka_partition)
            position = position_of(consumer, kafka_partition)
        except (IllegalStateError, KeyError):
            continue  # as above
        if high_water is not None and position is not None and 0 <= high_water < position:
            found.append(partition)
    return found
