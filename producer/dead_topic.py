"""Reading ``openlora.dead``: few messages, of which the newest matter."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from openlora.errors import InvalidRequest, SetupError
from openlora.protocol.dead import DeadLetter, decode_dead_letter
from openlora.protocol.names import DEAD_TOPIC

MAX_LETTERS = 1000
MAX_HELD_CHARS = 32 << 20
"""Of their messages together: who sends what cannot be run decides how long they are."""
_TIMEOUT_S = 5.0
_POLL_MS = 100

_logger = logging.getLogger(__name__)


def read_dead_letters(bootstrap_servers: str) -> dict[int, DeadLetter]:
    """The newest letters by their offset in the dead topic, oldest first: fewer long ones.

    Raises:
        SetupError: the broker does not answer.
    """
    try:
        return _read(bootstrap_servers)
    except (KafkaError, OSError, ValueError) as error:
        raise SetupError(f"Kafka at {bootstrap_servers} does not answer: {error!r}") from error


def _read(bootstrap_servers: str) -> dict[int, DeadLetter]:
    consumer: Any = KafkaConsumer(
        bootstrap_servers=bootstrap_servers.split(","),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        # The embedded broker lists all letters for each fetch, and gives none if it takes longer.
        fetch_max_wait_ms=200,
        bootstrap_timeout_ms=int(_TIMEOUT_S * 1000),
        allow_auto_create_topics=False,
        metrics_enabled=False,
    )
    partition = TopicPartition(DEAD_TOPIC, 0)
    letters: dict[int, DeadLetter] = {}
    held = 0
    try:
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            for message in consumer.poll(_POLL_MS).get(partition, ()):
                try:
                    letter = decode_dead_letter(message.value or b"")
                except InvalidRequest as error:
                    _logger.warning("entry %d is no letter: %s", message.offset, error.message)
                    continue
                letters[message.offset] = letter
                held += len(letter.value)
                while len(letters) > MAX_LETTERS or held > MAX_HELD_CHARS:
                    held -= len(letters.pop(next(iter(letters))).value)
            # The end that the fetch told of, as the embedded broker answers no other question.
            end = consumer.highwater(partition)
            if end is not None and consumer.position(partition) >= end:
                break
    finally:
        with suppress(KafkaError):
            consumer.close(autocommit=False)
    return letters
