"""How long the queue is, and who is sent away for it."""

from __future__ import annotations

import pytest

from gateway.queue_estimate import (
    FEW_WAIT,
    MAX_RETRY_AFTER_MS,
    SHORT_QUEUE,
    WINDOW_S,
    QueueEstimate,
)
from openlora.errors import Overloaded
from openlora.protocol.names import BATCH_TOPIC
from openlora.protocol.status import PartitionStatus
from tests.joblog.test_log import a_heartbeat

NOW = 10.0


def beat(committed, position, high_water, waiting=0, partition=0):
    status = PartitionStatus("t", partition, committed, position, high_water)
    return a_heartbeat("w", waiting=waiting, partitions=(status,))


def served(estimate, per_second, depth, seconds=10):
    for now in range(seconds + 1):
        done = now * per_second
        estimate.update([beat(done, done, done + depth)], float(now))


def test_the_wait_is_what_waits_over_what_is_served():
    estimate = QueueEstimate(60)
    served(estimate, per_second=20, depth=1020)
    assert (estimate.depth, estimate.rate) == (1020, 20)
    assert estimate.wait_s(NOW) == 50
    estimate.take(None, NOW)
    estimate = QueueEstimate(60)
    served(estimate, per_second=20, depth=1420)
    with pytest.raises(Overloaded, match="1400 jobs wait, about 70 s of work") as caught:
        estimate.take(None, NOW)
    assert caught.value.retry_after_ms == 10_000


def test_what_was_taken_since_the_heartbeats_is_counted_until_they_tell_of_it():
    estimate = QueueEstimate(10)
    served(estimate, per_second=20, depth=20)
    for _ in range(211):  # 20 waited, and 30 were served meanwhile
        estimate.take(None, NOW + 0.5)
    with pytest.raises(Overloaded):
        estimate.take(None, NOW + 0.5)
    estimate.update([beat(210, 210, 220)], NOW + 1.0)  # as of NOW
    assert estimate.depth_at(NOW + 1.0) == pytest.approx(10 + 211 - 20, abs=2)
    estimate.update([beat(220, 220, 431)], NOW + 2.0)
    assert estimate.depth_at(NOW + 2.0) == pytest.approx(211 - 20, abs=2)


def test_a_deadline_that_the_queue_would_eat_up_is_refused_at_once():
    estimate = QueueEstimate(60)
    served(estimate, per_second=20, depth=400)
    estimate.take(30.0, NOW)
    with pytest.raises(Overloaded, match="could not start within 5 s"):
        estimate.take(5.0, NOW)


def test_a_short_queue_and_an_unknown_pace_refuse_nobody():
    estimate = QueueEstimate(1)
    estimate.take(0.1, 0.0)
    estimate.update([beat(0, 0, SHORT_QUEUE)], 0.0)
    estimate.update([beat(0, 0, SHORT_QUEUE)], 10.0)
    estimate.take(0.1, 10.0)
    estimate.update([beat(0, 0, 5000)], 20.0)  # nothing has ended yet: long jobs, or a start
    estimate.take(0.1, 20.0)


def test_what_was_served_long_ago_does_not_count_and_a_handover_is_no_leap():
    estimate = QueueEstimate(60)
    served(estimate, per_second=100, depth=1000)
    late = 10 + WINDOW_S + 1
    estimate.update([beat(1000, 1000, 2000)], late)
    estimate.update([beat(1010, 1010, 2010)], late + 10)
    assert estimate.rate == 1
    estimate.update([beat(5_000_000, 5_000_000, 5_000_100, partition=9)], late + 20)
    assert estimate.rate == 0.5  # that is, nothing in those ten seconds
    assert estimate.depth == 100


def test_the_pace_is_known_as_soon_as_something_was_served_while_others_waited():
    estimate = QueueEstimate(60)
    for now in range(20):  # nothing was ever fetched from the partition
        estimate.update([beat(0, 0, -1)], float(now))
    estimate.update([beat(0, 10, 510)], 20.0)
    assert not estimate.rate
    estimate.update([beat(50, 60, 510)], 21.0)
    assert estimate.rate == 50


def test_what_is_served_while_nobody_waits_is_no_pace():
    estimate = QueueEstimate(60)
    for now in range(20):
        estimate.update([beat(now, now, now)], float(now))
    assert estimate.rate is None
    estimate.update([beat(20, 20, 520)], 20.0)
    estimate.update([beat(120, 120, 520)], 21.0)
    assert estimate.rate == 100


def test_a_trickle_is_no_pace_for_the_crowd_behind_it():
    estimate = QueueEstimate(60)
    served(estimate, per_second=3, depth=FEW_WAIT)  # each is served as soon as it comes
    for _ in range(500):
        estimate.take(None, NOW + 0.5)
    estimate.update([beat(30, 30, 530)], NOW + 1)
    estimate.update([beat(130, 130, 530)], NOW + 2)
    assert estimate.rate == 100


def test_nobody_is_told_to_come_back_in_an_hour():
    estimate = QueueEstimate(1)
    served(estimate, per_second=1, depth=100_000)
    with pytest.raises(Overloaded) as caught:
        estimate.take(None, NOW)
    assert caught.value.retry_after_ms == MAX_RETRY_AFTER_MS


def crowd_of(gateways, *, is_shared):
    """How many of a crowd are let in by so many gateways together, at 20 a second and 10 s."""
    estimates = [QueueEstimate(10) for _ in range(gateways)]
    for estimate in estimates:
        served(estimate, per_second=20, depth=20)
        if is_shared:
            estimate.update([beat(200, 200, 220)], NOW, 1000)
    arrived, accepted = 1000, 0
    for number in range(1000):
        estimate = estimates[number % gateways]
        try:
            estimate.take(None, NOW + 0.5)
            if is_shared:
                estimate.counted(arrived + 1, None, NOW + 0.5)
                arrived += 1
        except Overloaded:
            continue
        accepted += 1
    return accepted


def test_several_gateways_let_in_no_more_than_one():
    alone = crowd_of(1, is_shared=True)
    assert alone == pytest.approx(crowd_of(1, is_shared=False), abs=1)
    assert crowd_of(4, is_shared=False) > 2 * alone
    assert crowd_of(4, is_shared=True) <= alone + 1


def test_what_other_gateways_took_long_ago_or_on_another_counter_is_no_crowd():
    estimate = QueueEstimate(10)
    served(estimate, per_second=20, depth=20)
    for second in range(5):
        now = NOW + second
        estimate.update([beat(200, 200, 220)], now, 1000 + 10_000 * second)
    estimate.update([beat(200, 200, 220)], NOW + 5, 41_010)
    estimate.update([beat(200, 200, 220)], NOW + 6, 41_010)
    assert estimate.depth_at(NOW + 6) <= 20
    estimate.take(None, NOW + 6)
    estimate.update([beat(200, 200, 220)], NOW + 7, 3)  # Redis came back empty
    assert estimate.depth_at(NOW + 7) <= 21
    estimate.counted(4, None, NOW + 7)


def test_a_batch_refuses_nobody():
    """Its lines fill the engine, one more for two seats waits there, bundles wait behind it; and a
    bundle of many long lines is served in minutes."""
    estimate = QueueEstimate(60)
    for now in range(30):
        status = PartitionStatus(BATCH_TOPIC, 0, now // 10, now // 10 + 10, 300)
        beats = [a_heartbeat("w", waiting=128, waiting_batch=128, partitions=(status,))]
        estimate.update(beats, float(now))
    assert estimate.wait_s(30.0) == 0
    estimate.take(1.0, 30.0)
