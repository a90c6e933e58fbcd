"""Whose a job is after it was let go, on a real Redis."""

from __future__ import annotations

import threading

import pytest

from openlora.joblog import NOBODY, JobLog, redis_client
from openlora.protocol.events import Chunk, End
from openlora.protocol.names import job_key, log_key
from tests.workers.running import a_job, wait_until
from workers.let_go import LOSABLE_S, LetGo
from workers.token_sink import TokenSink

pytestmark = pytest.mark.services


class Bench:
    """A worker, "me", that let go of a job which ``another`` claimed."""

    def __init__(self, url):
        self.redis = redis_client(url)
        self.log = JobLog(self.redis)
        self.let_go = LetGo(TokenSink(self.log, "me", threading.Event()))
        job = a_job()
        self.job_id = job.job_id
        self.mine = self.log.recreate(job, "me").epoch
        self.others = self.claim("another")
        self.let_go.add(self.job_id, 0.0)

    def claim(self, worker):
        return self.log.claim([self.job_id], worker)[0].epoch

    def lose(self):
        """Redis falls back to my claim."""
        self.redis.hset(job_key(self.job_id), mapping={"epoch": self.mine, "claimed_by": "me"})

    @property
    def owner(self):
        return self.redis.hget(job_key(self.job_id), "claimed_by").decode()

    def look(self, times, running=()):
        self.let_go.turn(times * LOSABLE_S, running)


@pytest.fixture
def bench(redis_url):
    bench = Bench(redis_url)
    yield bench
    bench.redis.close()


def test_a_claim_that_was_seen_twice_is_not_looked_at_again(bench):
    bench.look(0.9)
    bench.look(1)
    assert len(bench.let_go) == 1
    bench.look(2)
    assert (len(bench.let_go), bench.owner) == (0, "another")


def test_a_job_that_is_mine_again_is_nobodys(bench):
    bench.look(1)
    bench.lose()
    bench.look(2)
    assert bench.owner == NOBODY


def test_what_was_disowned_is_looked_at_until_that_is_kept(bench):
    bench.lose()
    bench.look(1)
    assert bench.owner == NOBODY
    bench.lose()
    bench.look(2)
    assert bench.owner == NOBODY
    bench.look(3)
    assert len(bench.let_go) == 0


def test_a_claim_that_was_made_since_the_last_look_may_be_lost_too(bench):
    bench.look(1)
    bench.claim("a third")
    bench.look(2)
    bench.lose()
    bench.look(3)
    assert bench.owner == NOBODY


def test_a_job_that_runs_here_again_is_left_alone(bench):
    bench.lose()
    bench.look(1, {bench.job_id})
    assert (len(bench.let_go), bench.owner) == (0, "me")


def test_a_job_that_ended_or_is_gone_stays_so(bench):
    end = Chunk(bench.job_id, bench.others, 0, end=End("stop"))
    assert bench.log.append([end])[0].status == "taken"
    bench.look(1)
    assert (len(bench.let_go), bench.owner) == (1, "another")
    bench.redis.delete(job_key(bench.job_id))
    bench.look(2)
    assert len(bench.let_go) == 0
    assert not bench.redis.exists(job_key(bench.job_id))


def test_a_worker_whose_fence_redis_loses_gives_the_job_to_whoever_comes(shared_system):
    """The worker that had fenced it died with the claim: nobody else names the job."""
    system = shared_system
    job = a_job(max_tokens=10_000)
    key = job_key(job.job_id)
    system.submit(job, partition=3)
    wait_until(lambda: len(system.tokens(job)) > 5)
    before = int(system.redis.hget(key, "epoch"))
    owner = system.redis.hget(key, "claimed_by")
    (claim,) = system.log.claim([job.job_id], "another")
    wait_until(lambda: f"event=fenced job={job.job_id}" in system.workers[0].log_text())
    system.redis.rename(log_key(job.job_id, claim.epoch), log_key(job.job_id, before))
    system.redis.hset(key, mapping={"epoch": before, "claimed_by": owner})
    wait_until(lambda: system.redis.hget(key, "claimed_by") == NOBODY.encode())
    system.cancel(job)
    system.publish(system.redis.hget(key, "job"), partition=3)  # as the sweeper does then
    assert system.end(job).finish_reason == "cancelled"
