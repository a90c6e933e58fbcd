"""Pauses and reports while kafka-python's own thread takes partitions away.

The consumer is a fake: on a real one nothing makes a revocation fall between two of its calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from kafka.errors import IllegalStateError
from kafka.structs import OffsetAndMetadata, TopicPartition

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from openlora.protocol.status import PartitionStatus
from workers.offsets import Offsets
from workers.partition_report import beyond_end, report_partitions
from workers.pauses import Pauses


class FakeConsumer:
    """As a ``KafkaConsumer``: ``revoked`` partitions are gone, though still named as assigned."""

    def __init__(self, assigned: Iterable[tuple[str, int]]) -> None:
        self.assigned = {TopicPartition(*name) for name in assigned}
        self.revoked: set[TopicPartition] = set()
        self.paused: set[TopicPartition] = set()
        self.positions: dict[TopicPartition, int | None] = {}

    def assignment(self) -> set[TopicPartition]:
        return set(self.assigned)

    def pause(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            if partition in self.revoked:
                raise KeyError(partition)
            self.paused.add(partition)

    def resume(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            if partition in self.revoked:
                raise KeyError(partition)
            self.paused.discard(partition)

    def highwater(self, partition: TopicPartition) -> int | None:
        if partition in self.revoked:
            raise IllegalStateError("Partition is not assigned")
        return 9 if partition in self.positions else None

    @property
    def _subscription(self) -> SimpleNamespace:
        def state(offset: int | None) -> SimpleNamespace:
            return SimpleNamespace(
                position=None if offset is None else OffsetAndMetadata(offset, "", -1)
            )

        return SimpleNamespace(assignment={tp: state(at) for tp, at in self.positions.items()})


A, B, C = (JOBS_TOPIC, 0), (JOBS_TOPIC, 1), (BATCH_TOPIC, 0)


def test_what_has_no_room_is_paused_and_resumed():
    consumer, pauses = FakeConsumer([A, B]), Pauses()
    pauses.apply(consumer, [A])
    assert consumer.paused == {TopicPartition(*A)}
    assert pauses.held_back == {TopicPartition(*A)}
    pauses.apply(consumer, [])
    assert not consumer.paused


def test_a_partition_given_anew_is_paused_anew():
    consumer, pauses = FakeConsumer([A]), Pauses()
    pauses.apply(consumer, [A])
    consumer.paused.clear()
    pauses.forget([A])
    pauses.apply(consumer, [A])
    assert consumer.paused == {TopicPartition(*A)}


def test_a_partition_taken_away_meanwhile_keeps_no_other_from_its_pause():
    consumer, pauses = FakeConsumer([A, B]), Pauses()
    consumer.revoked = {TopicPartition(*A)}
    pauses.apply(consumer, [A, B])
    assert consumer.paused == {TopicPartition(*B)}
    pauses.apply(consumer, [])
    assert not consumer.paused


def test_a_report_leaves_out_what_is_not_known():
    consumer, offsets = FakeConsumer([A, B, C]), Offsets()
    offsets.assign([A, B, C, (JOBS_TOPIC, 2)])
    consumer.revoked = {TopicPartition(*B)}
    consumer.positions = {TopicPartition(*A): 7, TopicPartition(JOBS_TOPIC, 2): None}
    assert list(report_partitions(consumer, offsets, {TopicPartition(*A)}, {})) == [
        PartitionStatus(*C, committed=0, position=0, high_water=-1),
        PartitionStatus(*A, committed=7, position=7, high_water=9, paused=True),
    ]


def test_the_position_is_before_what_was_fetched_and_not_handed_on():
    consumer, offsets = FakeConsumer([A]), Offsets()
    offsets.assign([A])
    for offset in range(5):
        offsets.take(A, offset)
    consumer.positions = {TopicPartition(*A): 5}
    (status,) = report_partitions(consumer, offsets, (), {A: 3})
    assert (status.committed, status.position, status.high_water) == (0, 3, 9)


def test_a_partition_that_ends_before_the_position_is_a_new_one():
    consumer, offsets = FakeConsumer([A, B, C]), Offsets()
    offsets.assign([A, B, C])
    consumer.revoked = {TopicPartition(*B)}
    consumer.positions = {TopicPartition(*A): 9, TopicPartition(*C): 10}
    assert beyond_end(consumer, offsets) == [C]
