"""Bundles to the batch topic, each under its adapter's key, acknowledged before it counts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from openlora.errors import Overloaded
from openlora.protocol.names import BATCH_TOPIC

ACK_TIMEOUT_S = 30.0
_RETRY_AFTER_MS = 1000

logger = logging.getLogger(__name__)


class BundleSender:
    """One Kafka producer, made at the first bundle. Safe for several threads."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._servers = bootstrap_servers
        self._lock = threading.Lock()
        self._producer: Any = None

    def send(self, bundles: Sequence[tuple[bytes | None, bytes]]) -> None:
        """Publish (key, value) pairs in order; returns once the broker has all of them.

        Raises:
            Overloaded: it does not take them; some may be there nevertheless.
        """
        try:
            producer = self._connected()
            sent: list[Future[object]] = [
                producer.send(BATCH_TOPIC, value, key=key) for key, value in bundles
            ]
            for future in sent:
                future.get(ACK_TIMEOUT_S)  # type: ignore[attr-defined]
        except (KafkaError, OSError, ValueError) as error:
            # ValueError: the topic vanished before a partition of it was chosen
            raise Overloaded(
                f"Kafka at {self._servers} did not take the lines ({error!r}); tried again soon",
                retry_after_ms=_RETRY_AFTER_MS,
            ) from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._producer is not None:
                self._producer.close(timeout=1)
                self._producer = None

    def _connected(self) -> Any:
        with self._lock:
            if self._producer is None:
                self._producer = KafkaProducer(
                    bootstrap_servers=self._servers.split(","),
                    client_id="openlora-batches",
                    acks="all",
                    enable_idempotence=False,  # its numbers would die with an in-memory broker
                    linger_ms=5,
                    batch_size=256 << 10,
                    request_timeout_ms=5000,
                    delivery_timeout_ms=20_000,
                    max_block_ms=10_000,
                    reconnect_backoff_max_ms=1000,
                    allow_auto_create_topics=False,
                    metrics_enabled=False,
                )
            return self._producer
