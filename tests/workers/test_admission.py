"""Jobs that cannot run: each a clear end, and the partition moves on."""

from __future__ import annotations

import base64
import json
import time

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from openlora.protocol.codec import decode_job, encode
from openlora.protocol.jobs import AdapterRef, Merge, Message
from openlora.protocol.names import DEAD_TOPIC, JOBS_TOPIC
from tests.workers.running import a_job, wait_until
from workers.scripted_engine import SCRIPTED_MODEL_LEN

pytestmark = pytest.mark.services


def dead_letters(system):
    """All that were written until now."""
    consumer = KafkaConsumer(bootstrap_servers=system.kafka)
    numbers = consumer.partitions_for_topic(DEAD_TOPIC) or ()
    partitions = [TopicPartition(DEAD_TOPIC, number) for number in numbers]
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    ends = consumer.end_offsets(partitions)
    letters = []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for messages in consumer.poll(1000).values():
            letters += [json.loads(message.value) for message in messages]
    consumer.close()
    return letters


@pytest.mark.parametrize("value", [b"\xff\x00junk", b'{"job_id":"x"}', b""])
def test_a_message_that_is_no_job_is_kept_and_passed(shared_system, value):
    system = shared_system
    offset = system.publish(value, partition=2)
    job = a_job()
    system.submit(job, partition=2)
    assert system.end(job).finish_reason == "length"
    wait_until(lambda: system.committed(partition=2) == offset + 2)
    (letter,) = [
        letter
        for letter in dead_letters(system)
        if (letter["partition"], letter["offset"]) == (2, offset)
    ]
    assert base64.b64decode(letter["value"]) == value
    assert letter["topic"] == JOBS_TOPIC
    assert "not a valid job" in letter["reason"]


def letters_of(system, job):
    return [letter for letter in dead_letters(system) if letter["job_id"] == job.job_id]


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "", "é" * 26])
def test_an_id_that_no_log_can_be_kept_under_is_passed(shared_system, job_id):
    system = shared_system
    offset = system.publish(encode(msgspec.structs.replace(a_job(), job_id=job_id)), partition=3)
    job = a_job()
    system.submit(job, partition=3)
    assert system.end(job).finish_reason == "length"
    wait_until(lambda: system.committed(partition=3) == offset + 2)
    (letter,) = [
        letter
        for letter in dead_letters(system)
        if (letter["partition"], letter["offset"]) == (3, offset)
    ]
    assert "is no job ID" in letter["reason"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * SCRIPTED_MODEL_LEN},
        {"prompt": None},
        {"prompt": "x", "messages": (Message("user", "hi"),)},
        {"prompt": None, "messages": ()},
        {"adapters": (AdapterRef("pirate", 1, "0" * 64),)},
    ],
)
def test_a_job_that_cannot_run_ends_with_the_reason_and_is_kept(shared_system, fields):
    system = shared_system
    job = a_job(**fields)
    end = system.run(job)
    assert end.failure is not None
    wait_until(lambda: letters_of(system, job))
    (letter,) = letters_of(system, job)
    assert (letter["code"], letter["reason"]) == (end.failure.code, end.failure.message)
    value = base64.b64decode(letter["value"])
    assert len(value) == letter["value_bytes"]
    assert decode_job(value) == job


def test_a_merge_method_it_does_not_know_fails_the_job_and_is_kept(shared_system):
    job = a_job(merge=Merge(method="ties"))
    end = shared_system.run(job)
    assert end.failure.code == "invalid_request"
    assert "'ties'" in end.failure.message
    wait_until(lambda: letters_of(shared_system, job))


def test_a_prompt_over_the_context_is_refused(shared_system):
    end = shared_system.run(a_job(prompt="x" * SCRIPTED_MODEL_LEN))
    assert end.failure.code == "prompt_too_long"
    assert str(SCRIPTED_MODEL_LEN) in end.failure.message
    assert not end.failure.retriable


def test_an_empty_prompt_is_refused(shared_system):
    assert shared_system.run(a_job(prompt="")).failure.code == "invalid_request"


def test_a_deadline_that_has_passed_ends_the_job(shared_system):
    end = shared_system.run(a_job(deadline_ms=int(time.time() * 1000) - 1))
    assert end.failure.code == "deadline_exceeded"
    assert end.completion_tokens == 0


def test_a_job_past_its_deadline_never_reaches_the_engine(shared_system):
    """Its prompt would end the scripted engine, and the worker with it."""
    system = shared_system
    (worker,) = system.workers
    engine_pid = system.heartbeat(worker).engine_pid
    late = a_job(prompt="a soft hyphen: \u00ad", deadline_ms=int(time.time() * 1000) - 1)
    assert system.run(late).failure.code == "deadline_exceeded"
    assert system.run(a_job(max_tokens=9)).finish_reason == "length"
    assert system.is_ready(worker)
    assert system.heartbeat(worker).engine_pid == engine_pid


def test_a_job_cancelled_before_it_started_never_starts(shared_system):
    system = shared_system
    job = a_job()
    system.store(job)
    system.cancel(job)
    system.publish(encode(job))
    end = system.end(job)
    assert (end.finish_reason, end.completion_tokens) == ("cancelled", 0)


@pytest.mark.parametrize("content_hash", ["0" * 64, "../../etc"])
def test_an_adapter_that_is_not_in_the_store_fails_the_job(shared_system, content_hash):
    job = a_job(adapters=(AdapterRef("pirate", 1, content_hash),))
    end = shared_system.run(job)
    assert end.failure.code == "adapter_failed"


def test_messages_go_through_the_chat_template(shared_system):
    job = a_job(prompt=None, messages=(Message("user", "hi"),))
    end = shared_system.run(job)
    assert end.prompt_tokens == len("<user>hi<assistant>")


def test_messages_that_the_template_refuses_are_an_error(shared_system):
    job = a_job(prompt=None, messages=(Message("forbidden", "hi"),))
    end = shared_system.run(job)
    assert end.failure.code == "invalid_request"
    assert "no such role" in end.failure.message
