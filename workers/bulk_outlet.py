"""A bundle's answers to the results topic, and the word that a batch is not wanted any more.

A thread of its own does both, so that neither Kafka nor Redis keeps the loop waiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import redis
from kafka import KafkaProducer
from kafka.errors import KafkaError

from openlora.protocol.bulk import RESULTS_TOPIC, stop_key
from openlora.protocol.names import DEAD_TOPIC

RETRY_S = 0.5
STOP_CHECK_S = 1.0
ACK_TIMEOUT_S = 10.0
SEND_AT_ONCE = 64

logger = logging.getLogger("workers.bulk_outlet")

_Entry = tuple[list[tuple[str, bytes]], Callable[[], None]]


class BulkOutlet:
    """Holds answers until the broker has them; only then ``on_written`` runs, in the thread here,
    so the offset of a bundle is not committed before its answers are safe.

    Attributes:
        stopped: batches of ``watched`` that nobody wants, as of about a second ago.
        watched: the batches to ask about; set by the loop.
    """

    def __init__(self, bootstrap_servers: str, client: redis.Redis) -> None:
        self.stopped: frozenset[str] = frozenset()
        self.watched: frozenset[str] = frozenset()
        self._servers = bootstrap_servers
        self._redis: Any = client
        self._queue: queue.Queue[_Entry] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bulk-outlet", daemon=True)
        self._check_due = 0.0
        self._producer: Any = None

    def write(
        self,
        messages: Sequence[bytes],
        letters: Sequence[bytes],
        on_written: Callable[[], None],
    ) -> None:
        """Queue the answers of one bundle, and the dead letters of its lines. The thread begins
        with the first."""
        entry = [(RESULTS_TOPIC, message) for message in messages]
        entry += [(DEAD_TOPIC, letter) for letter in letters]
        self._queue.put((entry, on_written))
        self.start()

    def start(self) -> None:
        """Begin to look for stopped batches, and to write."""
        if self._thread.ident is None:
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Write what is queued for ``timeout_s`` at most; what is left is run again elsewhere."""
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + timeout_s
        while not self._queue.empty() and time.monotonic() < deadline:
            self._stopping.wait(0.02)
        self._stopping.set()
        self._thread.join(max(0.1, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._check_stopped()
            entries = self._gather()
            while entries and not self._stopping.is_set():
                try:
                    self._send(entries)
                    break
                except (KafkaError, ValueError) as error:
                    # ValueError: the topic vanished before a partition of it was chosen
                    logger.warning("event=answers_not_taken error=%r next=retry", error)
                    self._stopping.wait(RETRY_S)
                self._check_stopped()
        if self._producer is not None:
            self._producer.close(timeout=1)

    def _gather(self) -> list[_Entry]:
        entries: list[_Entry] = []
        with suppress(queue.Empty):
            entries.append(self._queue.get(timeout=STOP_CHECK_S / 2))
            while len(entries) < SEND_AT_ONCE:
                entries.append(self._queue.get_nowait())
        return entries

    def _send(self, entries: list[_Entry]) -> None:
        producer = self._connected()
        sent = [
            (on_written, [producer.send(topic, message) for topic, message in messages])
            for messages, on_written in entries
        ]
        for on_written, futures in sent:
            for future in futures:
                future.get(ACK_TIMEOUT_S)
            on_written()
            del entries[0]  # where a later one fails, this one does not go again

    def _connected(self) -> Any:
        if self._producer is None:
            self._producer = KafkaProducer(
                bootstrap_servers=self._servers.split(","),
                acks="all",
                enable_idempotence=False,  # its numbers would die with an in-memory broker
                linger_ms=2,
                batch_size=256 << 10,
                request_timeout_ms=5000,
                delivery_timeout_ms=8000,
                max_block_ms=5000,
                reconnect_backoff_max_ms=1000,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        return self._producer

    def _check_stopped(self) -> None:
        now = time.monotonic()
        watched = sorted(self.watched)
        if now < self._check_due or not watched:
            return
        self._check_due = now + STOP_CHECK_S
        try:
            marks = self._redis.mget([stop_key(batch_id) for batch_id in watched])
        except redis.RedisError as error:
            logger.info("event=stop_check_failed error=%r next=in_a_second", error)
            return
        self.stopped = frozenset(b for b, mark in zip(watched, marks, strict=True) if mark)
