"""What Kafka gives and takes, handed from kafka-python's I/O thread to the consumer's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.structs import TopicPartition

from workers.offsets import Partition


@dataclass(frozen=True, slots=True)
class Assigned:
    """These are ours from now on, on top of what we have."""

    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class Revoked:
    """These are no longer ours; ``lost``: because our membership ended without us."""

    partitions: tuple[Partition, ...]
    lost: bool


class Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]
    """Events of the group in order.

    kafka-python calls its listener in its own I/O thread, at any time, also between two polls; the
    offsets belong to the consumer's thread, so events wait here until that thread takes them.
    """

    def __init__(self) -> None:
        self._events: deque[Assigned | Revoked] = deque()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Called by kafka-python."""
        self._events.append(Assigned(_names(assigned)))

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Called by kafka-python."""
        self._events.append(Revoked(_names(revoked), lost=False))

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """Called by kafka-python."""
        self._events.append(Revoked(_names(lost), lost=True))

    def take(self) -> list[Assigned | Revoked]:
        """All events since the last call, oldest first."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


def _names(partitions: Iterable[TopicPartition]) -> tuple[Partition, ...]:
    return tuple(sorted((p.topic, p.partition) for p in partitions))
