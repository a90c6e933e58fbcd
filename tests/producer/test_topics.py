"""Topics on both brokers, and the operators' table."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from kafka.admin import KafkaAdminClient
from kafka.errors import UnknownTopicOrPartitionError

from openlora.errors import SetupError
from openlora.protocol.bulk import RESULTS_TOPIC
from openlora.protocol.names import BATCH_TOPIC, DEAD_TOPIC, JOBS_TOPIC
from openlora.protocol.status import PartitionStatus
from producer.topics import (
    PartitionRow,
    TopicKeeper,
    describe_partitions,
    ensure_topics,
    partitions_without_owner,
)
from tests.conftest import Broker
from tests.joblog.test_log import a_heartbeat


def _delete(servers: str, topics: set[str]) -> None:
    """Delete those that exist; returns once the broker does not show them."""
    admin = KafkaAdminClient(bootstrap_servers=servers)
    deadline = time.monotonic() + 20
    while found := topics & {topic["name"] for topic in admin.describe_topics()}:
        assert time.monotonic() < deadline, f"{found} cannot be deleted"
        with suppress(UnknownTopicOrPartitionError):
            admin.delete_topics(list(found))
    admin.close()


@pytest.mark.services
def test_topics_are_made_once_with_the_number_of_partitions(broker: Broker) -> None:
    servers = broker.bootstrap_servers
    made = {JOBS_TOPIC: 5, BATCH_TOPIC: 5, DEAD_TOPIC: 1, RESULTS_TOPIC: 4}
    _delete(servers, set(made))
    assert ensure_topics(servers, 5) == made
    # What exists keeps its partitions: a new setting does not move anybody's adapters.
    assert ensure_topics(servers, 7) == made
    _delete(servers, {BATCH_TOPIC})
    with TopicKeeper(servers, 7) as keeper:
        assert keeper.ensure() == made | {BATCH_TOPIC: 7}
        assert keeper.ensure() == made | {BATCH_TOPIC: 7}


@pytest.mark.services
def test_topics_come_back_after_an_in_memory_broker_restarted(fresh_broker: Broker) -> None:
    with TopicKeeper(fresh_broker.bootstrap_servers, 4) as keeper:
        made = keeper.ensure()
        fresh_broker.server.kill()
        fresh_broker.server.start()
        assert (
            keeper.ensure()
            == made
            == {JOBS_TOPIC: 4, BATCH_TOPIC: 4, DEAD_TOPIC: 1} | {RESULTS_TOPIC: 4}
        )


@pytest.mark.services
def test_topics_that_an_in_memory_broker_made_by_itself_are_made_anew(fresh_broker: Broker) -> None:
    """With its own number of partitions, for a consumer that was quicker than the keeper."""
    servers = fresh_broker.bootstrap_servers
    with TopicKeeper(servers, 8) as keeper:
        made = keeper.ensure()
        fresh_broker.server.kill()
        fresh_broker.server.start()
        ensure_topics(servers, 3)
        with TopicKeeper(servers, 8) as stranger:
            # Who has not seen them before cannot tell: they may be so on purpose.
            assert stranger.ensure()[JOBS_TOPIC] == 3
        assert keeper.losses == 0
        assert keeper.ensure() == made
        assert keeper.ensure() == made
        assert keeper.losses == 1


@pytest.mark.services
def test_a_broker_that_stays_away_for_long_is_found_again(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.topics._TIMEOUT_MS", 500)
    with TopicKeeper(fresh_broker.bootstrap_servers, 4) as keeper:
        made = keeper.ensure()
        fresh_broker.server.kill()
        for _ in range(2):
            with pytest.raises(SetupError):
                keeper.ensure()
        fresh_broker.server.start()
        assert keeper.ensure() == made


def test_no_broker_is_one_clear_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.topics._TIMEOUT_MS", 300)
    with pytest.raises(SetupError, match=rf"no Kafka broker answers at 127\.0\.0\.1:{port}"):
        ensure_topics(f"127.0.0.1:{port}")


def test_rows_show_owners_and_lag() -> None:
    old = PartitionStatus("t", 1, committed=2, position=4, high_water=5)
    new = PartitionStatus("t", 1, committed=3, position=6, high_water=9, paused=True)
    unknown = PartitionStatus("u", 0, committed=4, position=4, high_water=-1)
    heartbeats = [
        a_heartbeat("b", written_ms=20, partitions=(new,)),
        a_heartbeat("a", written_ms=10, partitions=(old, unknown)),
    ]
    counts = {"t": 3, "s": 1}
    assert partitions_without_owner(counts, heartbeats) == [("s", 0), ("t", 0), ("t", 2)]
    # what the broker says of a partition with an owner is older than the owner's word
    from_broker = {("t", 0): (2, 7), ("t", 1): (0, 1), ("u", 5): (1, 1)}
    assert describe_partitions(counts, heartbeats, from_broker) == [
        PartitionRow("s", 0),
        PartitionRow("t", 0, (), 2, 2, 7, lag=5),
        PartitionRow("t", 1, ("a", "b"), 3, 6, 9, lag=6, paused=True),
        PartitionRow("t", 2),
        PartitionRow("u", 0, ("a",), 4, 4, -1, lag=0),
    ]
    assert describe_partitions({}, [], {}) == []
