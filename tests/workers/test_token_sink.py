"""Every answer of the log, on a real Redis."""

from __future__ import annotations

import threading

import pytest

from openlora.joblog import JobLog, redis_client
from openlora.protocol.events import Token
from openlora.protocol.names import job_key, log_key
from tests.workers.running import a_job
from workers.offsets import Position
from workers.run import Run
from workers.token_sink import Stopped, TokenSink, Verdict

pytestmark = pytest.mark.services


class Bench:
    """A sink on Redis, and runs that were claimed there."""

    def __init__(self, url):
        self.redis = redis_client(url)
        self.log = JobLog(self.redis)
        self.stop_now = threading.Event()
        self.is_owner = True
        self.sink = TokenSink(self.log, "me", self.stop_now, lambda run: self.is_owner)

    def run(self):
        job = a_job(max_tokens=100)
        claim = self.log.recreate(job, 0, "me")
        return Run(job, 1, claim.epoch, Position(("t", 0), 0, 1), None, ())

    def length(self, run):
        return int(self.redis.hget(job_key(run.job.job_id), "length"))


@pytest.fixture
def bench(redis_url):
    bench = Bench(redis_url)
    yield bench
    bench.redis.close()


def say(run, count):
    run.tokens += [Token(len(run.tokens), "x") for _ in range(count)]


def test_runs_go_on_end_and_count(bench):
    going, ending = bench.run(), bench.run()
    say(going, 2)
    say(ending, 1)
    ending.finish("length")
    assert bench.sink.append([going, ending]) == [
        (going, Verdict.GOES_ON),
        (ending, Verdict.ENDED),
    ]
    assert (going.logged, bench.sink.tokens_logged) == (2, 3)
    assert bench.length(going) == 2


def test_a_mark_is_heard_by_a_run_with_nothing_to_say(bench):
    run = bench.run()
    assert bench.sink.append([run]) == [(run, Verdict.GOES_ON)]
    bench.redis.hset(job_key(run.job.job_id), "cancel", 1)
    assert bench.sink.append([run]) == [(run, Verdict.CANCEL)]
    assert bench.redis.llen(log_key(run.job.job_id)) == 0


def test_one_fenced_run_fails_alone(bench):
    fenced, other = bench.run(), bench.run()
    bench.log.claim([fenced.job.job_id], "another")
    say(fenced, 1)
    say(other, 1)
    assert bench.sink.append([fenced, other]) == [
        (fenced, Verdict.MOVED),
        (other, Verdict.GOES_ON),
    ]
    assert bench.length(fenced) == 0


def test_what_a_restored_log_lacks_is_sent_again(bench):
    run = bench.run()
    for _ in range(3):
        say(run, 1)
        bench.sink.append([run])
    bench.redis.rpop(log_key(run.job.job_id))
    bench.redis.hset(job_key(run.job.job_id), "length", 2)
    say(run, 1)
    assert bench.sink.append([run]) == [(run, Verdict.GOES_ON)]
    assert bench.length(run) == 4


def test_the_owner_opens_a_lost_log_anew_and_others_do_not(bench):
    mine, others = bench.run(), bench.run()
    for run in (mine, others):
        say(run, 2)
    bench.sink.append([mine, others])
    epoch = mine.epoch
    bench.redis.flushall()
    say(mine, 1)
    assert bench.sink.append([mine]) == [(mine, Verdict.GOES_ON)]
    assert mine.epoch > epoch
    assert bench.length(mine) == 3
    bench.is_owner = False
    assert bench.sink.append([others]) == [(others, Verdict.MOVED)]


def test_waiting_for_redis_ends_when_told_to_stop(bench, fresh_redis):
    away = Bench(fresh_redis.address)
    run = away.run()
    say(run, 1)
    fresh_redis.stop()
    threading.Timer(0.3, away.stop_now.set).start()
    with pytest.raises(Stopped):
        away.sink.append([run])
    assert run.logged == 0
