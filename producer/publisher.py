"""``Publisher``: jobs into Kafka, each answered by a future once the broker has it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from openlora.errors import OpenLoRAError, Overloaded, PayloadTooLarge, SetupError
from openlora.protocol import codec
from openlora.protocol.jobs import Job
from producer.partitioner import key_of, topic_of
from producer.puts import MOST_BYTES, Message, Published, Puts

MAX_UNACKNOWLEDGED = 10_000
"""Jobs that may wait for the broker; more are refused at once instead of waiting in memory."""
MAX_UNACKNOWLEDGED_CHARS = 64 << 20
"""Likewise of their prompts together, the longest of which have a million each."""
DELIVERY_TIMEOUT_MS = 4500
"""A job that the broker did not take within this fails; below the sweeper's 5 s, which would
otherwise publish it once more while it is still under way here."""

_CLIENT_ID = "openlora-gateway"
_REQUEST_TIMEOUT_MS = 2000
_CONNECT_TIMEOUT_MS = 10_000
_MAX_MESSAGE_BYTES = 1_000_000  # just under the 1 MiB that brokers take by default
_RETRY_AFTER_MS = 1000
_LEAST_POLL_MS = 5
_TOO_LATE = "the broker did not take it in time"

_logger = logging.getLogger(__name__)


_Queued = tuple[Future[Published], Job, int | None, float]
"""With the partition, where it is not the key's, and when it was queued."""


class Publisher:
    """A KafkaProducer behind a thread of its own, so that ``publish`` never blocks. What is plain
    goes to the embedded broker by ``Puts`` instead, from the same thread.

    Acknowledged means by all in-sync replicas. A retry may write a job twice, which is harmless:
    claims fence. Lost connections are made again by the producer itself.
    """

    def __init__(self, bootstrap_servers: str) -> None:
        """Connects.

        Raises:
            SetupError: no broker answers within 10 s.
        """
        self._servers = bootstrap_servers
        try:
            self._producer: Any = KafkaProducer(
                bootstrap_servers=bootstrap_servers.split(","),
                client_id=_CLIENT_ID,
                acks="all",
                # Sequence numbers would die with an in-memory broker and fail what follows.
                enable_idempotence=False,
                linger_ms=0,  # what comes while a request is under way shares the next one
                delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
                request_timeout_ms=_REQUEST_TIMEOUT_MS,
                max_block_ms=DELIVERY_TIMEOUT_MS,
                max_request_size=_MAX_MESSAGE_BYTES,
                reconnect_backoff_max_ms=500,
                # TopicKeeper creates them, with the right number of partitions.
                allow_auto_create_topics=False,
                bootstrap_timeout_ms=_CONNECT_TIMEOUT_MS,
                metrics_enabled=False,
            )
        except (KafkaError, OSError, ValueError) as error:
            raise SetupError(f"no Kafka broker answers at {bootstrap_servers}: {error}") from error
        _calm(self._producer._sender._client, self._producer._metadata)
        self._puts = Puts(self._producer._metadata, _CLIENT_ID)
        self._room = _Room()
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._is_closed = False
        self._closing = threading.Lock()  # nothing is queued behind the end of the queue
        self._thread = threading.Thread(target=self._send_all, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, job: Job, partition: int | None = None) -> Future[Published]:
        """Queue the job; never blocks. The future's result is where the broker keeps it.

        ``partition``: where its key would not put it.

        The future fails with Overloaded (the broker does not take it within 4.5 s, too many jobs
        wait already, or the publisher is closed) or PayloadTooLarge. After Overloaded the broker
        may have the job nevertheless.
        """
        future: Future[Published] = Future()
        with self._closing:
            if self._is_closed:
                future.set_exception(Overloaded("this gateway is shutting down; try another"))
            elif not self._room.take(chars := _chars_of(job)):
                future.set_exception(
                    self._overloaded(f"{self._room.jobs} jobs wait for the broker already")
                )
            else:
                future.add_done_callback(lambda _: self._room.free(chars))
                self._queue.put((future, job, partition, time.monotonic()))
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, wait for the broker's answers, and close. May be repeated."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join(timeout_s)
        try:
            self._producer.close(timeout=timeout_s)
        except KafkaError as error:
            _logger.warning("some jobs were not acknowledged before the close: %s", error)

    def _send_all(self) -> None:
        is_open = True
        while is_open:
            queued, is_open = self._take()
            try:
                self._publish_all(queued)
            except Exception as error:  # without this thread no job would be published any more
                _logger.exception("up to %d jobs are refused", len(queued))
                for future, *_ in queued:
                    with suppress(InvalidStateError):  # it has ended
                        future.set_exception(self._error(error))
        self._puts.close()

    def _publish_all(self, queued: Sequence[_Queued]) -> None:
        messages = [m for each in queued if (m := self._message_of(*each)) is not None]
        for message in self._puts.put(messages) if messages else ():
            self._send(message)

    def _take(self) -> tuple[list[_Queued], bool]:
        """What is queued, as much as goes into one request; waits for the first. Whether more may
        come."""
        taken: list[_Queued] = []
        chars = 0
        try:
            while not taken or chars < MOST_BYTES:
                item = self._queue.get(block=not taken)
                if item is None:
                    return taken, False
                taken.append(item)
                chars += _chars_of(item[1])
        except queue.Empty:
            pass
        return taken, True

    def _message_of(
        self, future: Future[Published], job: Job, partition: int | None, queued_at: float
    ) -> Message | None:
        if not future.set_running_or_notify_cancel():
            return None  # whoever asked is gone; from here on the future cannot be cancelled
        until = queued_at + DELIVERY_TIMEOUT_MS / 1000
        if time.monotonic() > until:
            future.set_exception(self._overloaded(_TOO_LATE))
            return None
        return Message(future, topic_of(job), key_of(job), codec.encode(job), partition, until)

    def _send(self, message: Message) -> None:
        future = message.future
        left_ms = (message.until - time.monotonic()) * 1000
        if left_ms <= 0:
            future.set_exception(self._overloaded(_TOO_LATE))
            return
        # For an unknown topic: those behind it in the queue wait as well.
        self._producer.config["max_block_ms"] = left_ms

        def acknowledged(record: Any) -> None:
            future.set_result((record.topic, record.partition, record.offset))

        def failed(error: BaseException) -> None:
            future.set_exception(self._error(error))

        try:
            sent = self._producer.send(
                message.topic, message.value, message.key, None, message.partition
            )
        except (KafkaError, TypeError, ValueError) as error:
            # The last two: the topic vanished between the metadata and the choice of a partition.
            future.set_exception(self._error(error))
            return
        sent.add_callback(acknowledged)
        sent.add_errback(failed)

    def _error(self, error: BaseException) -> OpenLoRAError:
        if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
            return PayloadTooLarge(
                f"the job is larger than {_MAX_MESSAGE_BYTES} bytes; send a shorter prompt"
            )
        return self._overloaded(str(error) or type(error).__name__)

    def _overloaded(self, reason: str) -> Overloaded:
        return Overloaded(
            f"Kafka at {self._servers} did not take the job ({reason}); try again",
            retry_after_ms=_RETRY_AFTER_MS,
        )


def _calm(client: Any, cluster: Any) -> None:
    """Let kafka-python's sender pause while a broker takes nothing: it asks 20,000 times a second
    whether that is over, and whatever else the process does waits for the interpreter."""
    poll = client.poll

    def poll_calmly(timeout_ms: float | None = None, **others: Any) -> Any:
        is_brief = timeout_ms is not None and timeout_ms < _LEAST_POLL_MS
        if is_brief and not all(client.is_ready(broker.node_id) for broker in cluster.brokers()):
            timeout_ms = _LEAST_POLL_MS  # what comes ends it
        return poll(timeout_ms=timeout_ms, **others)

    client.poll = poll_calmly


class _Room:
    """Counts what waits for the broker. Used by several threads."""

    def __init__(self) -> None:
        self.jobs = 0
        self._chars = 0
        self._lock = threading.Lock()

    def take(self, chars: int) -> bool:
        """Whether there is room for one more job of so many characters; if so, it is taken."""
        with self._lock:
            if self.jobs >= MAX_UNACKNOWLEDGED or self._chars + chars > MAX_UNACKNOWLEDGED_CHARS:
                return False
            self.jobs += 1
            self._chars += chars
            return True

    def free(self, chars: int) -> None:
        """One of them waits no more."""
        with self._lock:
            self.jobs -= 1
            self._chars -= chars


def _chars_of(job: Job) -> int:
    """What makes a job long: its prompt."""
    return len(job.prompt or "") + sum(len(message.content) for message in job.messages or ())
