"""The consumer pauses, commits and resumes on real brokers, whatever its jobs do."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from kafka import KafkaProducer

from openlora.protocol.names import BATCH_TOPIC, DEAD_TOPIC, JOBS_TOPIC
from producer.topics import ensure_topics
from tests.workers.running import wait_until
from workers import attention, kafka_client
from workers.budgets import Budgets
from workers.consumer import JobConsumer

pytestmark = pytest.mark.services


class Jobs:
    """What the loop would be: takes what is delivered, ends what it is told to."""

    def __init__(self, servers, budgets):
        self.fetched = deque()
        self.retired = []
        self.failures = []
        self.consumer = JobConsumer(
            servers,
            "test",
            budgets,
            deliver=self.fetched.extend,
            retire=self.retired.extend,
            on_failure=self.failures.append,
        )
        self.consumer.connect(5000)
        self.consumer.start()

    def values(self, topic=JOBS_TOPIC):
        return [f.value for f in self.fetched if f.position.partition[0] == topic]

    def end(self, fetched):
        self.consumer.end(fetched.position, fetched.value.decode())

    def leave(self):
        self.consumer.begin_leave()
        assert self.consumer.wait_left(15)
        assert not self.failures


@pytest.fixture
def servers(fresh_broker):
    ensure_topics(fresh_broker.bootstrap_servers, partitions=2)
    return fresh_broker.bootstrap_servers


@pytest.fixture
def quick_join(monkeypatch):
    """The embedded broker lets a first member in after half of its session timeout."""
    monkeypatch.setattr(kafka_client, "SESSION_TIMEOUT_MS", 3_000)


@pytest.fixture
def publish(servers):
    producer = KafkaProducer(bootstrap_servers=servers)

    def send(topic, *values, partition=0):
        for value in values:
            producer.send(topic, value, partition=partition)
        producer.flush()

    yield send
    producer.close(timeout=1)


def test_a_full_budget_pauses_batch_and_leaves_interactive(quick_join, servers, publish):
    jobs = Jobs(servers, Budgets(interactive=50, batch=3))
    publish(BATCH_TOPIC, *(b"b%d" % i for i in range(9)))
    publish(JOBS_TOPIC, b"j0", b"j1")
    wait_until(lambda: len(jobs.values(BATCH_TOPIC)) >= 3 and len(jobs.values()) == 2)
    held = len(jobs.values(BATCH_TOPIC))
    wait_until(lambda: any(status.paused for status in jobs.consumer.status))
    publish(JOBS_TOPIC, b"j2")
    wait_until(lambda: len(jobs.values()) == 3)
    assert len(jobs.values(BATCH_TOPIC)) == held < 9
    ended = 0
    while ended < 9:
        wait_until(lambda: len(jobs.values(BATCH_TOPIC)) > ended)  # noqa: B023
        batch = [f for f in jobs.fetched if f.position.partition[0] == BATCH_TOPIC]
        jobs.end(batch[ended])
        ended += 1
    assert jobs.values(BATCH_TOPIC) == [b"b%d" % i for i in range(9)]
    jobs.leave()


def test_a_quiet_worker_fetches_behind_a_hint(quick_join, servers, publish, monkeypatch):
    monkeypatch.setattr(attention, "QUIET_AFTER_S", 0.0)
    monkeypatch.setattr(attention, "QUIET_PAUSE_S", 60.0)
    jobs = Jobs(servers, Budgets(50, 50))
    publish(JOBS_TOPIC, b"before")
    wait_until(lambda: jobs.values() == [b"before"])
    looking, rests = jobs.consumer.attention, threading.Event()
    rest = looking.rest
    monkeypatch.setattr(looking, "rest", lambda **flows: (rests.set(), rest(**flows)))
    looking.hears_hints(True)
    rests.clear()
    assert rests.wait(20)  # for a minute
    publish(JOBS_TOPIC, b"0")
    publish(BATCH_TOPIC, b"b0", partition=1)
    assert jobs.values() == [b"before"]
    looking.hint()
    wait_until(lambda: jobs.values() == [b"before", b"0"])
    wait_until(lambda: jobs.values(BATCH_TOPIC) == [b"b0"])
    jobs.leave()


@pytest.mark.long
def test_a_member_serves_what_it_keeps_while_another_joins(servers, publish):
    first = Jobs(servers, Budgets(50, 50))
    publish(JOBS_TOPIC, b"before")
    wait_until(lambda: first.values() == [b"before"])
    second = Jobs(servers, Budgets(50, 50))
    wait_until(lambda: first.consumer._assignor.joining)
    # It keeps the lower half of what it has. A round of joining takes 3 s on the embedded broker.
    publish(JOBS_TOPIC, b"meanwhile")
    wait_until(lambda: first.values() == [b"before", b"meanwhile"])
    assert first.consumer._assignor.joining
    second.leave()
    first.leave()


def test_the_next_member_reads_from_the_first_open_job(quick_join, servers, publish):
    first = Jobs(servers, Budgets(50, 50))
    publish(JOBS_TOPIC, b"0", b"1", b"2", b"3")
    wait_until(lambda: len(first.fetched) == 4)
    for index in (0, 1, 3):
        first.end(first.fetched[index])
    wait_until(lambda: sorted(first.retired) == ["0", "1"])
    first.leave()
    second = Jobs(servers, Budgets(50, 50))
    wait_until(lambda: len(second.fetched) == 2)
    assert second.values() == [b"2", b"3"]
    second.leave()


def test_status_says_position_commit_and_lag(quick_join, servers, publish):
    jobs = Jobs(servers, Budgets(50, 50))
    publish(JOBS_TOPIC, b"0", b"1", b"2", partition=1)
    wait_until(lambda: len(jobs.fetched) == 3)
    jobs.end(jobs.fetched[0])

    def status():
        return next(
            (s for s in jobs.consumer.status if (s.topic, s.partition) == (JOBS_TOPIC, 1)), None
        )

    wait_until(lambda: status() and status().committed == 1)
    assert (status().position, status().high_water) == (3, 3)
    assert {s.topic for s in jobs.consumer.status} == {JOBS_TOPIC, BATCH_TOPIC}
    assert DEAD_TOPIC not in {s.topic for s in jobs.consumer.status}
    jobs.leave()
    assert jobs.consumer.status == ()
