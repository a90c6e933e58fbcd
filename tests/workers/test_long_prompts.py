"""A long prompt is read beside the loop: streams go on meanwhile, whoever sent it."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest

from openlora.protocol.bulk import BulkGroup, BulkLine, BulkMessage, LineParams
from openlora.protocol.codec import encode
from openlora.protocol.names import BATCH_TOPIC, job_key, log_key
from tests.workers.running import a_job, wait_until
from workers.scripted_engine import SCRIPTED_MODEL_LEN
from workers.tokenizer import PromptTokenizer

pytestmark = pytest.mark.services

LONG = "word " * 190_000
"""As much as a message takes."""


def read_s(system):
    """What it takes to read the long prompt on this machine, now."""
    tokenizer = PromptTokenizer(str(system.model))
    began = time.monotonic()
    tokenizer.backend.encode(LONG)
    return time.monotonic() - began


def worst_gap_s(system, job, is_over):
    """The longest time for which the job's log did not grow, until ``is_over``."""
    wait_until(lambda: system.chunks(job))
    key = log_key(job.job_id, int(system.redis.hget(job_key(job.job_id), "epoch")))
    grown, over = [time.monotonic()], threading.Event()

    def watch():  # beside ``is_over``, which may take longer than what is measured
        count = 0
        while not over.wait(0.005):
            found = system.redis.llen(key)
            if found > count:
                count = found
                grown.append(time.monotonic())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        wait_until(is_over, 90)
    finally:
        over.set()
        watching.join()
    return max(later - earlier for earlier, later in pairwise(grown))


def test_streams_go_on_while_long_prompts_are_read(shared_system):
    system = shared_system
    took_s = read_s(system)
    watched = a_job(max_tokens=100_000)
    system.submit(watched, partition=0)
    wait_until(lambda: system.tokens(watched))
    long = [a_job(prompt=LONG) for _ in range(4)]
    for job in long:
        system.submit(job, partition=0)

    def all_ended():
        return all(any(c.end for c in system.chunks(job)) for job in long)

    gap_s = worst_gap_s(system, watched, all_ended)
    for job in long:
        failure = system.end(job).failure
        assert failure.code == "prompt_too_long"
        assert str(SCRIPTED_MODEL_LEN) in failure.message
    system.cancel(watched)
    assert gap_s < took_s, (gap_s, took_s)


def test_streams_go_on_while_a_long_line_of_a_batch_is_read(shared_system):
    system = shared_system
    took_s = read_s(system)
    watched = a_job(max_tokens=100_000)
    system.submit(watched, partition=0)
    wait_until(lambda: system.tokens(watched))
    line = BulkLine(1, prompt=LONG, params=LineParams(max_tokens=2))
    message = BulkMessage(
        "batch_long", "h" * 64, int(time.time() * 1000) + 60_000, BulkGroup("plain"), (line,)
    )
    for _ in range(4):
        offset = system.publish(encode(message), partition=1, topic=BATCH_TOPIC)
    gap_s = worst_gap_s(
        system, watched, lambda: system.committed(partition=1, topic=BATCH_TOPIC) > offset
    )
    system.cancel(watched)
    assert gap_s < took_s, (gap_s, took_s)


def test_a_job_whose_long_prompt_fits_is_run(shared_system):
    text = "word " * 20_000
    end = shared_system.run(a_job(prompt=text))
    assert end.finish_reason == "length"
    assert end.prompt_tokens == len(text)


def test_one_that_is_cancelled_while_it_is_read_ends_so(shared_system):
    system = shared_system
    jobs = [a_job(prompt=LONG) for _ in range(4)]
    for job in jobs:
        system.submit(job, partition=0)
    system.cancel(jobs[-1])
    assert system.end(jobs[-1]).finish_reason == "cancelled"
    for job in jobs[:-1]:
        assert system.end(job).failure.code == "prompt_too_long"
