"""The same on Apache Kafka, whose group moves quickly and which keeps what it acknowledged."""

from __future__ import annotations

import pytest

from openlora.bench import chaos_faults as faults
from openlora.bench.chaos_system import ChaosPlan
from tests.faults.test_failover import check
from tests.services import start_broker

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]

FAILOVER_S = 9.0
"""Session timeout, and 3 s for the rebalance and the next token."""


@pytest.fixture(scope="module")
def kafka_storm(make_storm, tmp_path_factory):
    broker = start_broker("kafka", tmp_path_factory.mktemp("kafka"))
    yield make_storm(ChaosPlan(engine="scripted:20"), broker, tokens=240)
    broker.stop()


def test_kill_9_of_a_whole_worker(kafka_storm):
    check(kafka_storm.strike("worker", faults.kill_whole_worker), stall_s=FAILOVER_S)


def test_kill_9_of_an_engine(kafka_storm):
    check(kafka_storm.strike("engine", faults.kill_engine), stall_s=1.0)


def test_a_worker_leaves_and_comes_back(kafka_storm):
    check(kafka_storm.strike("leave", faults.worker_leaves), stall_s=1.0)


def test_a_zombie_adds_nothing(kafka_storm):
    check(kafka_storm.strike("zombie", faults.zombie), stall_s=FAILOVER_S)


def test_kill_9_of_the_broker(kafka_storm):
    row = kafka_storm.strike("broker", faults.broker_restarts)
    # streams need no broker; only what is asked meanwhile has to wait
    check(row, stall_s=2.0)
    assert row.restarted == 0


def test_partitions_are_added_under_streams(kafka_storm):
    def scale(system, _):
        said = system.command("topics", "scale", "16")
        assert "openlora.jobs has 16 partitions" in said, said

    row = kafka_storm.strike("scale", scale)
    check(row, stall_s=2.0)
    assert row.restarted == 0
    said = kafka_storm.system.command("topics", "scale", "8")
    assert "has 16 partitions already, and Kafka takes none away" in said
