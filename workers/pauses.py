"""Which partitions are paused right now, and why."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kafka.structs import TopicPartition

from openlora.protocol.names import BATCH_TOPIC
from workers.offsets import Partition

BATCH_EVERY = 8
"""Polls from one look at the batch topic to the next while it is empty: most of what a fetch costs
here is to go through its partitions, and nobody watches for a batch job's first token."""


class Pauses:
    """Pauses and resumes on the consumer; used by the consumer's thread alone.

    Attributes:
        held_back: paused for want of room, as opposed to not looked at in this poll.
    """

    def __init__(self) -> None:
        self.held_back: set[TopicPartition] = set()
        self._paused: set[TopicPartition] = set()
        self._polls = 0

    def forget(self, partitions: Iterable[Partition]) -> None:
        """These were given or taken by Kafka: it pauses none of them."""
        self._paused.difference_update(TopicPartition(*partition) for partition in partitions)

    def apply(
        self,
        consumer: Any,
        owned: Iterable[Partition],
        held_back: Iterable[Partition],
        *,
        batch_flows: bool,
        is_idle: bool = False,
    ) -> None:
        """Before each poll.

        ``batch_flows``: the last poll brought batch jobs, so look again. ``is_idle``: polls are
        rare, or there is word of new messages: look at everything.
        """
        self.held_back = {TopicPartition(*partition) for partition in held_back}
        wanted = set(self.held_back)
        self._polls += 1
        if not (batch_flows or is_idle) and self._polls % BATCH_EVERY:
            wanted |= {TopicPartition(*p) for p in owned if p[0] == BATCH_TOPIC}
        if wanted == self._paused:
            return
        assignment = consumer.assignment()
        for partition in (wanted - self._paused) & assignment:
            with suppress(KeyError):  # kafka-python's own thread took it away just now
                consumer.pause(partition)
        for partition in (self._paused - wanted) & assignment:
            with suppress(KeyError):
                consumer.resume(partition)
        self._paused = wanted
