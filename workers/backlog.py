"""What was fetched and waits for room, and how much room there is. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from openlora.protocol.names import BATCH_TOPIC, JOB_TOPICS, JOBS_TOPIC
from workers.budgets import Budgets
from workers.offsets import Partition, Position


@dataclass(frozen=True, slots=True)
class Fetched:
    """One message of a job topic."""

    position: Position
    key: bytes | None
    value: bytes


class Backlog:
    """Messages in the order of each topic, handed on as the budgets allow; interactive first.

    What exceeds the budgets waits here and not in kafka-python: records that it holds itself for a
    paused partition may never come out again after the resume (3.0.12 puts them back only if its
    slot for the next partition is None, and it often is an empty one).
    """

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._waiting: dict[str, deque[Fetched]] = {topic: deque() for topic in JOB_TOPICS}
        self._held = dict.fromkeys(JOB_TOPICS, 0)

    def add(self, fetched: Fetched) -> None:
        """One more message waits."""
        self._waiting[fetched.position.partition[0]].append(fetched)

    def take(self, owns: Callable[[Position], bool]) -> list[Fetched]:
        """What there is room for now; messages of partitions that are no longer ours are dropped.

        What is taken counts as held until ``free``.
        """
        batch = []
        for topic in JOB_TOPICS:
            waiting = self._waiting[topic]
            while waiting and topic not in self._full():
                fetched = waiting.popleft()
                if owns(fetched.position):
                    self._held[topic] += 1
                    batch.append(fetched)
        return batch

    def free(self, topic: str) -> None:
        """A held message of ``topic`` needs nothing more."""
        self._held[topic] -= 1

    def full_topics(self) -> frozenset[str]:
        """Topics to fetch nothing from: no room, or a message of theirs waits already."""
        return self._full() | {topic for topic, rest in self._waiting.items() if rest}

    def first_offsets(self) -> dict[Partition, int]:
        """Per partition, the offset of the first message that waits here."""
        return {
            fetched.position.partition: fetched.position.offset
            for waiting in self._waiting.values()
            for fetched in reversed(waiting)
        }

    def _full(self) -> frozenset[str]:
        return self._budgets.full_topics(self._held[JOBS_TOPIC], self._held[BATCH_TOPIC])
