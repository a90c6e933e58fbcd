"""Jobs from the topic to their logs, through a real worker."""

from __future__ import annotations

import time

import pytest

from openlora.protocol.codec import decode_chunks, encode
from openlora.protocol.events import Chunk, Token
from openlora.protocol.names import BATCH_TOPIC, events_channel, job_key, log_key
from tests.workers.running import SHARD, a_job, wait_until
from workers.scripted_engine import script

pytestmark = pytest.mark.services


def expected_ids(job, count):
    first = sum(ord_of(char) for char in job.prompt)
    return [script(first, index) for index in range(count)]


def ord_of(char):
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet()).index(char)


def test_a_job_becomes_tokens_in_the_log_and_on_the_channel(shared_system):
    system = shared_system
    pubsub = system.redis.pubsub()
    pubsub.ssubscribe(events_channel(SHARD))
    job = a_job(max_tokens=5)
    end = system.run(job)
    tokens = system.tokens(job)
    assert [token.token_id for token in tokens] == expected_ids(job, 5)
    assert "".join(token.text for token in tokens) + end.text == "".join(
        f" w{token.token_id}" for token in tokens
    )
    assert (end.finish_reason, end.failure) == ("length", None)
    assert (end.prompt_tokens, end.completion_tokens) == (len(job.prompt), 5)
    assert 0 < end.queue_ms <= end.ttft_ms <= end.total_ms
    heard = []

    def collect():
        message = pubsub.get_message(timeout=0.1)
        if message and message["type"] == "smessage":
            heard.extend(c for c in decode_chunks(message["data"]) if c.job_id == job.job_id)
        return heard and heard[-1].end

    wait_until(collect)
    pubsub.close()
    assert sum(len(chunk.tokens) for chunk in heard) == 5


def test_the_offset_is_committed_behind_the_end_and_the_log_retired(shared_system):
    system = shared_system
    job = a_job()
    offset = system.submit(job, partition=1)
    system.end(job)
    wait_until(lambda: system.committed(partition=1) == offset + 1)
    wait_until(lambda: 0 < system.redis.ttl(job_key(job.job_id)) <= 3600)


def test_a_long_job_holds_back_the_commit_of_those_behind_it(shared_system):
    system = shared_system
    long, short = a_job(max_tokens=100_000), a_job(max_tokens=1)
    first = system.submit(long, partition=2)
    second = system.submit(short, partition=2)
    system.end(short)
    assert system.committed(partition=2) <= first
    system.cancel(long)
    system.end(long)
    wait_until(lambda: system.committed(partition=2) == second + 1)


def test_batch_jobs_run_too(shared_system):
    job = a_job(priority="batch", leased=False)
    shared_system.submit(job, topic=BATCH_TOPIC)
    assert shared_system.end(job).finish_reason == "length"


def test_a_message_of_a_running_job_is_not_run_twice(shared_system):
    system = shared_system
    job = a_job(max_tokens=60)
    system.submit(job, partition=3)
    wait_until(lambda: system.tokens(job))
    offset = system.publish(encode(job), partition=3)
    end = system.end(job)
    assert end.completion_tokens == 60
    assert len({chunk.epoch for chunk in system.chunks(job)}) == 1
    wait_until(lambda: system.committed(partition=3) == offset + 1)


def test_a_message_of_an_ended_job_is_skipped(shared_system):
    system = shared_system
    job = a_job()
    system.run(job)
    chunks = system.chunks(job)
    offset = system.publish(encode(job))
    wait_until(lambda: system.committed() == offset + 1)
    assert system.chunks(job) == chunks


def test_a_cancel_ends_a_running_job_with_its_usage(shared_system):
    system = shared_system
    job = a_job(max_tokens=100_000)
    system.submit(job)
    wait_until(lambda: len(system.tokens(job)) > 3)
    system.cancel(job)
    end = system.end(job)
    assert end.finish_reason == "cancelled"
    assert end.completion_tokens == len(system.tokens(job))


def test_a_lease_that_nobody_renews_cancels_the_job(shared_system):
    system = shared_system
    job = a_job(max_tokens=100_000)
    system.store(job, lease_ms=300)
    system.publish(encode(job))
    assert system.end(job).finish_reason == "cancelled"


def test_a_deadline_ends_a_running_job(shared_system):
    system = shared_system
    job = a_job(max_tokens=100_000, deadline_ms=int(time.time() * 1000) + 1500)
    end = system.run(job)
    assert end.failure.code == "deadline_exceeded"
    assert end.completion_tokens == len(system.tokens(job)) > 0


def test_a_stop_string_ends_the_text_before_it(shared_system):
    system = shared_system
    plain = a_job(max_tokens=6)
    ids = expected_ids(plain, 6)
    job = a_job(max_tokens=6, params={"stop": (f"{ids[2]} w{ids[3]}",)})
    end = system.run(job)
    assert end.finish_reason == "stop"
    text = "".join(token.text for token in system.tokens(job)) + end.text
    assert text == f" w{ids[0]} w{ids[1]} w"
    assert end.completion_tokens == 4


def test_held_back_text_comes_with_the_end(shared_system):
    system = shared_system
    ids = expected_ids(a_job(), 3)
    job = a_job(max_tokens=3, params={"stop": (f" w{ids[2]}!",)})
    end = system.run(job)
    assert end.finish_reason == "length"
    assert end.text == f" w{ids[2]}"
    assert system.tokens(job)[2].text == ""


def test_a_log_that_redis_lost_is_opened_anew(shared_system):
    system = shared_system
    job = a_job()
    system.publish(encode(job))
    assert system.end(job).finish_reason == "length"
    assert system.chunks(job)[0].restarted
    assert [token.token_id for token in system.tokens(job)] == expected_ids(job, 4)


def test_a_log_that_vanishes_under_a_running_job_is_written_again(shared_system):
    system = shared_system
    job = a_job(max_tokens=100_000)
    system.submit(job)
    wait_until(lambda: len(system.tokens(job)) > 5)
    key = job_key(job.job_id)
    epoch = int(system.redis.hget(key, "epoch"))
    system.redis.delete(key, log_key(job.job_id, epoch))
    wait_until(lambda: len(system.tokens(job)) > 20)
    system.cancel(job)
    count = system.end(job).completion_tokens
    chunks = system.chunks(job)
    assert {chunk.epoch for chunk in chunks} == {epoch}
    assert len(chunks[0].tokens) > 5
    assert [token.token_id for token in system.tokens(job)] == expected_ids(job, count)


def test_a_run_whose_log_holds_another_text_goes_on_from_that(shared_system):
    """Redis lost the run's claim, and a worker that it had fenced appended meanwhile."""
    system = shared_system
    job = a_job(max_tokens=100_000)
    system.submit(job)
    wait_until(lambda: len(system.tokens(job)) > 5)
    key = job_key(job.job_id)
    epoch = int(system.redis.hget(key, "epoch"))
    older = epoch - 1000
    with system.redis.pipeline() as pipeline:  # at once, as a crash does
        pipeline.delete(log_key(job.job_id, epoch))
        pipeline.hset(key, mapping={"epoch": older, "base": 0})
        chunk = Chunk(job.job_id, older, 0, (Token(1, " other"), Token(2, " text")))
        pipeline.rpush(log_key(job.job_id, older), encode(chunk))
        pipeline.execute()
    wait_until(lambda: len(system.tokens(job)) > 20)
    system.cancel(job)
    count = system.end(job).completion_tokens
    tokens = [token.token_id for token in system.tokens(job)]
    assert tokens[:2] == [1, 2]
    assert len(tokens) == count
    assert len({chunk.epoch for chunk in system.chunks(job)}) == 2


def test_a_job_claimed_by_another_worker_is_dropped(shared_system):
    system = shared_system
    job = a_job(max_tokens=100_000)
    offset = system.submit(job, partition=1)
    wait_until(lambda: len(system.tokens(job)) > 3)
    (claim,) = system.log.claim([job.job_id], "another")
    length = len(system.tokens(job))
    assert claim.before > 0
    wait_until(lambda: system.committed(partition=1) == offset + 1)
    assert len(system.tokens(job)) == length


def test_hundreds_of_jobs_at_once_all_end(shared_system):
    system = shared_system
    jobs = [a_job(max_tokens=3) for _ in range(300)]
    for number, job in enumerate(jobs):
        system.store(job)
        system.producer.send("openlora.jobs", encode(job), partition=number % 4)
    system.producer.flush()
    for job in jobs:
        assert system.end(job).completion_tokens == 3
