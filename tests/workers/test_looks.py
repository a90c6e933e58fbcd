"""Looks see what is there, say nothing of what is as it was, and leave the odd to kafka-python."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from kafka import KafkaProducer
from kafka.record import MemoryRecords
from kafka.structs import TopicPartition

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from producer.topics import ensure_topics
from workers.looks import Looks, NotPlain

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
    return [record.value for record in MemoryRecords(bytes(data)).next_batch()]


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


class Broker:
    """Answers each request with the next of ``bodies``; None: hangs up."""

    def __init__(self, *bodies):
        self._bodies = bodies
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        connection = None
        for body in self._bodies:
            if connection is None:
                connection, _ = self._listener.accept()
            (size,) = struct.unpack(">i", connection.recv(4, socket.MSG_WAITALL))
            request = connection.recv(size, socket.MSG_WAITALL)
            if body is None:
                connection.close()
                connection = None
                continue
            answer = request[4:8] + body
            for byte in struct.pack(">i", len(answer)) + answer:  # in the smallest pieces
                connection.sendall(bytes((byte,)))
        self._listener.close()

    def join(self):
        self._thread.join(10)


def answer(*partitions, error=0):
    name = JOBS_TOPIC.encode()
    topic = struct.pack(">h", len(name)) + name + struct.pack(">i", len(partitions))
    return struct.pack(">ihii", 0, error, 0, 1) + topic + b"".join(partitions)


def test_an_answer_comes_in_any_pieces_and_may_grow(looks):
    broker = Broker(
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
    broker = Broker(odd)
    with pytest.raises(NotPlain):
        looks.look(broker.address, [(A, 7)])
    broker.join()
    other = Broker(None, answer(PLAIN))
    with pytest.raises(ConnectionError):
        looks.look(other.address, [(A, 7)])
    assert looks.look(other.address, [(A, 7)]) == [(A, 7, b"")]
    other.join()


def test_a_broker_that_moved_is_asked_where_it_is_now(looks):
    old, new = Broker(answer(PLAIN)), Broker(answer(PLAIN))
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
