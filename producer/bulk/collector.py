"""The collector: answers from the results topic into segments, durably, before it commits.

One flush takes what came since the last one. What is written twice because the process died
between write and commit is told apart by line later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from openlora.errors import InvalidRequest, Overloaded, SetupError
from openlora.protocol.bulk import (
    COLLECTOR_GROUP,
    RESULTS_TOPIC,
    BulkAnswers,
    decode_bulk_answers,
)
from producer.bulk.files import FileStore
from producer.bulk.results import Result, answered, write_segment
from producer.bulk.state import BatchStates, Mark

FLUSH_S = 0.5
"""From one flush to the next at least: each writes a file and syncs it."""
FLUSH_BYTES = 16 << 20
POLL_MS = 250
"""What a fetch waits for answers; going through an empty one takes 2 ms of a core."""
_RETRY_S = 1.0
_CONNECT_TIMEOUT_MS = 10_000

logger = logging.getLogger("producer.collector")


@dataclass(slots=True)
class _Batch:
    """What came for one batch from one partition."""

    results: list[Result] = field(default_factory=list)
    marks: dict[str, list[Mark]] = field(default_factory=dict)

    def take(self, bundle: BulkAnswers, created_s: int) -> None:
        self.results += answered(bundle, created_s)
        adapter = bundle.group.adapters[0].id if bundle.group.adapters else ""
        self.marks.setdefault(adapter, []).extend(
            Mark(a.line, a.prompt_tokens, a.completion_tokens, a.failure is not None)
            for a in bundle.answers
        )


class Collector:
    """One consumer of the collectors' group. ``run`` belongs to one thread."""

    def __init__(self, bootstrap_servers: str, states: BatchStates, store: FileStore) -> None:
        self._servers = bootstrap_servers
        self._states = states
        self._store = store
        self._pending: dict[TopicPartition, list[Any]] = {}
        self._bytes = 0
        self._flushed_at = 0.0
        self._held_up: set[str] = set()

    def run(self, stopping: threading.Event) -> None:
        """Collect until ``stopping`` is set; what came until then is written.

        Raises:
            SetupError: no broker answers.
        """
        consumer = self._connect()
        try:
            while not stopping.is_set():
                try:
                    records = consumer.poll(POLL_MS)
                except KafkaError as error:
                    logger.warning("event=poll_failed error=%r next=retry", error)
                    stopping.wait(_RETRY_S)
                    continue
                self._hold(records)
                if self._is_due():
                    self._flush(consumer, stopping)
            if self._pending:
                self._flush(consumer, stopping)
        finally:
            consumer.close(autocommit=False)

    def _connect(self) -> Any:
        try:
            consumer = KafkaConsumer(
                bootstrap_servers=self._servers.split(","),
                client_id="openlora-collector",
                group_id=COLLECTOR_GROUP,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=POLL_MS,
                fetch_max_bytes=FLUSH_BYTES,
                session_timeout_ms=6000,
                heartbeat_interval_ms=1000,
                metadata_max_age_ms=10_000,
                reconnect_backoff_max_ms=1000,
                bootstrap_timeout_ms=_CONNECT_TIMEOUT_MS,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        except (KafkaError, OSError, ValueError) as error:
            raise SetupError(f"no Kafka broker answers at {self._servers}: {error}") from error
        consumer.subscribe(topics=[RESULTS_TOPIC])
        return consumer

    def _hold(self, records: dict[TopicPartition, list[Any]]) -> None:
        for partition, messages in records.items():
            self._pending.setdefault(partition, []).extend(messages)
            self._bytes += sum(len(message.value or b"") for message in messages)

    def _is_due(self) -> bool:
        if not self._pending:
            return False
        return self._bytes >= FLUSH_BYTES or time.monotonic() - self._flushed_at >= FLUSH_S

    def _flush(self, consumer: Any, stopping: threading.Event) -> None:
        """Write, mark, commit, in this order; Redis or the disk being away is waited out."""
        while True:
            try:
                for partition, messages in self._pending.items():
                    self._write(partition.partition, messages)
                break
            except (Overloaded, OSError) as error:
                logger.warning("event=not_written error=%r next=retry", error)
                if stopping.wait(_RETRY_S):
                    return  # not committed: it comes again
        offsets = {
            partition: OffsetAndMetadata(messages[-1].offset + 1, "", -1)
            for partition, messages in self._pending.items()
        }
        self._pending, self._bytes, self._flushed_at = {}, 0, time.monotonic()
        for batch_id in self._held_up:
            self._tell(batch_id, "")
        self._held_up.clear()
        try:
            consumer.commit(offsets)
        except KafkaError as error:
            # Another collector has the partition now, or the broker is new: written twice is fine.
            logger.info("event=commit_failed error=%r next=collected_again", error)

    def _write(self, partition: int, messages: Sequence[Any]) -> None:
        batches: dict[str, _Batch] = {}
        for message in messages:
            try:
                bundle = decode_bulk_answers(message.value or b"")
            except InvalidRequest as error:
                logger.warning("event=no_answers offset=%d error=%r", message.offset, error.message)
                continue
            # The message's time, not ours: written again, a segment is the same and has its name.
            created_s = max(0, message.timestamp or 0) // 1000
            batches.setdefault(bundle.batch_id, _Batch()).take(bundle, created_s)
        name = f"answers-{partition:03d}-{messages[0].offset:012d}-{messages[-1].offset:012d}"
        for batch_id, batch in batches.items():
            state = self._states.get(batch_id)
            if state is None or state.phase not in ("running", "closing"):
                continue  # nobody waits for them any more
            folder = self._store.folder(batch_id)
            try:
                write_segment(folder.segments, name, batch.results)
            except OSError as error:
                self._held_up.add(batch_id)
                self._tell(batch_id, f"answers cannot be written: {error}")
                raise
            for adapter, marks in batch.marks.items():
                if self._states.mark(batch_id, marks, source="worker", adapter=adapter) < 0:
                    folder.remove_working_files()  # it has ended meanwhile
                    break

    def _tell(self, batch_id: str, problem: str) -> None:
        with suppress(Overloaded):  # it is told again, or the batch's next step takes it away
            self._states.report_problem(batch_id, problem)
