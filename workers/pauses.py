"""Which partitions are paused right now: those for whose jobs there is no room."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kafka.structs import TopicPartition

from workers.offsets import Partition


class Pauses:
    """Pauses and resumes on the consumer; used by the consumer's thread alone.

    Attributes:
        held_back: paused partitions.
    """

    def __init__(self) -> None:
        self.held_back: set[TopicPartition] = set()

    def forget(self, partitions: Iterable[Partition]) -> None:
        """These were given or taken by Kafka: it pauses none of them."""
        self.held_back.difference_update(TopicPartition(*partition) for partition in partitions)

    def apply(self, consumer: Any, held_back: Iterable[Partition]) -> None:
        """Before each poll: pause these and no others."""
        wanted = {TopicPartition(*partition) for partition in held_back}
        if wanted == self.held_back:
            return
        assignment = consumer.assignment()
        for partition in (wanted - self.held_back) & assignment:
            with suppress(KeyError):  # kafka-python's own thread took it away just now
                consumer.pause(partition)
        for partition in (self.held_back - wanted) & assignment:
            with suppress(KeyError):
                consumer.resume(partition)
        self.held_back = wanted
