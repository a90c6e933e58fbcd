"""Workers that come, go and die, as real processes with real signals."""

from __future__ import annotations

import itertools
import os
import signal

import psutil
import pytest

from openlora.protocol.codec import encode
from tests.workers.running import a_job, is_alive, wait_until

pytestmark = pytest.mark.services


def owned(system, worker):
    heartbeat = system.heartbeat(worker)
    partitions = () if heartbeat is None else heartbeat.partitions
    return {(status.topic, status.partition) for status in partitions}


@pytest.mark.long
def test_sigterm_lets_running_jobs_end_and_leaves_nothing_behind(system):
    worker = system.start_worker()
    engine_pid = system.heartbeat(worker).engine_pid
    job = a_job(max_tokens=120)
    system.submit(job)
    wait_until(lambda: system.tokens(job))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert system.end(job, timeout_s=0.1).completion_tokens == 120
    assert system.heartbeat(worker) is None
    assert not is_alive(engine_pid)
    log = worker.log_text()
    steps = ["event=drain ", "event=left_group", "event=group_left", "event=engine_stopped"]
    assert sorted(steps, key=log.index) == steps


@pytest.mark.long
def test_a_second_signal_stops_at_once(system):
    worker = system.start_worker()
    engine_pid = system.heartbeat(worker).engine_pid
    job = a_job(max_tokens=100_000)
    system.submit(job)
    wait_until(lambda: system.tokens(job))
    worker.signal(signal.SIGINT)
    wait_until(lambda: "event=drain " in worker.log_text())
    worker.signal(signal.SIGINT)
    worker.wait(15)  # the drain would take half a minute
    assert not is_alive(engine_pid)


@pytest.mark.long
def test_two_workers_share_and_the_one_that_stays_goes_on_with_the_next_token(system):
    first = system.start_worker("--drain-timeout-s", "0")
    second = system.start_worker()
    wait_until(lambda: len(owned(system, first)) == len(owned(system, second)) == 4)
    numbers = [{number for _, number in owned(system, worker)} for worker in (first, second)]
    assert not numbers[0] & numbers[1]
    assert all(len(own) == 2 for own in numbers)
    job = a_job(max_tokens=400)
    system.submit(job, partition=min(numbers[0]))
    wait_until(lambda: len(system.tokens(job)) > 10)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    end = system.end(job)
    assert (end.finish_reason, end.completion_tokens) == ("length", 400)
    assert len({chunk.epoch for chunk in system.chunks(job)}) == 2
    ids = [token.token_id for token in system.tokens(job)]
    steps = {(b - a) % (1 << 15) for a, b in itertools.pairwise(ids)}
    assert steps == {7919}
    wait_until(lambda: len(owned(system, second)) == 8)


@pytest.mark.long
def test_a_running_job_moves_when_its_engine_dies(system):
    first = system.start_worker()
    job = a_job(max_tokens=400)
    system.submit(job)
    wait_until(lambda: len(system.tokens(job)) > 10)
    os.kill(system.heartbeat(first).engine_pid, signal.SIGKILL)
    assert first.wait() == 1
    assert "event=engine_died status=-9" in first.log_text()
    assert system.heartbeat(first) is None
    system.start_worker()
    assert system.end(job).completion_tokens == 400
    assert len(system.tokens(job)) == 400


def test_the_engine_process_dies_with_its_parent(system):
    worker = system.start_worker(ready=False)
    io_process = psutil.Process(worker.process.pid)
    wait_until(io_process.children)
    (engine_pid,) = (child.pid for child in io_process.children())
    worker.process.kill()
    worker.wait()
    wait_until(lambda: not is_alive(engine_pid))


@pytest.mark.long
def test_nothing_is_lost_while_redis_is_away(system, fresh_redis):
    system.start_worker()
    job = a_job(max_tokens=150, leased=False)
    system.submit(job)
    wait_until(lambda: len(system.tokens(job)) > 10)
    fresh_redis.stop()
    fresh_redis.start()
    assert system.end(job).completion_tokens == 150
    assert len(system.tokens(job)) == 150


def test_jobs_that_waited_for_the_first_worker_all_run(system):
    jobs = [a_job(max_tokens=2) for _ in range(20)]
    for number, job in enumerate(jobs):
        system.store(job)
        system.publish(encode(job), partition=number % 4)
    system.start_worker(ready=False)
    for job in jobs:
        assert system.end(job).completion_tokens == 2


def test_a_signal_while_starting_ends_the_worker(system):
    worker = system.start_worker(ready=False)
    wait_until(lambda: "event=start" in worker.log_text())
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert "Traceback" not in worker.log_text()
