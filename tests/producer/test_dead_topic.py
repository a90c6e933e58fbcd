"""The newest dead letters, in little memory."""

from __future__ import annotations

import pytest
from kafka import KafkaProducer

from openlora.protocol.codec import encode
from openlora.protocol.dead import DeadLetter
from openlora.protocol.names import DEAD_TOPIC
from producer import dead_topic
from producer.dead_topic import read_dead_letters
from producer.topics import ensure_topics
from tests.conftest import Broker


@pytest.mark.services
def test_long_letters_make_room_for_newer_ones(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = fresh_broker.bootstrap_servers
    ensure_topics(servers)
    producer = KafkaProducer(bootstrap_servers=servers, acks="all")
    for number, chars in enumerate((400, 400, 400, 10)):
        letter = DeadLetter("t", 0, number, "internal", "r", "x" * chars, chars, "w", 1)
        producer.send(DEAD_TOPIC, encode(letter)).get(10)
    producer.close()
    assert list(read_dead_letters(servers)) == [0, 1, 2, 3]
    monkeypatch.setattr(dead_topic, "MAX_HELD_CHARS", 900)
    assert list(read_dead_letters(servers)) == [1, 2, 3]
    monkeypatch.setattr(dead_topic, "MAX_LETTERS", 1)
    assert list(read_dead_letters(servers)) == [3]
