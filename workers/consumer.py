"""The Kafka consumer of a worker, in a thread of its own that never does anything else.

It polls whatever the engine or Redis are doing, so it never misses its poll interval; when there
is no room for more jobs it pauses partitions instead of waiting. All offsets live here: the loop
says which jobs have ended, this thread commits behind them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.errors import (
    AuthorizationError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from openlora.errors import SetupError
from openlora.protocol.names import BATCH_TOPIC, JOB_TOPICS, JOBS_TOPIC, WORKER_GROUP
from openlora.protocol.status import PartitionStatus
from workers.assignor import SamePartitionsAssignor
from workers.budgets import Budgets
from workers.offsets import SPAN_LIMIT, Offsets, Partition, Position

SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_INTERVAL_MS = 1_000
FETCH_MAX_WAIT_MS = 20
"""The embedded broker does not wake a waiting fetch, so this is what a job waits there at most."""
POLL_TIMEOUT_MS = 25
MAX_FETCHED = 128
"""Most messages taken at once, so that a backlog does not hold up the ends of running jobs."""
COMMIT_INTERVAL_S = 0.1
STATUS_INTERVAL_S = 0.5
ERROR_PAUSE_S = 0.5
LEAVE_TIMEOUT_MS = 3_000

logger = logging.getLogger("workers.consumer")


@dataclass(frozen=True, slots=True)
class Fetched:
    """One message of a job topic."""

    position: Position
    key: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True)
class _Ended:
    position: Position
    job_id: str | None


class JobConsumer:
    """Fetches jobs, hands them to ``deliver``, commits behind those that have ended.

    Args:
        bootstrap_servers: host:port[,host:port…].
        deliver: takes a batch of messages; called in the consumer's thread, must not block.
        retire: takes the IDs of jobs whose offsets were committed; likewise.
        on_failure: called once if the thread cannot go on, with the reason.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        client_id: str,
        budgets: Budgets,
        *,
        deliver: Callable[[list[Fetched]], None],
        retire: Callable[[list[str]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.status: tuple[PartitionStatus, ...] = ()  # written here, read by the loop's heartbeat
        self._servers = bootstrap_servers
        self._client_id = client_id
        self._budgets = budgets
        self._deliver = deliver
        self._retire = retire
        self._on_failure = on_failure
        self._assignor = SamePartitionsAssignor()
        self._offsets = Offsets()
        self._ended: deque[_Ended] = deque()  # appended by the loop, drained here
        self._committing: list[_Ended] = []
        self._held = dict.fromkeys(JOB_TOPICS, 0)
        self._paused: set[TopicPartition] = set()
        self._stopping = threading.Event()
        self._commit_due = 0.0
        self._commit_in_flight = False
        self._status_due = 0.0
        self._consumer: Any = None
        self._thread = threading.Thread(target=self._run, name="kafka-consumer", daemon=True)

    def connect(self, timeout_ms: int) -> None:
        """Reach the broker. Raises SetupError when it does not answer in ``timeout_ms``."""
        try:
            self._consumer = KafkaConsumer(
                bootstrap_servers=self._servers.split(","),
                client_id=self._client_id,
                group_id=WORKER_GROUP,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
                session_timeout_ms=SESSION_TIMEOUT_MS,
                heartbeat_interval_ms=HEARTBEAT_INTERVAL_MS,
                partition_assignment_strategy=[self._assignor],
                bootstrap_timeout_ms=timeout_ms,
                allow_auto_create_topics=False,
                metadata_max_age_ms=10_000,
                reconnect_backoff_max_ms=1_000,
                metrics_enabled=False,
            )
        except (KafkaConnectionError, KafkaTimeoutError) as error:
            raise SetupError(
                f"no Kafka broker answers at {self._servers} ({error}); "
                "start one or set --kafka / OPENLORA_KAFKA"
            ) from error
        listener = _Listener(self)
        self._consumer.subscribe(topics=JOB_TOPICS, listener=listener)

    def start(self) -> None:
        """Join the group and begin to fetch."""
        self._thread.start()

    def end(self, position: Position, job_id: str | None) -> None:
        """The job at ``position`` has ended or moved on; call once per message. Thread-safe.

        ``job_id`` is given where its log may be retired once the offset is committed.
        """
        self._ended.append(_Ended(position, job_id))

    def owns(self, position: Position) -> bool:
        """Whether the message's partition is still ours, as of the last rebalance. Thread-safe."""
        return self._offsets.owns(position)

    def begin_leave(self) -> None:
        """Fetch no more, commit what has ended, leave the group, end the thread. Does not wait."""
        self._stopping.set()

    def wait_left(self, timeout_s: float) -> bool:
        """Wait until the group is left; False if that took longer than ``timeout_s``."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._poll_once()
        except AuthorizationError as error:
            self._on_failure(f"Kafka refuses this worker: {error}")
        except Exception as error:
            logger.exception("event=consumer_failed next=worker_ends")
            self._on_failure(f"the Kafka consumer failed: {error}")
        finally:
            self._close()

    def _poll_once(self) -> None:
        self._take_ended()
        self._apply_pauses()
        now = time.monotonic()
        if now >= self._commit_due:
            self._commit(now)
        if now >= self._status_due:
            self._status_due = now + STATUS_INTERVAL_S
            self.status = tuple(self._statuses())
        room = self._budgets.room(self._held[JOBS_TOPIC], self._held[BATCH_TOPIC])
        try:
            records = self._consumer.poll(POLL_TIMEOUT_MS, max_records=min(room, MAX_FETCHED))
        except AuthorizationError:
            raise
        except KafkaError as error:
            logger.warning("event=poll_failed error=%r next=retry", error)
            self._stopping.wait(ERROR_PAUSE_S)
            return
        if records:
            self._deliver(self._take(records))

    def _take(self, records: dict[TopicPartition, Sequence[Any]]) -> list[Fetched]:
        fetched = []
        for partition, messages in records.items():
            for message in messages:
                position = self._offsets.take(
                    (partition.topic, partition.partition), message.offset
                )
                if position is not None:
                    self._held[partition.topic] += 1
                    fetched.append(Fetched(position, message.key, message.value or b""))
        return fetched

    def _take_ended(self) -> None:
        while self._ended:
            ended = self._ended.popleft()
            self._held[ended.position.partition[0]] -= 1
            if ended.job_id is not None and self._offsets.owns(ended.position):
                self._committing.append(ended)
            self._offsets.end(ended.position)

    def _apply_pauses(self) -> None:
        topics = self._budgets.paused_topics(self._held[JOBS_TOPIC], self._held[BATCH_TOPIC])
        wanted = {
            TopicPartition(*partition)
            for partition in self._offsets.partitions()
            if partition[0] in topics or self._offsets.span(partition) >= SPAN_LIMIT
        }
        if wanted == self._paused:
            return
        pause, resume = wanted - self._paused, self._paused - wanted
        self._consumer.pause(*pause)
        self._consumer.resume(*(p for p in resume if (p.topic, p.partition) in self._owned()))
        self._paused = wanted

    def _owned(self) -> frozenset[Partition]:
        return frozenset(self._offsets.partitions())

    def _commit(self, now: float) -> None:
        self._commit_due = now + COMMIT_INTERVAL_S
        pending = self._offsets.to_commit()
        if pending and not self._commit_in_flight:
            self._commit_in_flight = True
            self._consumer.commit_async(_kafka_offsets(pending), callback=self._on_commit)

    def _on_commit(self, offsets: dict[TopicPartition, Any], answer: object) -> None:
        self._commit_in_flight = False
        if isinstance(answer, Exception):
            logger.info("event=commit_failed error=%r next=retry", answer)
            return
        taken = {(tp.topic, tp.partition): offset.offset for tp, offset in offsets.items()}
        self._offsets.committed(taken)
        self._retire_behind(taken)

    def _retire_behind(self, taken: dict[Partition, int]) -> None:
        retired: list[_Ended] = []
        waiting: list[_Ended] = []
        for ended in self._committing:
            if not self._offsets.owns(ended.position):
                continue
            behind = ended.position.offset < taken.get(ended.position.partition, -1)
            (retired if behind else waiting).append(ended)
        self._committing = waiting
        if retired:
            self._retire([ended.job_id for ended in retired if ended.job_id is not None])

    def _statuses(self) -> Iterable[PartitionStatus]:
        for partition in sorted(self._offsets.partitions()):
            kafka_partition = TopicPartition(*partition)
            if kafka_partition not in self._consumer.assignment():
                continue
            high_water = self._consumer.highwater(kafka_partition)
            if high_water is None:  # not fetched from yet, so the position may be unknown too
                yield PartitionStatus(*partition, committed=0, position=0, high_water=-1)
                continue
            position = self._consumer.position(kafka_partition)
            committed = self._offsets.committed_offset(partition)
            if committed is None:
                committed = self._offsets.first_open(partition)
            yield PartitionStatus(
                topic=partition[0],
                partition=partition[1],
                committed=position if committed is None else committed,
                position=position,
                high_water=max(high_water, position),
                paused=kafka_partition in self._paused,
            )

    def on_assigned(self, partitions: Iterable[TopicPartition]) -> None:
        """Kafka gave us these (on top of what we have)."""
        names = sorted((p.topic, p.partition) for p in partitions)
        self._offsets.assign(names)
        self._paused.difference_update(TopicPartition(*name) for name in names)
        logger.info("event=partitions_assigned partitions=%s next=fetch", names)

    def on_revoked(self, partitions: Iterable[TopicPartition], *, lost: bool) -> None:
        """Kafka took these away. Their running jobs go on until the new owner's claim fences them.

        Nothing is committed here: what ended a moment ago is skipped by the new owner's claim.
        """
        names = sorted((p.topic, p.partition) for p in partitions)
        self._offsets.revoke(names)
        self._paused.difference_update(TopicPartition(*name) for name in names)
        if lost:
            self._assignor.forget()
        logger.info("event=partitions_revoked lost=%s partitions=%s next=run_on", lost, names)

    def _close(self) -> None:
        self._take_ended()
        pending = self._offsets.to_commit()
        try:
            if pending:
                self._consumer.commit(_kafka_offsets(pending), timeout_ms=LEAVE_TIMEOUT_MS)
        except KafkaError as error:
            logger.info("event=last_commit_failed error=%r next=claims_skip_ended_jobs", error)
        self.status = ()
        try:
            self._consumer.close(autocommit=False, timeout_ms=LEAVE_TIMEOUT_MS)
        except KafkaError as error:
            logger.info("event=leave_failed error=%r next=session_timeout", error)
        logger.info("event=left_group")


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, consumer: JobConsumer) -> None:
        self._consumer = consumer

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._consumer.on_assigned(assigned)

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._consumer.on_revoked(revoked, lost=False)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._consumer.on_revoked(lost, lost=True)


def _kafka_offsets(offsets: dict[Partition, int]) -> dict[TopicPartition, Any]:
    return {
        TopicPartition(*partition): OffsetAndMetadata(offset, "", -1)
        for partition, offset in offsets.items()
    }
