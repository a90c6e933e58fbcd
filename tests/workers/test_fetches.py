"""Messages come by looks on the embedded broker, and by kafka-python where a look cannot."""

from __future__ import annotations

import threading
import time

import pytest
from kafka import KafkaProducer
from kafka.structs import TopicPartition

from openlora.kafka_wire import NotPlain
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from producer.topics import ensure_topics
from workers.assignor import SamePartitionsAssignor
from workers.attention import Attention
from workers.fetches import Fetches
from workers.kafka_client import connect_consumer

pytestmark = pytest.mark.services

A, B = TopicPartition(JOBS_TOPIC, 0), TopicPartition(BATCH_TOPIC, 0)


@pytest.fixture
def consumer(fresh_broker):
    """Of partitions that it was given by hand: nothing is joined."""
    servers = fresh_broker.bootstrap_servers
    ensure_topics(servers, partitions=1)
    consumer = connect_consumer(servers, "test", SamePartitionsAssignor(), 5000)
    consumer.assign([A, B])
    yield consumer
    consumer.close(autocommit=False)


@pytest.fixture
def attention():
    return Attention()


@pytest.fixture
def fetches(consumer, attention):
    fetches = Fetches(consumer, "test", attention)
    yield fetches
    fetches.close()


@pytest.fixture
def publish(fresh_broker):
    producer = KafkaProducer(bootstrap_servers=fresh_broker.bootstrap_servers)

    def send(partition, *values):
        for value in values:
            producer.send(partition.topic, value, partition=0).get(10)

    yield send
    producer.close(timeout=1)


def collect(fetches, count):
    found = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline
        for partition, records in fetches.poll(0.1, is_member=True).items():
            found += [(partition, record.offset, record.value) for record in records]
    return found


def test_looks_bring_each_message_once_and_move_on(consumer, fetches, publish):
    publish(A, b"0", b"1")
    assert collect(fetches, 2) == [(A, 0, b"0"), (A, 1, b"1")]
    publish(B, b"batch")
    publish(A, b"2")
    assert sorted(collect(fetches, 2)) == [(B, 0, b"batch"), (A, 2, b"2")]
    assert not fetches.poll(0.05, is_member=True)
    assert consumer._subscription.assignment[A].position.offset == 3
    assert consumer.highwater(A) == 3
    assert consumer.highwater(B) == 1


def test_any_broker_s_messages_come(broker):
    servers = broker.bootstrap_servers
    ensure_topics(servers)
    producer = KafkaProducer(bootstrap_servers=servers)
    first = producer.send(A.topic, b"0", partition=A.partition).get(10).offset
    consumer = connect_consumer(servers, "test", SamePartitionsAssignor(), 5000)
    consumer.assign([A])
    consumer.seek(A, first)
    fetches = Fetches(consumer, "test", Attention())
    assert collect(fetches, 1) == [(A, first, b"0")]
    producer.send(A.topic, b"1", partition=A.partition).get(10)
    assert collect(fetches, 1) == [(A, first + 1, b"1")]
    producer.close(timeout=1)
    fetches.close()
    consumer.close(autocommit=False)


def test_a_paused_partition_is_not_looked_at(consumer, fetches, publish):
    collect(fetches, 0)
    consumer.pause(A)
    publish(A, b"0")
    publish(B, b"batch")
    assert collect(fetches, 1) == [(B, 0, b"batch")]
    consumer.resume(A)
    assert collect(fetches, 1) == [(A, 0, b"0")]


def test_a_hint_brings_the_next_look_forward(fetches, publish, attention, monkeypatch):
    publish(A, b"0")
    assert collect(fetches, 1) == [(A, 0, b"0")]
    monkeypatch.setattr("workers.fetches.LOOK_INTERVAL_S", 60.0)
    assert not fetches.poll(0.05, is_member=True)  # one more look at most
    publish(A, b"1")
    assert not fetches.poll(0.05, is_member=True)
    threading.Timer(0.05, attention.hint).start()
    assert not fetches.poll(30, is_member=True)  # there may be something else to do
    assert collect(fetches, 1) == [(A, 1, b"1")]


@pytest.mark.parametrize("error", [NotPlain("odd"), ConnectionResetError("gone")])
def test_kafka_python_goes_on_where_a_look_cannot(consumer, fetches, publish, monkeypatch, error):
    publish(A, b"0")
    assert collect(fetches, 1) == [(A, 0, b"0")]

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fetches._looks, "look", fail)
        publish(A, b"1")
        assert collect(fetches, 1) == [(A, 1, b"1")]
    publish(A, b"2")
    assert collect(fetches, 1) == [(A, 2, b"2")]


def test_what_was_taken_during_a_look_is_dropped(consumer, fetches, publish, monkeypatch):
    publish(A, b"0")
    look = fetches._looks.look

    def lose(*args):
        found = look(*args)
        if found:  # an answer with something for a partition that is given anew, from its start
            consumer.assign([B])
            consumer.assign([A, B])
            monkeypatch.undo()
        return found

    monkeypatch.setattr(fetches._looks, "look", lose)
    assert collect(fetches, 1) == [(A, 0, b"0")]
    assert not fetches.poll(0.1, is_member=True)


def test_a_long_backlog_of_some_partitions_does_not_keep_the_others_waiting(
    consumer, fetches, publish, monkeypatch
):
    monkeypatch.setattr("workers.fetches.BATCH_INTERVAL_S", 0.0)
    monkeypatch.setattr(fetches._looks, "_max_bytes", 3000)
    for number in range(6):
        publish(A, b"%d" % number * 2000)
        publish(B, b"%d" % number * 2000)
    came = [partition for partition, *_ in collect(fetches, 12)]
    first = came[0]
    other = B if first == A else A
    assert other in came[: came.count(first)]


def test_what_cannot_be_unpacked_is_left_to_kafka_python(consumer, fetches, publish, monkeypatch):
    publish(A, b"0")
    publish(B, b"batch")
    look = fetches._looks.look

    def spoil(*args):
        return [
            (partition, high_water, memoryview(bytes(data[:-1]) + b"x" if partition == A else data))
            for partition, high_water, data in look(*args) or ()
        ]

    monkeypatch.setattr(fetches._looks, "look", spoil)
    assert sorted(collect(fetches, 2)) == [(B, 0, b"batch"), (A, 0, b"0")]


def test_where_no_leader_is_known_kafka_python_is_asked(consumer, fetches, publish, monkeypatch):
    publish(A, b"0")
    publish(B, b"batch")
    collect(fetches, 2)
    leader_of = consumer._cluster.leader_for_partition
    first = next(iter(consumer._subscription.assignment))
    monkeypatch.setattr(
        consumer._cluster, "leader_for_partition", lambda p: None if p == first else leader_of(p)
    )
    other = B if first == A else A
    publish(other, b"more")
    assert collect(fetches, 1) == [(other, 1, b"more")]


def test_the_end_of_a_partition_that_is_given_anew_is_known_again(consumer, fetches, publish):
    consumer.assign([A])
    publish(A, b"0")
    assert collect(fetches, 1)
    for _ in range(3):
        fetches.poll(0.03, is_member=True)
    consumer.unsubscribe()
    consumer.assign([A])
    consumer.seek(A, 1)
    for _ in range(3):
        fetches.poll(0.03, is_member=True)
    assert consumer.highwater(A) == 1
