"""Messages that cannot be parsed or run go to ``openlora.dead``, with the reason."""

from __future__ import annotations

import base64
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from openlora.errors import DeadlineExceeded, InternalError
from openlora.joblog.crashes import Suspicion
from openlora.protocol.codec import encode
from openlora.protocol.crashes import Crash
from openlora.protocol.dead import DeadLetter
from openlora.protocol.events import End, Failure
from openlora.protocol.names import DEAD_TOPIC
from workers.backlog import Fetched

RETRY_S = 1.0
SEND_TIMEOUT_S = 10.0
MAX_VALUE_BYTES = 600_000
"""In base64 it stays below the 1 MB that brokers and clients take at most by default."""
MAX_KEY_BYTES = 1000
"""An adapter ID is shorter; a longer key is not ours, and could make the letter too large."""

logger = logging.getLogger("workers.dead_letters")


def condemned(suspicion: Suspicion) -> InternalError:
    """What the client of a job hears that is not run again."""
    ways = ", ".join(crash.how for crash in suspicion.story if crash.jobs == 1)
    return InternalError(
        f"this job ended the engine {suspicion.alone} times when nothing else ran ({ways}); it is "
        "in openlora.dead and is not run again"
    )


def unrunnable(end: End | None) -> Failure | None:
    """Why a job that ended so could not be run; None where it could.

    A deadline that passed is no fault of the job: nobody wants the answer any more, that is all.
    """
    if end is None or end.failure is None or end.failure.code == DeadlineExceeded.code:
        return None
    return end.failure


def letter_of(
    fetched: Fetched,
    worker_id: str,
    code: str,
    reason: str,
    job_id: str | None = None,
    story: tuple[Crash, ...] = (),
) -> bytes:
    """A letter as it is written to the topic."""
    topic, partition = fetched.position.partition
    logger.warning(
        "event=dead_letter topic=%s partition=%d offset=%d code=%s reason=%r next=skip",
        *(topic, partition, fetched.position.offset, code, reason),
    )
    return encode(
        DeadLetter(
            topic=topic,
            partition=partition,
            offset=fetched.position.offset,
            code=code,
            reason=reason,
            value=base64.b64encode(fetched.value[:MAX_VALUE_BYTES]).decode(),
            value_bytes=len(fetched.value),
            worker_id=worker_id,
            written_ms=time.time_ns() // 1_000_000,
            job_id=job_id,
            story=story,
        )
    )


class DeadLetters:
    """Writes dead letters in a thread of its own, started with the first one.

    A letter is held until the broker has it; only then ``on_written`` runs (in that thread), so
    the message's offset is not committed before its letter is safe.
    """

    def __init__(
        self, bootstrap_servers: str, worker_id: str, on_written: Callable[[Fetched], None]
    ) -> None:
        self._servers = bootstrap_servers
        self._worker_id = worker_id
        self._on_written = on_written
        self._queue: queue.Queue[tuple[Fetched, bytes] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="dead-letters", daemon=True)
        self._stopping = threading.Event()

    def write(
        self,
        fetched: Fetched,
        code: str,
        reason: str,
        job_id: str | None = None,
        story: tuple[Crash, ...] = (),
    ) -> None:
        """Queue one letter."""
        letter = letter_of(fetched, self._worker_id, code, reason, job_id, story)
        self._queue.put((fetched, letter))
        if self._thread.ident is None:
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Write what is queued, for ``timeout_s`` at most; the rest comes again from Kafka."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            self._stopping.set()
            self._thread.join(RETRY_S)

    def _run(self) -> None:
        producer: Any = None
        while (entry := self._queue.get()) is not None:
            fetched, value = entry
            while not self._stopping.is_set():
                try:
                    if producer is None:
                        producer = KafkaProducer(
                            bootstrap_servers=self._servers.split(","),
                            acks="all",
                            allow_auto_create_topics=False,  # gateways create them
                        )
                    key = None if fetched.key is None else fetched.key[:MAX_KEY_BYTES]
                    producer.send(DEAD_TOPIC, value, key=key).get(SEND_TIMEOUT_S)
                except (KafkaError, ValueError) as error:
                    # ValueError: the topic vanished before a partition of it was chosen
                    logger.warning("event=dead_letter_failed error=%r next=retry", error)
                    self._stopping.wait(RETRY_S)
                else:
                    self._on_written(fetched)
                    break
        if producer is not None:
            producer.close(timeout=1)
