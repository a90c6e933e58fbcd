"""The Kafka consumer of a worker, in a thread of its own that never does anything else.

It polls whatever the engine or Redis are doing, so it never misses its poll interval; when there
is no room for more jobs it pauses partitions instead of waiting. All offsets live here: the loop
says which jobs have ended, this thread commits behind them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kafka.errors import AuthorizationError, KafkaError
from kafka.structs import TopicPartition

from openlora.errors import SetupError
from openlora.protocol.names import JOB_TOPICS, JOBS_TOPIC
from openlora.protocol.status import PartitionStatus
from workers.assignor import SamePartitionsAssignor
from workers.attention import Attention
from workers.backlog import Backlog, Fetched
from workers.budgets import Budgets
from workers.commits import Commits, kafka_offsets
from workers.fetches import Fetches, Records
from workers.group_repair import rebuild_group
from workers.join_watch import JoinWatch
from workers.kafka_client import connect_consumer
from workers.offsets import SPAN_LIMIT, Offsets, Partition, Position
from workers.partition_report import beyond_end, report_partitions
from workers.pauses import Pauses
from workers.rebalance import Assigned, Rebalances

POLL_TIMEOUT_S = 0.1
BRIEF_POLL_S = 0.025
"""The same where messages wait for room, which jobs that end make without a word; where polls are
rare; and while the group has not answered."""
STATUS_INTERVAL_S = 0.5
ERROR_PAUSE_S = 0.5
LEAVE_TIMEOUT_MS = 3_000
CONNECT_TIMEOUT_MS = 3_000
FINISH_JOIN_S = 4.0

logger = logging.getLogger("workers.consumer")


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

    Attributes:
        status: the owned partitions, half a second old at most.
        joined: whether this worker is a member of the group, with partitions or without.
        attention: how often it looks for messages.
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
        # written here, read by the loop's heartbeat
        self.status: tuple[PartitionStatus, ...] = ()
        self.joined = False
        self.attention = Attention()
        self._servers = bootstrap_servers
        self._client_id = client_id
        self._deliver = deliver
        self._on_failure = on_failure
        self._assignor = SamePartitionsAssignor()
        self._rebalances = Rebalances()
        self._offsets = Offsets()
        self._ended: deque[_Ended] = deque()  # appended by the loop, drained here
        self._commits = Commits(self._offsets, retire)
        self._backlog = Backlog(budgets)
        self._pauses = Pauses()
        self._join_watch = JoinWatch(random.Random())
        self._stopping = threading.Event()
        self._wake_at_ended = max(1, budgets.batch // 4)
        self._status_due = 0.0
        self._consumer: Any = None
        self._fetches: Fetches  # set by ``connect``, as the consumer is
        self._thread = threading.Thread(target=self._run, name="kafka-consumer", daemon=True)

    def connect(self, timeout_ms: int) -> None:
        """Reach the broker. Raises SetupError when it does not answer in ``timeout_ms``."""
        self._consumer = connect_consumer(
            self._servers, self._client_id, self._assignor, timeout_ms
        )
        self._consumer.subscribe(topics=JOB_TOPICS, listener=self._rebalances)
        self._fetches = Fetches(self._consumer, self._client_id, self.attention)

    def partition_count(self) -> int:
        """Partitions of the interactive topic; before ``start``. 0 while nobody has made it."""
        return len(self._consumer.partitions_for_topic(JOBS_TOPIC) or ())

    def start(self) -> None:
        """Join the group and begin to fetch."""
        self._thread.start()

    def end(self, position: Position, job_id: str | None) -> None:
        """The job at ``position`` has ended or moved on; call once per message. Thread-safe.

        ``job_id`` is given where its log may be retired once the offset is committed.
        """
        self._ended.append(_Ended(position, job_id))
        if len(self._ended) >= self._wake_at_ended:
            self.attention.wake()  # there is room for many bundles

    def owns(self, position: Position) -> bool:
        """Whether the message's partition is still ours, as of the last rebalance. Thread-safe."""
        return self._offsets.owns(position)

    def begin_leave(self) -> None:
        """Fetch no more, commit what has ended, leave the group, end the thread. Does not wait."""
        self._stopping.set()
        self.attention.wake()

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
        self._apply_rebalances()
        self._take_ended()
        self._deliver_backlog()
        now = time.monotonic()
        is_member = self._assignor.joined and not self._assignor.joining
        is_quiet = is_member and self.attention.is_quiet
        if self._join_watch.is_stuck(joined=self._assignor.joined, now=now):
            self._join_anew()
            return
        held_back = self._held_back()
        is_brief = is_quiet or not is_member or bool(held_back) or self._backlog.waits
        try:
            self._pauses.apply(self._consumer, held_back)
            if is_member:  # others are refused
                self._commits.commit_if_due(self._consumer, now)
            if now >= self._status_due:
                self._status_due = now + STATUS_INTERVAL_S
                self._report()
            timeout_s = BRIEF_POLL_S if is_brief else POLL_TIMEOUT_S
            records = self._fetches.poll(timeout_s, is_member=is_member, look_at_all=is_quiet)
        except AuthorizationError:
            raise
        except KafkaError as error:
            logger.warning("event=poll_failed error=%r next=retry", error)
            self._stopping.wait(ERROR_PAUSE_S)
            return
        if records:
            self._take(records)
        if any(partition.topic == JOBS_TOPIC for partition in records):
            self.attention.took_job()
        elif is_quiet:
            self.attention.rest(batch_flows=bool(records))

    def _join_anew(self) -> None:
        logger.warning("event=join_stuck next=leave_and_join_anew")
        self._assignor.forget()
        self._offsets.revoke(self._offsets.partitions())
        self._fetches.close()
        try:
            self._consumer.close(autocommit=False, timeout_ms=LEAVE_TIMEOUT_MS)
        except KafkaError as error:
            logger.info("event=leave_failed error=%r next=session_timeout", error)
        rebuild_group(self._servers)
        self._stopping.wait(self._join_watch.pause_s())
        while not self._stopping.is_set():
            try:
                self.connect(CONNECT_TIMEOUT_MS)
            except SetupError as error:
                logger.warning("event=broker_away error=%r next=retry", error.message)
            else:
                return

    def _report(self) -> None:
        held_back, undelivered = self._pauses.held_back, self._backlog.first_offsets()
        self.status = tuple(
            report_partitions(self._consumer, self._offsets, held_back, undelivered)
        )
        self.joined = self._assignor.joined
        for partition in beyond_end(self._consumer, self._offsets):
            logger.warning("event=topic_is_new partition=%s next=read_from_start", partition)
            self._consumer.seek_to_beginning(TopicPartition(*partition))

    def _take(self, records: Records) -> None:
        self._apply_rebalances()  # what was assigned during this poll may have been fetched in it
        for partition, messages in records.items():
            for message in messages:
                position = self._offsets.take(
                    (partition.topic, partition.partition), message.offset
                )
                if position is not None:
                    self._backlog.add(Fetched(position, message.key, message.value or b""))
        self._deliver_backlog()

    def _deliver_backlog(self) -> None:
        batch = self._backlog.take(self._offsets.owns)
        if batch:
            self._deliver(batch)

    def _take_ended(self) -> None:
        while self._ended:
            ended = self._ended.popleft()
            self._backlog.free(ended.position.partition[0])
            if ended.job_id is not None:
                self._commits.await_retirement(ended.position, ended.job_id)
            self._offsets.end(ended.position)

    def _held_back(self) -> list[Partition]:
        """Partitions for whose jobs there is no room now."""
        topics = self._backlog.full_topics()
        return [
            partition
            for partition in self._offsets.partitions()
            if partition[0] in topics or self._offsets.span(partition) >= SPAN_LIMIT
        ]

    def _finish_join(self) -> None:
        """A member that leaves while it joins stays in the embedded broker's group for ever, and
        keeps all others out: wait for the answer. What is fetched meanwhile is left to others."""
        deadline = time.monotonic() + FINISH_JOIN_S
        try:
            while self._assignor.joining and time.monotonic() < deadline:
                self._consumer.poll(round(BRIEF_POLL_S * 1000))
        except KafkaError as error:
            logger.info("event=join_not_finished error=%r next=leave", error)

    def _apply_rebalances(self) -> None:
        for event in self._rebalances.take():
            names = event.partitions
            self._pauses.forget(names)
            if isinstance(event, Assigned):
                self._offsets.assign(names)
                self.attention.hint()
                logger.info("event=partitions_assigned partitions=%s next=fetch", names)
                continue
            # Nothing is committed here: what ended a moment ago is skipped by the new owner's
            # claim. Running jobs go on until that claim fences them.
            self._offsets.revoke(names)
            if event.lost:
                self._assignor.forget()
            logger.info(
                "event=partitions_revoked lost=%s partitions=%s next=run_on", event.lost, names
            )

    def _close(self) -> None:
        self._finish_join()
        self._apply_rebalances()
        self._take_ended()
        pending = self._offsets.to_commit()
        try:
            if pending:
                self._consumer.commit(kafka_offsets(pending), timeout_ms=LEAVE_TIMEOUT_MS)
        except KafkaError as error:
            logger.info("event=last_commit_failed error=%r next=claims_skip_ended_jobs", error)
        self.status = ()
        self.joined = False
        self._fetches.close()
        try:
            self._consumer.close(autocommit=False, timeout_ms=LEAVE_TIMEOUT_MS)
        except KafkaError as error:
            logger.info("event=leave_failed error=%r next=session_timeout", error)
        logger.info("event=left_group")
