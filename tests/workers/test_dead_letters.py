"""Dead letters on a real broker: whatever the message was, its letter is written."""

from __future__ import annotations

import base64
import json
import threading

import pytest
from kafka import KafkaConsumer, TopicPartition

from openlora.protocol.names import DEAD_TOPIC, JOBS_TOPIC
from producer.topics import ensure_topics
from tests.conftest import Broker
from workers.backlog import Fetched
from workers.dead_letters import MAX_KEY_BYTES, MAX_VALUE_BYTES, DeadLetters
from workers.offsets import Position

pytestmark = pytest.mark.services

LARGE = Fetched(Position((JOBS_TOPIC, 0), 1, 1), b"k" * 400_000, b"v" * 640_000)
SMALL = Fetched(Position((JOBS_TOPIC, 0), 2, 1), None, b"no job")


def test_a_message_as_large_as_a_broker_takes_holds_up_no_other(fresh_broker: Broker):
    ensure_topics(fresh_broker.bootstrap_servers, 1)
    written: list[Fetched] = []
    both = threading.Event()

    def on_written(fetched: Fetched) -> None:
        written.append(fetched)
        if len(written) == 2:
            both.set()

    letters = DeadLetters(fresh_broker.bootstrap_servers, "w", on_written)
    for fetched in (LARGE, SMALL):
        letters.write(fetched, "invalid_request", "no job")
    assert both.wait(20)
    letters.close(5)
    assert written == [LARGE, SMALL]

    consumer = KafkaConsumer(
        bootstrap_servers=fresh_broker.bootstrap_servers, auto_offset_reset="earliest"
    )
    consumer.assign([TopicPartition(DEAD_TOPIC, 0)])
    found = [next(consumer), next(consumer)]
    consumer.close()
    assert [message.key for message in found] == [b"k" * MAX_KEY_BYTES, None]
    large, small = (json.loads(message.value) for message in found)
    assert (large["offset"], large["value_bytes"]) == (1, len(LARGE.value))
    assert base64.b64decode(large["value"]) == LARGE.value[:MAX_VALUE_BYTES]
    assert base64.b64decode(small["value"]) == SMALL.value
