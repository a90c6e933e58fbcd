"""The publisher against both brokers: acknowledged means stored; what fails says so soon."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import wait
from typing import Any

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from openlora.errors import Overloaded, PayloadTooLarge, SetupError
from openlora.protocol import codec
from openlora.protocol.jobs import AdapterRef, Job, Message
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from producer import publisher as publisher_module
from producer.partitioner import key_of, partition_of
from producer.publisher import DELIVERY_TIMEOUT_MS, Publisher
from producer.topics import ensure_topics
from tests.conftest import Broker
from tests.producer.test_partitioner import a_job

pytestmark = pytest.mark.services
_PARTITIONS = 6


def _topic_of_one_taken(publisher: Publisher, job: Job | None = None) -> str:
    """Publishes as clients do: again where it is refused for the moment. Right behind its start
    the embedded broker now and then answers UnknownError."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return publisher.publish(job or a_job()).result(20)[0]
        except Overloaded:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def read_messages(servers: str, places: Iterable[tuple[str, int, int]]) -> dict:
    """The messages found at these places, by place."""
    consumer = KafkaConsumer(bootstrap_servers=servers, allow_auto_create_topics=False)
    firsts: defaultdict[TopicPartition, list[int]] = defaultdict(list)
    for topic, partition, offset in places:
        firsts[TopicPartition(topic, partition)].append(offset)
    consumer.assign(list(firsts))
    for partition, offsets in firsts.items():
        consumer.seek(partition, min(offsets))
    found: dict[tuple[str, int, int], tuple[bytes | None, bytes]] = {}
    deadline = time.monotonic() + 20
    while set(places) - found.keys():
        assert time.monotonic() < deadline, f"{len(found)} messages came"
        for messages in consumer.poll(200).values():
            found |= {(m.topic, m.partition, m.offset): (m.key, m.value) for m in messages}
    consumer.close()
    return found


def test_an_acknowledged_job_is_where_the_future_says(broker: Broker) -> None:
    partitions = ensure_topics(broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(broker.bootstrap_servers)
    jobs = [
        a_job(*adapters, priority=priority)
        for priority in ("interactive", "batch")
        for adapters in ((), *((AdapterRef(f"adapter-{i}", 1, "h"),) for i in range(20)))
    ]
    futures = [publisher.publish(job) for job in jobs]
    places = [future.result(20) for future in futures]
    publisher.close()
    found = read_messages(broker.bootstrap_servers, places)
    for job, place in zip(jobs, places, strict=True):
        key, value = found[place]
        assert codec.decode_job(value) == job
        assert key == key_of(job)
        assert place[0] == (BATCH_TOPIC if job.priority == "batch" else JOBS_TOPIC)
        if key is not None:
            assert place[1] == partition_of(key, partitions[place[0]])


def test_a_job_too_large_fails_alone(broker: Broker) -> None:
    ensure_topics(broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(broker.bootstrap_servers)
    large = a_job(AdapterRef("x" * 1_000_001, 1, "h"))
    futures = [publisher.publish(job) for job in (a_job(), large, a_job())]
    with pytest.raises(PayloadTooLarge, match="larger than 1000000 bytes"):
        futures[1].result(20)
    assert [futures[i].result(20)[0] for i in (0, 2)] == [JOBS_TOPIC] * 2
    publisher.close()


def test_close_sends_what_is_queued(broker: Broker) -> None:
    ensure_topics(broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(broker.bootstrap_servers)
    futures = [publisher.publish(a_job()) for _ in range(200)]
    publisher.close()
    assert all(future.done() and future.exception() is None for future in futures)
    publisher.close()
    with pytest.raises(Overloaded, match="shutting down"):
        publisher.publish(a_job()).result(0)


def test_a_broker_that_is_away_fails_in_time_and_is_found_again(fresh_broker: Broker) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    publisher.publish(a_job()).result(20)
    fresh_broker.server.kill()
    future = publisher.publish(a_job())
    assert not future.done()  # it does not wait for what becomes of it
    with pytest.raises(Overloaded, match=r"did not take the job .*; try again") as caught:
        future.result(3 * DELIVERY_TIMEOUT_MS / 1000)
    assert caught.value.retry_after_ms is not None
    fresh_broker.server.start()
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    assert _topic_of_one_taken(publisher) == JOBS_TOPIC
    publisher.close()


def test_a_broker_that_returns_soon_is_not_noticed(fresh_broker: Broker) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    publisher.publish(a_job()).result(20)
    fresh_broker.server.kill()
    future = publisher.publish(a_job())
    fresh_broker.server.start()
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    assert future.result(20)[0] == JOBS_TOPIC
    publisher.close()


def test_waiting_jobs_are_bounded(fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "MAX_UNACKNOWLEDGED", 10)
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    publisher.publish(a_job()).result(20)
    fresh_broker.server.kill()
    waiting = [publisher.publish(a_job()) for _ in range(10)]
    with pytest.raises(Overloaded, match="10 jobs wait for the broker already"):
        publisher.publish(a_job()).result(0)
    fresh_broker.server.start()
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    wait(waiting, 20)
    assert _topic_of_one_taken(publisher) == JOBS_TOPIC
    publisher.close()


def test_what_waiting_jobs_hold_is_bounded_too(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_UNACKNOWLEDGED_CHARS", 1000)
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    publisher.publish(a_job()).result(20)
    fresh_broker.server.kill()
    half = [msgspec.structs.replace(a_job(), prompt="x" * 400) for _ in range(2)]
    waiting = [publisher.publish(job) for job in half]
    said = (Message("user", "x" * 300),)
    long = msgspec.structs.replace(a_job(), prompt=None, messages=said)
    with pytest.raises(Overloaded, match="2 jobs wait for the broker already"):
        publisher.publish(long).result(0)
    fresh_broker.server.start()
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    wait(waiting, 20)
    assert _topic_of_one_taken(publisher, long) == JOBS_TOPIC
    publisher.close()


def test_a_job_given_up_while_it_waits_is_not_sent_and_holds_up_nobody(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, 1)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    may_send = threading.Event()
    send = publisher._send

    def send_later(*job: Any) -> None:
        may_send.wait(20)
        send(*job)

    monkeypatch.setattr(publisher, "_send", send_later)
    first, given_up, last = (publisher.publish(a_job()) for _ in range(3))
    assert given_up.cancel()
    may_send.set()
    assert [first.result(20)[2], last.result(20)[2]] == [0, 1]
    publisher.close()


def test_jobs_of_a_topic_that_is_not_known_wait_beside_each_other(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "DELIVERY_TIMEOUT_MS", 1000)
    monkeypatch.setattr(publisher_module, "_REQUEST_TIMEOUT_MS", 500)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    assert fresh_broker.server.pid is not None
    os.kill(fresh_broker.server.pid, signal.SIGSTOP)
    futures = [publisher.publish(a_job())]
    assert wait(futures, 0.4).not_done  # meanwhile the others come, and are taken together
    futures += [publisher.publish(a_job()) for _ in range(5)]
    assert not wait(futures, 3).not_done
    for future in futures:
        with pytest.raises(Overloaded, match="did not take the job"):
            future.result(0)
    fresh_broker.server.kill()
    publisher.close()


def test_a_broker_that_hangs_leaves_the_interpreter_to_others(fresh_broker: Broker) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, _PARTITIONS)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    _topic_of_one_taken(publisher)
    assert fresh_broker.server.pid is not None
    os.kill(fresh_broker.server.pid, signal.SIGSTOP)
    deadline, used_s = time.monotonic() + 3, time.process_time()
    futures = []
    while time.monotonic() < deadline:
        futures.append(publisher.publish(a_job()))
        wait(futures, 0.02)
    assert time.process_time() - used_s < 1
    os.kill(fresh_broker.server.pid, signal.SIGCONT)
    assert not wait(futures, 20).not_done
    publisher.close()


def test_a_job_that_cannot_be_sent_at_all_is_refused_and_others_are_not(
    fresh_broker: Broker,
) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, 1)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    with pytest.raises(Overloaded, match="surrogates"):
        publisher.publish(msgspec.structs.replace(a_job(), prompt="\ud800")).result(20)
    assert _topic_of_one_taken(publisher) == JOBS_TOPIC
    publisher.close()


def test_a_job_that_is_published_during_a_close_is_sent(
    fresh_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_topics(fresh_broker.bootstrap_servers, 1)
    publisher = Publisher(fresh_broker.bootstrap_servers)
    _topic_of_one_taken(publisher)
    take = publisher._room.take
    closing = threading.Thread(target=publisher.close)

    def take_late(chars: int) -> bool:
        closing.start()
        closing.join(0.5)  # it has its chance
        return take(chars)

    monkeypatch.setattr(publisher._room, "take", take_late)
    assert publisher.publish(a_job()).result(5)[0] == JOBS_TOPIC
    closing.join(20)


def test_no_broker_is_one_clear_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "_CONNECT_TIMEOUT_MS", 300)
    with pytest.raises(SetupError, match=rf"no Kafka broker answers at 127\.0\.0\.1:{port}"):
        Publisher(f"127.0.0.1:{port}")
