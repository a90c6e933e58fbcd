"""When a worker that starts may join the group."""

from __future__ import annotations

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from openlora.protocol.status import PartitionStatus
from tests.joblog.test_log import a_heartbeat
from workers.settling import FRESH_MS, is_settled

NOW = 1_000_000.0


def owner(worker_id, *numbers, topic=JOBS_TOPIC, age_ms=500, ready=True):
    partitions = tuple(PartitionStatus(topic, number, 0, 0, 0) for number in numbers)
    written_ms = int(NOW - age_ms)
    return a_heartbeat(worker_id, written_ms=written_ms, ready=ready, partitions=partitions)


def test_the_first_worker_waits_for_nobody():
    assert is_settled([], 4, NOW)
    assert is_settled([owner("a", ready=False)], 4, NOW)
    assert is_settled([owner("dead", 0, 1, 2, 3, age_ms=FRESH_MS)], 4, NOW)


def test_partitions_of_one_that_died_are_waited_for():
    dead = owner("dead", 0, 1, age_ms=FRESH_MS + 1)
    assert not is_settled([dead, owner("b", 2, 3)], 4, NOW)
    assert is_settled([dead, owner("b", 0, 1, 2, 3)], 4, NOW)


def test_two_that_share_them_are_at_rest_and_batch_partitions_do_not_count():
    assert is_settled([owner("a", 0, 1), owner("b", 2, 3)], 4, NOW)
    assert not is_settled([owner("a", 0, 1), owner("b", 2, 3, topic=BATCH_TOPIC)], 4, NOW)
