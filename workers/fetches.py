"""How a consumer gets its messages: by looks where the broker is the embedded one, else as ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kafka.errors import KafkaError
from kafka.record import MemoryRecords
from kafka.structs import OffsetAndMetadata, TopicPartition

from openlora.kafka_wire import NotPlain
from openlora.protocol.names import BATCH_TOPIC, EMBEDDED_CLUSTER_ID
from workers.attention import Attention
from workers.kafka_client import FETCH_MAX_BYTES
from workers.looks import Looks

LOOK_INTERVAL_S = 0.02
"""From one look to the next."""
LEAST_INTERVAL_S = 0.005
"""The same where there is word that messages have come."""
BATCH_INTERVAL_S = 0.15
"""From one fetch of the batch topic to the next while it is empty: most of what a fetch costs is to
go through its partitions, and nobody watches for a batch job's first token."""
POLL_INTERVAL_S = 0.1
"""Looks leave the group to kafka-python, which is not urgent while nothing moves."""
LIBRARY_S = 1.0
"""So long kafka-python fetches by itself behind a look that met something."""
TAKE_ALL = 1 << 30
"""Whatever a fetch brought is taken at once: ``Backlog`` says why."""

Records = dict[TopicPartition, Sequence[Any]]
_NOTHING: Records = {TopicPartition("", 0): ()}

logger = logging.getLogger("workers.fetches")


class Fetches:
    """The polls of one ``KafkaConsumer``; nobody else polls it. Used by one thread.

    Args:
        attention: its hints end the pause between two looks.
    """

    def __init__(self, consumer: Any, client_id: str, attention: Attention) -> None:
        self._consumer = consumer
        self._attention = attention
        self._looks = Looks(client_id, FETCH_MAX_BYTES)
        self._fetch_records = consumer._fetcher.fetch_records
        consumer._fetcher.fetch_records = self._records_of_poll
        self._is_looking = False
        self._library_until = 0.0
        self._poll_due = self._batch_due = self._look_due = self._looked_at = 0.0

    def poll(self, timeout_s: float, *, is_member: bool, look_at_all: bool = False) -> Records:
        """What has come; waits for it for ``timeout_s`` at most.

        ``is_member``: whether the group has answered. If not, that is waited for as well.
        ``look_at_all``: the next look is at the batch topic too.

        Raises:
            KafkaError: what kafka-python met.
        """
        now = time.monotonic()
        if look_at_all:
            self._batch_due = 0.0
        self._is_looking = now >= self._library_until and self._is_embedded
        if not self._is_looking:
            return self._poll_library(timeout_s, is_member)
        if not is_member or now >= self._poll_due:
            self._poll_due = now + POLL_INTERVAL_S
            self._consumer.poll(round(timeout_s * 1000))
        try:
            return self._look_until(now + timeout_s)
        except (OSError, KafkaError, NotPlain) as error:
            logger.info("event=look_failed error=%r next=fetch_by_library", error)
            self._library_until = time.monotonic() + LIBRARY_S
            return {}

    @property
    def _is_embedded(self) -> bool:
        return bool(self._consumer._cluster.cluster_id == EMBEDDED_CLUSTER_ID)

    def _poll_library(self, timeout_s: float, is_member: bool) -> Records:
        records: Records = self._consumer.poll(round(timeout_s * 1000), max_records=TAKE_ALL)
        if not records and not is_member:
            # A cooperative rebalance lets a member go on with what it keeps, but kafka-python's
            # ``poll`` fetches nothing before the group has answered. Never waits.
            records = self._fetch_records(TAKE_ALL, timeout_ms=0)[0]
        return records

    def _records_of_poll(
        self, max_records: int, update_offsets: bool = True, timeout_ms: float | None = None
    ) -> tuple[Records, bool]:
        """In place of ``Fetcher.fetch_records``: while looks do it, what ends the poll at once."""
        if self._is_looking:
            return _NOTHING, False
        records: tuple[Records, bool] = self._fetch_records(max_records, update_offsets, timeout_ms)
        return records

    def _look_until(self, deadline: float) -> Records:
        while True:
            now = time.monotonic()
            pause_s = min(self._look_due, deadline) - now
            if pause_s > 0 and self._attention.pause(pause_s):
                # The next look is soon, and whoever polls may have something to do before.
                self._look_due = min(self._look_due, self._looked_at + LEAST_INTERVAL_S)
                return {}
            if self._look_due > max(now, deadline):
                return {}
            self._looked_at = time.monotonic()
            self._look_due = self._looked_at + LOOK_INTERVAL_S
            records = self._look()
            if records:
                return records

    def _look(self) -> Records:
        subscription = self._consumer._subscription
        with_batch = time.monotonic() >= self._batch_due
        wanted, states = [], {}
        knows_ends = True
        for partition in subscription.fetchable_partitions():
            state = subscription.assignment.get(partition)
            position = None if state is None else state.position
            if position is not None and (with_batch or partition.topic != BATCH_TOPIC):
                states[partition] = state
                wanted.append((partition, position.offset))
                knows_ends = knows_ends and state.highwater is not None
        if not wanted:
            return {}
        if not knows_ends:
            self._looks.forget()  # an answer as the last one would not tell them
        found = self._looks.look(self._leader_of(wanted[0][0]), wanted)
        if with_batch:
            self._batch_due = time.monotonic() + BATCH_INTERVAL_S
        return {} if found is None else self._take(found, states, dict(wanted))

    def _leader_of(self, partition: TopicPartition) -> tuple[str, int]:
        cluster = self._consumer._cluster
        leader = cluster.leader_for_partition(partition)
        broker = None if leader is None else cluster.broker_metadata(leader)
        if broker is None:
            raise NotPlain(f"no leader of {partition} is known")
        return broker.host, broker.port

    def _take(
        self,
        found: Iterable[tuple[TopicPartition, int, memoryview]],
        states: Mapping[TopicPartition, Any],
        offsets: Mapping[TopicPartition, int],
    ) -> Records:
        assignment = self._consumer._subscription.assignment
        records: Records = {}
        for partition, high_water, data in found:
            state = states[partition]
            # taken meanwhile, or given anew, maybe to be read from elsewhere
            if assignment.get(partition) is not state or not _is_at(state, offsets[partition]):
                continue
            state.highwater = high_water
            if not len(data):
                continue
            try:
                records[partition] = self._unpack(partition, state, data)
            except (KafkaError, NotPlain):
                if not records:
                    raise
                break  # what was unpacked comes first; this comes again
        if any(partition.topic == BATCH_TOPIC for partition in records):
            self._batch_due = 0.0
        return records

    def _unpack(self, partition: TopicPartition, state: Any, data: memoryview) -> Sequence[Any]:
        fetcher = self._consumer._fetcher
        offset = state.position.offset
        unpacked = fetcher.PartitionRecords(
            offset,
            partition,
            MemoryRecords(bytes(data)),
            check_crcs=fetcher.config["check_crcs"],
            # The broker fills an answer in the order of the question: who had its turn asks last.
            on_drain=fetcher._on_partition_records_drain,
        )
        records: Sequence[Any] = unpacked.take(None)
        if unpacked.next_fetch_offset <= offset:
            raise NotPlain(f"no whole message at {offset} of {partition}")
        state.position = OffsetAndMetadata(unpacked.next_fetch_offset, "", unpacked.leader_epoch)
        return records

    def close(self) -> None:
        """Look no more."""
        self._looks.close()


def _is_at(state: Any, offset: int) -> bool:
    position = state.position
    return position is not None and position.offset == offset
