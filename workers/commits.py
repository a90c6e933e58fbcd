"""Commits behind jobs that have ended, one under way at a time; used by the consumer's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kafka.structs import OffsetAndMetadata, TopicPartition

from workers.offsets import Offsets, Partition, Position

INTERVAL_S = 0.1
ANSWER_S = 5.0
"""A commit that was not answered in this time counts as lost."""

logger = logging.getLogger("workers.commits")


class Commits:
    """``retire``: takes the IDs of jobs whose offsets were committed; must not block."""

    def __init__(self, offsets: Offsets, retire: Callable[[list[str]], None]) -> None:
        self._offsets = offsets
        self._retire = retire
        self._waiting: list[tuple[Position, str]] = []
        self._due = 0.0
        self._answer_due = 0.0  # until then one commit is under way

    def await_retirement(self, position: Position, job_id: str) -> None:
        """The job has ended: retire it once its offset is committed."""
        if self._offsets.owns(position):
            self._waiting.append((position, job_id))

    def commit_if_due(self, consumer: Any, now: float) -> None:
        """Begin a commit where there is something to commit."""
        if now < self._due:
            return
        self._due = now + INTERVAL_S
        pending = self._offsets.to_commit()
        if pending and now >= self._answer_due:
            self._answer_due = now + ANSWER_S
            consumer.commit_async(kafka_offsets(pending), callback=self._on_answer)

    def _on_answer(self, offsets: dict[TopicPartition, Any], answer: object) -> None:
        self._answer_due = 0.0
        if isinstance(answer, Exception):
            logger.info("event=commit_failed error=%r next=retry", answer)
            return
        taken = {(tp.topic, tp.partition): offset.offset for tp, offset in offsets.items()}
        self._offsets.committed(taken)
        self._retire_behind(taken)

    def _retire_behind(self, taken: dict[Partition, int]) -> None:
        retired: list[str] = []
        waiting: list[tuple[Position, str]] = []
        for position, job_id in self._waiting:
            if not self._offsets.owns(position):
                continue
            if position.offset < taken.get(position.partition, -1):
                retired.append(job_id)
            else:
                waiting.append((position, job_id))
        self._waiting = waiting
        if retired:
            self._retire(retired)


def kafka_offsets(offsets: dict[Partition, int]) -> dict[TopicPartition, Any]:
    """As kafka-python wants them."""
    return {
        TopicPartition(*partition): OffsetAndMetadata(offset, "", -1)
        for partition, offset in offsets.items()
    }
