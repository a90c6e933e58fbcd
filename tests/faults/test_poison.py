"""A job that kills the engine: it alone is given up, with its story; all others are answered."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from kafka import KafkaConsumer, TopicPartition

from openlora.bench.chaos_streams import Ask
from openlora.joblog import redis_client
from openlora.protocol.names import DEAD_TOPIC
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry

pytestmark = [pytest.mark.services, pytest.mark.timeout(170)]

POISON = "this one holds a soft hyphen: \u00ad"
STREAMS = 12


class Keeper:
    """Starts dead workers again, as ``openlora up`` does."""

    def __init__(self, system):
        self._system = system
        self.restarts = 0

    def tend(self):
        """Once; by the thread that starts processes."""
        for worker in self._system.workers:
            if not worker.running:
                self.restarts += 1
                worker.start()


@pytest.fixture
def ward(storm):
    """The shared system; a dead worker is started again by its keeper."""
    return storm


def wait(storm, keeper, streams, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while any(stream.ended_at is None for stream in streams):
        assert time.monotonic() < deadline, [(s.ask.name, s.finish) for s in streams]
        keeper.tend()
        time.sleep(0.1)


def dead_letters(storm, until=None):
    """All that are there, by job ID; up to that of the job ``until``, which is waited for."""
    consumer = KafkaConsumer(
        bootstrap_servers=storm.system.broker.address,
        auto_offset_reset="earliest",
        consumer_timeout_ms=3000 if until is None else 30_000,
    )
    consumer.assign([TopicPartition(DEAD_TOPIC, 0)])
    letters = {}
    for message in consumer:
        letter = json.loads(message.value)
        letters[letter["job_id"]] = letter
        if letter["job_id"] == until:
            break
    consumer.close()
    return letters


@pytest.mark.long
def test_only_the_job_that_kills_alone_is_given_up(ward):
    keeper = Keeper(ward.system)
    streams = ward.begin(STREAMS)
    fields = {"prompt": POISON, "params": {"max_tokens": 50, "ignore_eos": True}}
    poison = ward.clients.begin(Ask("poison", fields), None)
    wait(ward, keeper, [*streams, poison])
    assert [mishap for stream in streams for mishap in stream.mishaps] == []
    assert poison.finish == "error internal"
    (mishap,) = poison.mishaps
    assert "ended the engine 2 times when nothing else ran (SIGABRT, SIGABRT)" in mishap.detail
    letter = dead_letters(ward, until=poison.job_id)[poison.job_id]
    assert {crash["how"] for crash in letter["story"]} == {"SIGABRT"}
    # the first one may have met it alone, too, where the others ran elsewhere
    assert [crash["jobs"] for crash in letter["story"]][-2:] == [1, 1]
    assert len(letter["story"]) <= 3
    assert keeper.restarts == len(letter["story"])
    ward.system.wait_ready()


@pytest.mark.slow
def test_an_engine_killed_from_outside_counts_for_nobody(ward):
    keeper = Keeper(ward.system)
    streams = ward.begin(STREAMS)
    for worker in ward.system.workers:
        os.kill(worker.engine_pid(), signal.SIGKILL)
        ward.system.wait_until(lambda worker=worker: not worker.running, 20)
        keeper.tend()
        ward.system.wait_ready()
    wait(ward, keeper, streams)
    assert [mishap for stream in streams for mishap in stream.mishaps] == []
    assert set(dead_letters(ward)) & {stream.job_id for stream in streams} == set()
    for worker in ward.system.workers:
        assert "jobs_suspected" not in worker.log_text().rpartition("event=start")[2]


@pytest.mark.slow
def test_an_adapter_that_kills_is_quarantined_for_its_users(ward):
    keeper = Keeper(ward.system)
    content_hash = "dead" * 16
    (ward.system.folder / "store" / content_hash).mkdir(parents=True)
    with redis_client(ward.system.redis.address) as client:
        registry = AdapterRegistry(client)
        registry.put(AdapterRecord("killer", 0, content_hash, 8, ("q_proj",), "tiny", 1, "/x", 0))
    streams = ward.begin(STREAMS)
    for number in range(2):
        fields = {"prompt": f"hello {number}", "adapter": "killer"}
        victim = ward.clients.begin(Ask(f"victim {number}", fields), None)
        wait(ward, keeper, [victim])
        assert victim.finish == "error internal", victim.mishaps
    late = ward.clients.begin(Ask("late", {"prompt": "hello", "adapter": "killer"}), None)
    wait(ward, keeper, [late, *streams])
    assert late.finish == "error adapter_failed"
    assert "adapter 'killer' version 1 is quarantined" in late.mishaps[0].detail
    assert [mishap for stream in streams for mishap in stream.mishaps] == []
