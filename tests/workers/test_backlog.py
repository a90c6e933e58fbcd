"""The backlog: order, room, and messages of partitions that were lost meanwhile."""

from __future__ import annotations

import pytest

from openlora.engine.fair_line import IN_A_ROW
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from workers import backlog as backlog_module
from workers.backlog import Backlog, Fetched
from workers.budgets import Budgets
from workers.offsets import Position


def message(offset, topic=JOBS_TOPIC, partition=0):
    return Fetched(Position((topic, partition), offset, 1), None, b"")


def job(offset, tenant="t", key=None, value=None):
    value = b'{"job_id":"x","tenant":"%b","n":[1]}' % tenant.encode() if value is None else value
    return Fetched(Position((JOBS_TOPIC, 0), offset, 1), key, value)


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
    assert backlog.full_topics() == {BATCH_TOPIC}
    assert backlog.first_offsets() == {(JOBS_TOPIC, 0): 4, (BATCH_TOPIC, 0): 0}
    for _ in range(4):
        backlog.free(JOBS_TOPIC)
    assert offsets(backlog.take(owns_all)) == [(JOBS_TOPIC, 4), (JOBS_TOPIC, 5)]
    for _ in range(2):
        backlog.free(JOBS_TOPIC)
    assert offsets(backlog.take(owns_all)) == [(BATCH_TOPIC, 0), (BATCH_TOPIC, 1)]
    assert backlog.full_topics() == {BATCH_TOPIC}


def test_a_batch_topic_with_a_message_that_waits_is_not_fetched_from():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    backlog.add(message(0, BATCH_TOPIC))
    backlog.add(message(1, BATCH_TOPIC))
    backlog.take(owns_all)
    backlog.free(BATCH_TOPIC)
    assert BATCH_TOPIC in backlog.full_topics()


@pytest.mark.parametrize("limit", ["WINDOW_MESSAGES", "WINDOW_BYTES"])
def test_interactive_is_fetched_until_the_window_is_full(limit, monkeypatch):
    monkeypatch.setattr(backlog_module, limit, 3)
    backlog = Backlog(Budgets(interactive=1, batch=1))
    for offset in range(4):
        assert JOBS_TOPIC not in backlog.full_topics()
        backlog.add(job(offset, value=b"x"))
        backlog.take(owns_all)
    assert JOBS_TOPIC in backlog.full_topics()
    backlog.free(JOBS_TOPIC)
    backlog.take(owns_all)
    assert JOBS_TOPIC not in backlog.full_topics()


def take_one(backlog):
    backlog.free(JOBS_TOPIC)
    (fetched,) = backlog.take(owns_all)
    return fetched.position.offset


def test_tenants_take_turns_whatever_was_fetched_first():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    for offset in range(100):
        backlog.add(job(offset, "greedy"))
    assert offsets(backlog.take(owns_all)) == [(JOBS_TOPIC, 0)]
    for offset in range(100, 103):
        backlog.add(job(offset, "modest"))
    assert [take_one(backlog) for _ in range(7)] == [1, 100, 2, 101, 3, 102, 4]
    assert backlog.first_offsets() == {(JOBS_TOPIC, 0): 5}


def test_a_flood_of_one_adapter_keeps_another_waiting_for_one_row_at_most():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    for offset in range(1000):
        backlog.add(job(offset, key=b"flood"))
    backlog.take(owns_all)
    backlog.add(job(1000, key=b"quiet"))
    assert 1000 in [take_one(backlog) for _ in range(IN_A_ROW + 1)]


def test_what_is_no_job_waits_like_one():
    backlog = Backlog(Budgets(interactive=9, batch=1))
    for offset, value in enumerate((b"", b"nonsense", b'{"tenant":5}', b"\xff", b"[" * 5000)):
        backlog.add(job(offset, value=value))
    assert len(backlog.take(owns_all)) == 5


def test_messages_of_a_lost_partition_are_dropped_and_take_no_room():
    backlog = Backlog(Budgets(interactive=1, batch=1))
    backlog.add(message(0, partition=3))
    backlog.add(message(7, partition=4))
    assert offsets(backlog.take(lambda position: position.partition[1] == 4)) == [(JOBS_TOPIC, 7)]
