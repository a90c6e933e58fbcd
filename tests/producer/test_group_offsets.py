"""Committed offsets and ends of partitions without an owner, on both brokers."""

from __future__ import annotations

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from openlora.errors import SetupError
from openlora.protocol.names import JOBS_TOPIC, WORKER_GROUP
from producer import group_offsets
from producer.group_offsets import read_group_offsets
from producer.topics import ensure_topics
from tests.conftest import Broker


@pytest.mark.services
def test_committed_and_end_of_each_partition(broker: Broker) -> None:
    servers = broker.bootstrap_servers
    topic, count = JOBS_TOPIC, ensure_topics(servers, 3)[JOBS_TOPIC]
    before = read_group_offsets(servers, [(topic, number) for number in range(count)])
    producer = KafkaProducer(bootstrap_servers=servers, acks="all")
    for _ in range(7):
        producer.send(topic, b"x" * 3000, partition=1).get(10)
    producer.close()
    committed, end = before[topic, 1]
    consumer = KafkaConsumer(
        bootstrap_servers=servers, group_id=WORKER_GROUP, enable_auto_commit=False
    )
    consumer.assign([TopicPartition(topic, 1)])
    consumer.commit({TopicPartition(topic, 1): OffsetAndMetadata(committed + 5, "", -1)})
    consumer.close()
    after = read_group_offsets(servers, [(topic, 0), (topic, 1)])
    assert after == {(topic, 0): before[topic, 0], (topic, 1): (committed + 5, end + 7)}


@pytest.mark.services
def test_nothing_is_asked_for_nothing(port: int) -> None:
    assert read_group_offsets(f"127.0.0.1:{port}", []) == {}


def test_no_broker_is_one_clear_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_offsets, "_TIMEOUT_S", 0.3)
    with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port} does not answer"):
        read_group_offsets(f"127.0.0.1:{port}", [("t", 0)])
