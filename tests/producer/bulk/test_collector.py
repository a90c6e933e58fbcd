"""The collector where the disk is full: what it writes again, and what it says."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import TopicPartition

from openlora.protocol.bulk import BulkAnswer, BulkAnswers, BulkGroup
from openlora.protocol.codec import encode
from producer.bulk import collector
from producer.bulk.collector import Collector
from producer.bulk.results import write_segment
from tests.producer.bulk.stepwise import Producer, lines

pytestmark = pytest.mark.services


class Consumer:
    """Notes what is committed."""

    def __init__(self) -> None:
        self.committed: dict[TopicPartition, Any] = {}

    def commit(self, offsets: dict[TopicPartition, Any]) -> None:
        self.committed |= offsets


def answers_to(batch_id: str, line: int, timestamp: int) -> Any:
    answer = BulkAnswer(line, f"c{line}", "hello", "stop", 2, 3)
    bundle = BulkAnswers(batch_id, "hash", BulkGroup("chat", "m"), (answer,))
    return SimpleNamespace(offset=line, timestamp=timestamp, value=encode(bundle))


def test_a_full_disk_is_waited_out_without_filling_it_further(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches in two partitions; the last segment of four finds no room, three times."""
    first, second = producer.submit(lines(9)), producer.submit(lines(9))
    producer.run()
    problems: list[str] = []
    attempts = 0

    def write(folder: Any, name: str, results: Any) -> None:
        nonlocal attempts
        if second in str(folder) and name.startswith("answers-001"):
            attempts += 1
            if attempts <= 3:
                problems.append(producer.states.get(second).problem)
                raise OSError(errno.ENOSPC, "No space left on device")
        write_segment(folder, name, results)

    seconds = iter(range(1_000_000, 2_000_000, 7))
    monkeypatch.setattr(collector, "write_segment", write)
    monkeypatch.setattr(collector, "_RETRY_S", 0.0)
    monkeypatch.setattr(collector.time, "time", lambda: next(seconds))
    consumer, one = Consumer(), Collector("", producer.states, producer.store)
    partitions = [TopicPartition("openlora.results", number) for number in (0, 1)]
    for number, partition in enumerate(partitions):
        place = 1 + 2 * number
        one._hold(
            {
                partition: [
                    answers_to(first, place, 5000),
                    answers_to(second, place, 6000),
                    answers_to(first, place + 1, 7000),
                    answers_to(second, place + 1, -1),
                ]
            }
        )
    one._flush(consumer, threading.Event())
    assert attempts == 4
    assert "No space left" in problems[-1]
    assert producer.states.get(second).problem == ""
    for batch_id in (first, second):
        segments = list(producer.store.folder(batch_id).segments.iterdir())
        assert len(segments) == 2, segments
        assert producer.states.get(batch_id).done == 4
    assert {partition: offset.offset for partition, offset in consumer.committed.items()} == {
        partitions[0]: 3,
        partitions[1]: 5,
    }
    assert b'"created":5,' in next(
        path.read_bytes()
        for path in producer.store.folder(first).segments.iterdir()
        if path.name.startswith("answers-000")
    )
