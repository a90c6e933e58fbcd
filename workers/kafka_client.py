"""The settings of the worker's Kafka consumer, and its first connection."""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer
from kafka.errors import KafkaConnectionError, KafkaTimeoutError
from kafka.structs import TopicPartition

from openlora.errors import SetupError
from openlora.protocol.names import WORKER_GROUP
from workers.assignor import SamePartitionsAssignor

SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_INTERVAL_MS = 1_000
FETCH_MAX_WAIT_MS = 100
"""Brokers answer a waiting fetch as soon as there is something. The embedded one does not, and is
asked otherwise (fetches.py)."""
FETCH_MAX_BYTES = 8 << 20
"""What one fetch may bring into memory, beyond the budgets."""
METADATA_MAX_AGE_MS = 3_000
"""Topics that were made anew, or have more partitions, are seen after so long."""
RECONNECT_BACKOFF_MAX_MS = 1_000


def connect_consumer(
    bootstrap_servers: str, client_id: str, assignor: SamePartitionsAssignor, timeout_ms: int
) -> Any:
    """A ``KafkaConsumer`` of the workers' group that has reached its broker, not subscribed yet.

    Raises:
        SetupError: no broker answers within ``timeout_ms``, or the address is none.
    """
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=bootstrap_servers.split(","),
            client_id=client_id,
            group_id=WORKER_GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_bytes=FETCH_MAX_BYTES,
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=HEARTBEAT_INTERVAL_MS,
            partition_assignment_strategy=[assignor],
            bootstrap_timeout_ms=timeout_ms,
            allow_auto_create_topics=False,  # brokers would choose another number of partitions
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            reconnect_backoff_max_ms=RECONNECT_BACKOFF_MAX_MS,
            metrics_enabled=False,
        )
    except (KafkaConnectionError, KafkaTimeoutError, OSError, ValueError) as error:
        raise SetupError(
            f"no Kafka broker answers at {bootstrap_servers} ({error}); "
            "start one or set --kafka / OPENLORA_KAFKA"
        ) from error
    _join_once(consumer._coordinator, assignor)
    return consumer


def _join_once(coordinator: Any, assignor: SamePartitionsAssignor) -> None:
    """Leave out the second round that kafka-python adds where a member lost partitions.

    Their new owner has them already (assignor.py). On the embedded broker the round takes 3 s, and
    with three members it can set off others without end.
    """
    complete = coordinator._on_join_complete_async

    async def complete_once(*args: Any) -> None:
        before = assignor.answers
        await complete(*args)
        if assignor.answers > before:  # else it did not take its share, and has to ask again
            coordinator.rejoin_needed = False

    coordinator._on_join_complete_async = complete_once


def position_of(consumer: Any, partition: TopicPartition) -> int | None:
    """Where the next fetch of an assigned partition begins, as far as that is known here.

    ``KafkaConsumer.position`` asks the broker where it is not, and goes through all partitions each
    time: for all of them that is a third of what an idle worker does.

    Raises:
        KeyError: it is not assigned.
    """
    position = consumer._subscription.assignment[partition].position
    return None if position is None else int(position.offset)
