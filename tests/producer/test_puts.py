"""Puts place messages as kafka-python would, and leave to it what does not work out at once."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from concurrent.futures import Future

import pytest

from openlora.protocol.names import BATCH_TOPIC, EMBEDDED_CLUSTER_ID, JOBS_TOPIC
from producer import puts as puts_module
from producer.partitioner import partition_of
from producer.puts import MOST_BYTES, Message, Puts
from producer.topics import ensure_topics
from tests.producer.test_publisher import read_messages
from tests.scripted_broker import ScriptedBroker

_PARTITIONS = 4


class Cluster:
    """What kafka-python's producer knows of a cluster."""

    def __init__(self, address, cluster_id=EMBEDDED_CLUSTER_ID):
        self.host, self.port = address
        self.port = int(self.port)
        self.cluster_id = cluster_id

    def partitions_for_topic(self, topic):
        return set(range(_PARTITIONS)) if topic in (JOBS_TOPIC, BATCH_TOPIC) else None

    def brokers(self):
        return [self]


def message(value=b"v", key=None, topic=JOBS_TOPIC, partition=None):
    return Message(Future(), topic, key, value, partition)


def answer(*places):
    """Of (topic, partition, error, offset)."""
    parts = [struct.pack(">i", len(places))]
    for topic, partition, error, offset in places:
        name = topic.encode()
        parts += [struct.pack(">h", len(name)), name, struct.pack(">i", 1)]
        parts.append(struct.pack(">ihqqq", partition, error, offset, -1, 0))
    return b"".join(parts) + struct.pack(">i", 0)


def places_of(messages):
    return [each.future.result(0) for each in messages]


@pytest.mark.services
def test_messages_are_where_their_futures_say(fresh_broker):
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    puts = Puts(Cluster(fresh_broker.bootstrap_servers.split(":")), "test")
    messages = [
        message(b"%d" % number, key, topic)
        for topic in (JOBS_TOPIC, BATCH_TOPIC)
        for number in range(3)
        for key in (b"a", b"b", None)
    ]
    messages.append(message(partition=3))
    assert puts.put(messages) == []
    later = message(b"later", b"a")
    assert puts.put([later]) == []
    for each in (*messages, later):
        if each.key is not None:
            assert each.future.result(0)[1] == partition_of(each.key, _PARTITIONS)
    assert messages[-1].future.result(0)[1] == 3
    by_partition = defaultdict(list)
    for topic, partition, offset in places_of([*messages, later]):
        by_partition[topic, partition].append(offset)
    for offsets in by_partition.values():
        assert offsets == [*range(len(offsets))]
    found = read_messages(fresh_broker.bootstrap_servers, places_of(messages))
    assert [found[place] for place in places_of(messages)] == [(m.key, m.value) for m in messages]
    puts.close()


def test_all_go_in_one_request():
    broker = ScriptedBroker(answer((JOBS_TOPIC, 1, 0, 7), (JOBS_TOPIC, 2, 0, 0)))
    puts = Puts(Cluster(broker.address), "test")
    messages = [message(b"%d" % number, partition=1 + number % 2) for number in range(4)]
    assert puts.put(messages) == []
    assert places_of(messages) == [
        (JOBS_TOPIC, 1, 7),
        (JOBS_TOPIC, 2, 0),
        (JOBS_TOPIC, 1, 8),
        (JOBS_TOPIC, 2, 1),
    ]
    broker.join()
    (request,) = broker.requests
    assert struct.unpack_from(">hh", request) == (0, 7)


@pytest.mark.parametrize(
    "bad",
    [
        answer((JOBS_TOPIC, 0, 3, -1)),
        answer((JOBS_TOPIC, 1, 0, 5)),
        answer((JOBS_TOPIC, 0, 0, 5))[:-12],
        answer(),
        b"",
        None,
    ],
    ids=["error", "other partition", "short", "of none", "nothing", "hung up"],
)
def test_what_does_not_work_out_is_left_for_a_while(bad, monkeypatch):
    broker = ScriptedBroker(bad, answer((JOBS_TOPIC, 0, 0, 6)))
    puts = Puts(Cluster(broker.address), "test")
    first, second, third = (message(partition=0) for _ in range(3))
    assert puts.put([first]) == [first]
    assert puts.put([second]) == [second]
    assert len(broker.requests) == 1
    monkeypatch.setattr(puts, "_library_until", 0.0)
    assert puts.put([third]) == []
    assert third.future.result(0) == (JOBS_TOPIC, 0, 6)
    assert not first.future.done()
    assert not second.future.done()
    puts.close()
    broker.join()


def test_what_the_broker_refuses_is_left_alone():
    broker = ScriptedBroker(answer((JOBS_TOPIC, 0, 0, 9), (BATCH_TOPIC, 0, 7, -1)))
    puts = Puts(Cluster(broker.address), "test")
    taken, refused = message(partition=0), message(topic=BATCH_TOPIC, partition=0)
    assert puts.put([taken, refused]) == [refused]
    assert taken.future.result(0) == (JOBS_TOPIC, 0, 9)
    broker.join()


def test_a_broker_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(puts_module, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it listens, and nobody accepts
        puts = Puts(Cluster(silent.getsockname()), "test")
        one = message()
        assert puts.put([one]) == [one]
    puts.close()


@pytest.mark.parametrize(
    "odd",
    [
        {"topic": "unknown"},
        {"partition": _PARTITIONS},
        {"value": bytes(MOST_BYTES), "key": b"k"},
    ],
    ids=["unknown topic", "no such partition", "too large"],
)
def test_what_is_kafka_python_s_to_judge_is_left_and_the_others_go(odd):
    broker = ScriptedBroker(answer((JOBS_TOPIC, 2, 0, 1)))
    puts = Puts(Cluster(broker.address), "test")
    plain, other = message(partition=2), message(**odd)
    assert puts.put([other, plain]) == [other]
    assert plain.future.result(0) == (JOBS_TOPIC, 2, 1)
    broker.join()


def test_other_brokers_are_kafka_python_s():
    puts = Puts(Cluster(("127.0.0.1", 1), cluster_id="a real one"), "test")
    one = message()
    assert puts.put([one]) == [one]
