"""Looks see what is there, say nothing of what is as it was, and leave the odd to kafka-python."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time

import pytest
from kafka import KafkaProducer
from kafka.record import MemoryRecords
from kafka.structs import TopicPartition

from openlora.kafka_wire import KafkaWire, NotPlain
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from producer.topics import ensure_topics
from tests.scripted_broker import ScriptedBroker
from workers.looks import Looks

A, B, C = (
    TopicPartition(JOBS_TOPIC, 0),
    TopicPartition(JOBS_TOPIC, 1),
    TopicPartition(BATCH_TOPIC, 0),
)
PLAIN = struct.pack(">ihqqqiii", 0, 0, 7, 7, 0, -1, -1, 0)


@pytest.fixture
def looks():
    looks = Looks("test", 1 << 20)
    yield looks
    looks.close()


def values(data):
    records, found = MemoryRecords(bytes(data)), []
    while records.has_next():
        found += [record.value for record in records.next_batch()]
    return found


@pytest.mark.services
def test_what_is_there_is_seen_once_it_is_there(fresh_broker, looks):
    ensure_topics(fresh_broker.bootstrap_servers, partitions=2)
    host, port = fresh_broker.bootstrap_servers.split(":")
    address, wanted = (host, int(port)), [(A, 0), (B, 0), (C, 0)]
    assert [(p, high, len(data)) for p, high, data in looks.look(address, wanted)] == [
        (A, 0, 0),
        (B, 0, 0),
        (C, 0, 0),
    ]
    assert looks.look(address, wanted) is None
    producer = KafkaProducer(bootstrap_servers=fresh_broker.bootstrap_servers)
    producer.send(JOBS_TOPIC, b"one", partition=1).get(10)
    found = {partition: (high, data) for partition, high, data in looks.look(address, wanted)}
    assert found[A] == (0, b"")
    assert found[B][0] == 1
    assert values(found[B][1]) == [b"one"]
    assert looks.look(address, wanted) is not None  # until it is asked from behind it
    wanted[1] = (B, 1)
    looks.look(address, wanted)
    assert looks.look(address, wanted) is None
    producer.close(timeout=1)


def answer(*partitions, error=0):
    name = JOBS_TOPIC.encode()
    topic = struct.pack(">h", len(name)) + name + struct.pack(">i", len(partitions))
    return struct.pack(">ihii", 0, error, 0, 1) + topic + b"".join(partitions)


def test_an_answer_comes_in_any_pieces_and_may_grow(looks):
    broker = ScriptedBroker(
        answer(PLAIN), answer(PLAIN), answer(PLAIN[:-4] + struct.pack(">i", 3) + b"abc")
    )
    assert looks.look(broker.address, [(A, 7)]) == [(A, 7, b"")]
    assert looks.look(broker.address, [(A, 7)]) is None
    assert looks.look(broker.address, [(A, 7)]) == [(A, 7, b"abc")]
    broker.join()


@pytest.mark.parametrize(
    "odd",
    [
        answer(PLAIN, error=74),
        answer(struct.pack(">ihqqqiii", 0, 6, 7, 7, 0, -1, -1, 0)),
        answer(struct.pack(">ihqqqi", 0, 0, 7, 7, 0, 1) + bytes(24)),
        answer(PLAIN[:-4] + struct.pack(">i", 99)),
        answer(PLAIN[:-3]),
        answer(struct.pack(">i", 1) + PLAIN[4:]),
        answer(),
        answer(PLAIN).replace(b"openlora", b"\xff" * 8),
        b"",
    ],
    ids=[
        "error",
        "partition's error",
        "aborted",
        "short records",
        "short",
        "other partition",
        "no partition",
        "odd name",
        "nothing",
    ],
)
def test_what_is_odd_is_refused_and_the_next_look_connects(looks, odd):
    broker = ScriptedBroker(odd)
    with pytest.raises(NotPlain):
        looks.look(broker.address, [(A, 7)])
    broker.join()
    other = ScriptedBroker(None, answer(PLAIN))
    with pytest.raises(ConnectionError):
        looks.look(other.address, [(A, 7)])
    assert looks.look(other.address, [(A, 7)]) == [(A, 7, b"")]
    other.join()


def test_a_broker_that_moved_is_asked_where_it_is_now(looks):
    old, new = ScriptedBroker(answer(PLAIN)), ScriptedBroker(answer(PLAIN))
    assert looks.look(old.address, [(A, 7)]) == [(A, 7, b"")]
    assert looks.look(new.address, [(A, 7)]) is None
    new.join()


@pytest.mark.parametrize("size", [-1, 3, 1 << 30])
def test_an_answer_of_an_odd_size_is_refused_before_it_is_read(looks, size):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(struct.pack(">i", size))
                connection.recv(1)  # until it hangs up

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(NotPlain, match=f"an answer of {size} bytes"):
            looks.look(listener.getsockname(), [(A, 7)])
        thread.join(10)
        assert not thread.is_alive()


def partition(number, high_water, records=b""):
    state = struct.pack(">ihqqqi", number, 0, high_water, high_water, 0, -1)
    return state + struct.pack(">ii", -1, len(records)) + records


def test_what_a_look_was_too_short_for_is_waited_for(looks):
    broker = ScriptedBroker(
        answer(partition(0, 9), partition(1, 8, b"abc")),  # A has two more than it gave
        answer(partition(0, 9)),
        answer(partition(0, 9, b"de")),
        answer(partition(0, 9), partition(1, 8)),
        answer(partition(0, 9), partition(1, 8)),
    )
    found = looks.look(broker.address, [(A, 7), (B, 7)])
    assert found == [(A, 9, b"de"), (B, 8, b"abc")]
    assert looks.look(broker.address, [(A, 9), (B, 8)]) == [(A, 9, b""), (B, 8, b"")]
    assert looks.look(broker.address, [(A, 9), (B, 8)]) is None
    broker.join()


def test_an_exchange_may_take_as_long_as_it_asked_for_and_no_longer():
    wire = KafkaWire("test", 0.1)
    broker = ScriptedBroker(b"late", delay_s=0.3)
    assert wire.exchange(broker.address, 1, 11, b"", wait_s=20).endswith(b"late")
    broker.join()
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(TimeoutError),
    ):
        wire.exchange(silent.getsockname(), 1, 11, b"")


@pytest.mark.services
def test_a_broker_that_hangs_does_not_hold_up_the_worker(fresh_broker, looks):
    """Its jobs in memory go on, from the thread that looks."""
    ensure_topics(fresh_broker.bootstrap_servers, partitions=1)
    host, port = fresh_broker.bootstrap_servers.split(":")
    looks.look((host, int(port)), [(A, 0)])
    os.kill(fresh_broker.server.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        looks.look((host, int(port)), [(A, 0)])
    assert time.monotonic() - started < 1
    os.kill(fresh_broker.server.pid, signal.SIGCONT)
    assert looks.look((host, int(port)), [(A, 0)]) is None


def test_a_full_answer_is_not_one_cut_short():
    looks = Looks("test", 4)
    broker = ScriptedBroker(answer(partition(0, 9), partition(1, 8, b"abc")))
    assert looks.look(broker.address, [(A, 7), (B, 7)]) == [(A, 9, b""), (B, 8, b"abc")]
    broker.join()
    looks.close()


def test_messages_that_never_come_are_left_to_kafka_python(looks):
    broker = ScriptedBroker(*[answer(partition(0, 9))] * 6)
    with pytest.raises(NotPlain, match="does not give them"):
        looks.look(broker.address, [(A, 7)])
    other = ScriptedBroker(answer(partition(0, 9, b"de")))
    assert looks.look(other.address, [(A, 7)]) == [(A, 9, b"de")]
    other.join()


@pytest.mark.services
def test_a_partition_of_thousands_gives_its_newest(fresh_broker, looks):
    """The embedded broker lists them all for each fetch, which takes longer than a look waits."""
    ensure_topics(fresh_broker.bootstrap_servers, partitions=1)
    host, port = fresh_broker.bootstrap_servers.split(":")
    producer = KafkaProducer(
        bootstrap_servers=fresh_broker.bootstrap_servers,
        batch_size=0,  # a message is a thing of its own, as jobs that come one by one are
    )
    for number in range(4000):
        sent = producer.send(JOBS_TOPIC, b"%d" % number, partition=0)
    last = sent.get(60).offset
    for offset in (last, last - 1, last):
        ((_, high, data),) = looks.look((host, int(port)), [(A, offset)])
        assert high == last + 1
        assert len(values(data)) == high - offset
    producer.close(timeout=1)
