"""The backlog: order, room, and messages of partitions that were lost meanwhile."""

from __future__ import annotations

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from workers.backlog import Backlog, Fetched
from workers.budgets import Budgets
from workers.offsets import Position


def message(offset, topic=JOBS_TOPIC, partition=0):
    return Fetched(Position((topic, partition), offset, 1), None, b"")


def offsets(batch):
    return [(fetched.position.partition[0], fetched.position.offset) for fetched in batch]


def owns_all(_):
    return True


def test_interactive_goes_first_and_no_more_than_there_is_room_for():
    backlog = Backlog(Budgets(interactive=4, batch=2))
    for offset in range(3):
        backlog.add(message(offset, BATCH_TOPIC))
    for offset in range(6):
        backlog.add(message(offset))
    assert offsets(backlog.take(owns_all)) == [(JOBS_TOPIC, i) for i in range(4)]
    assert backlog.take(owns_all) == []
    assert backlog.full_topics() == {JOBS_TOPIC, BATCH_TOPIC}
    assert backlog.first_offsets() == {(JOBS_TOPIC, 0): 4, (BATCH_TOPIC, 0): 0}
    for _ in range(4):
        backlog.free(JOBS_TOPIC)
    assert offsets(backlog.take(owns_all)) == [(JOBS_TOPIC, 4), (JOBS_TOPIC, 5)]
    for _ in range(2):
        backlog.free(JOBS_TOPIC)
    assert offsets(backlog.take(owns_all)) == [(BATCH_TOPIC, 0), (BATCH_TOPIC, 1)]
    assert backlog.full_topics() == {BATCH_TOPIC}


def test_a_topic_with_a_message_that_waits_is_not_fetched_from():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    backlog.add(message(0))
    backlog.add(message(1))
    backlog.take(owns_all)
    backlog.free(JOBS_TOPIC)
    assert JOBS_TOPIC in backlog.full_topics()


def test_messages_of_a_lost_partition_are_dropped_and_take_no_room():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    backlog.add(message(0, partition=3))
    backlog.add(message(7, partition=4))
    assert offsets(backlog.take(lambda position: position.partition[1] == 4)) == [(JOBS_TOPIC, 7)]
