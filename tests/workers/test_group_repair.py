"""The embedded broker's group, stuck by a member that left while it joined, is rebuilt."""

from __future__ import annotations

import threading
import time

import pytest
from kafka.admin import KafkaAdminClient
from kafka.structs import OffsetAndMetadata, TopicPartition

from openlora.protocol.names import JOB_TOPICS, JOBS_TOPIC, WORKER_GROUP
from producer.topics import ensure_topics
from tests.workers.running import wait_until
from workers.assignor import SamePartitionsAssignor
from workers.group_repair import rebuild_group
from workers.kafka_client import connect_consumer

pytestmark = [pytest.mark.services, pytest.mark.slow]


class Member:
    """One consumer of the group, polled by a thread of its own."""

    def __init__(self, servers):
        self.assignor = SamePartitionsAssignor()
        self._consumer = connect_consumer(servers, "member", self.assignor, 5000)
        self._consumer.subscribe(topics=JOB_TOPICS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stopping.is_set():
            self._consumer.poll(25)

    def leave(self):
        self._stopping.set()
        self._thread.join()
        self._consumer.close(autocommit=False, timeout_ms=3000)


def test_a_stuck_group_lets_members_in_again_and_keeps_its_offsets(fresh_broker):
    servers = fresh_broker.bootstrap_servers
    ensure_topics(servers, 4)
    first, second = Member(servers), Member(servers)
    wait_until(lambda: first.assignor.joined and second.assignor.joined)
    admin = KafkaAdminClient(bootstrap_servers=servers)
    kept = TopicPartition(JOBS_TOPIC, 2)
    second._consumer.commit({kept: OffsetAndMetadata(7, "", -1)})
    first.leave()
    wait_until(lambda: second.assignor.joining)
    second.leave()  # without waiting for the answer, as a worker that is killed
    third = Member(servers)
    time.sleep(10)
    is_stuck = not third.assignor.joined
    third.leave()
    if not is_stuck:
        pytest.skip("this broker does not get stuck")
    rebuild_group(servers)
    fourth = Member(servers)
    wait_until(lambda: fourth.assignor.joined)
    fourth.leave()
    assert admin.list_group_offsets(WORKER_GROUP)[WORKER_GROUP][kept].offset == 7
    admin.close()
