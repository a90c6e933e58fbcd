"""Answers on their way to the broker. The producer is a fake: it refuses one message on demand."""

from __future__ import annotations

import pytest
from kafka.errors import KafkaTimeoutError

from openlora.joblog import redis_client
from openlora.protocol.bulk import RESULTS_TOPIC
from workers.bulk_outlet import BulkOutlet


class Sent:
    """What a producer answers to ``send``."""

    def __init__(self, error=None):
        self.error = error

    def get(self, timeout):
        if self.error is not None:
            raise self.error


class Producer:
    """Takes messages, but for ``refused`` the first time."""

    def __init__(self, refused):
        self.refused = [refused]
        self.sent = []

    def send(self, topic, value):
        if value in self.refused:
            self.refused.remove(value)
            return Sent(KafkaTimeoutError())
        self.sent.append(value)
        return Sent()


def test_a_bundle_is_ended_once_though_one_behind_it_was_refused():
    """Its end frees room in the worker, which an end said twice would free twice."""
    outlet = BulkOutlet("127.0.0.1:1", redis_client("redis://127.0.0.1:1"))
    producer = outlet._producer = Producer(b"2")
    ended = []
    entries = [
        ([(RESULTS_TOPIC, value)], lambda value=value: ended.append(value))
        for value in (b"1", b"2", b"3")
    ]
    with pytest.raises(KafkaTimeoutError):
        outlet._send(entries)
    assert ended == [b"1"]
    outlet._send(entries)
    assert ended == [b"1", b"2", b"3"]
    assert set(producer.sent) == {b"1", b"2", b"3"}
    assert not entries
