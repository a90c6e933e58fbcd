"""Every answer of the log, on a real Redis."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from tokenizers import Tokenizer, models

from openlora.errors import Overloaded
from openlora.joblog import NOBODY, JobLog, core, redis_client
from openlora.protocol.codec import decode_chunk
from openlora.protocol.events import Chunk, Token
from openlora.protocol.names import job_key, log_key
from tests.workers.running import a_job
from workers import token_sink
from workers.ended_runs import EndedRuns
from workers.let_go import LOSABLE_S, LetGo
from workers.offsets import Position
from workers.run import Run
from workers.token_sink import ASK_INTERVAL_S, Stopped, TokenSink, Verdict

pytestmark = pytest.mark.services


class Bench:
    """A sink on Redis, and runs that were claimed there."""

    def __init__(self, url):
        self.redis = redis_client(url)
        self.log = JobLog(self.redis)
        self.stop_now = threading.Event()
        self.sink = TokenSink(self.log, "me", self.stop_now)

    def run(self):
        job = a_job(max_tokens=100)
        claim = self.log.recreate(job, "me")
        return Run(job, 1, claim.epoch, Position(("t", 0), 0, 1), Tokenizer(models.BPE()), ())

    def key(self, run):
        epoch = int(self.redis.hget(job_key(run.job.job_id), "epoch"))
        return log_key(run.job.job_id, epoch)

    def key_at(self, run, epoch):
        return log_key(run.job.job_id, epoch)

    def length(self, run):
        return sum(len(decode_chunk(c).tokens) for c in self.redis.lrange(self.key(run), 0, -1))


@pytest.fixture
def bench(redis_url):
    bench = Bench(redis_url)
    yield bench
    bench.redis.close()


@pytest.fixture
def lenient_s(monkeypatch):
    """Seconds without an end to leases behind an outage: fewer than a worker gives."""
    monkeypatch.setattr(token_sink, "LENIENT_S", 1.0)
    return 1.0


def say(run, count):
    run.tokens += [Token(len(run.tokens), "x") for _ in range(count)]


def test_runs_go_on_end_and_count(bench):
    going, ending = bench.run(), bench.run()
    say(going, 2)
    say(ending, 1)
    ending.finish("length")
    assert bench.sink.append([going, ending]) == [(ending, Verdict.ENDED)]
    assert (going.logged, bench.sink.tokens_logged) == (2, 3)
    assert bench.length(going) == 2


def test_a_mark_is_heard_by_a_run_with_nothing_to_say(bench):
    run = bench.run()
    assert bench.sink.append([run]) == []
    bench.log._run([core.cancel_call(run.job.job_id)])
    assert bench.sink.append([run]) == [(run, Verdict.CANCEL)]
    assert bench.redis.llen(bench.key(run)) == 0


def test_a_mark_is_heard_by_a_run_that_says_something_and_by_no_other(bench):
    run, other = bench.run(), bench.run()
    for _ in range(2):
        say(run, 1)
        say(other, 1)
        assert bench.sink.append([run, other]) == []
    bench.log._run([core.cancel_call(run.job.job_id)])
    say(run, 1)
    say(other, 1)
    assert bench.sink.append([run, other]) == [(run, Verdict.CANCEL)]
    assert (bench.length(run), bench.length(other)) == (3, 3)


def test_a_lease_that_ran_out_is_heard_within_the_interval_at_which_runs_ask(bench):
    run = bench.run()
    say(run, 1)
    assert bench.sink.append([run]) == []
    bench.redis.hset(job_key(run.job.job_id), "lease_until", 1)
    say(run, 1)
    run.last_heard += 60  # however long the test is held up here
    assert bench.sink.append([run]) == []
    run.last_heard -= 60 + ASK_INTERVAL_S
    say(run, 1)
    assert bench.sink.append([run]) == [(run, Verdict.CANCEL)]


def test_one_fenced_run_fails_alone(bench):
    fenced, other = bench.run(), bench.run()
    bench.log.claim([fenced.job.job_id], "another")
    say(fenced, 1)
    say(other, 1)
    assert bench.sink.append([fenced, other]) == [(fenced, Verdict.MOVED)]
    assert (bench.length(fenced), bench.length(other)) == (0, 1)


def test_a_run_in_mid_stream_is_fenced_at_its_next_token(bench):
    run = bench.run()
    for _ in range(2):
        say(run, 1)
        assert bench.sink.append([run]) == []
    bench.log.claim([run.job.job_id], "another")
    say(run, 1)
    assert bench.sink.append([run]) == [(run, Verdict.MOVED)]
    assert bench.length(run) == 2


def test_what_a_restored_log_lacks_is_sent_again(bench):
    run = bench.run()
    for _ in range(3):
        say(run, 1)
        bench.sink.append([run])
    bench.redis.rpop(bench.key(run))
    say(run, 1)
    assert bench.sink.append([run]) == []
    assert bench.length(run) == 4


def test_a_lost_log_is_written_again_unless_somebody_claimed_the_job_since(bench):
    """Whoever has the partition now: the broker may have lost the job's message as well."""
    mine, taken = bench.run(), bench.run()
    for run in (mine, taken):
        say(run, 2)
    bench.sink.append([mine, taken])
    epoch = mine.epoch
    bench.redis.flushall()
    say(mine, 1)
    assert bench.sink.append([mine]) == []
    assert mine.epoch == epoch == int(bench.redis.hget(job_key(mine.job.job_id), "epoch"))
    assert bench.length(mine) == 3
    bench.log.recreate(taken.job, "other")
    assert bench.sink.append([taken]) == [(taken, Verdict.MOVED)]


def lose_claim(bench, run, tokens=()):
    """Redis falls back to a claim before ``run``'s, whose worker appends ``tokens`` then."""
    key, epoch = job_key(run.job.job_id), run.epoch - 1000
    bench.redis.hset(key, mapping={"epoch": epoch, "base": 0})
    bench.redis.rename(bench.key_at(run, run.epoch), bench.key_at(run, epoch))
    if tokens:
        chunk = Chunk(run.job.job_id, epoch, bench.length(run), tokens)
        assert bench.log.append([chunk])[0].status == "taken"


def test_a_claim_that_redis_lost_is_put_back_and_what_the_log_lacks_with_it(bench):
    run = bench.run()
    for _ in range(3):
        say(run, 1)
        bench.sink.append([run])
    bench.redis.rpop(bench.key(run))
    lose_claim(bench, run)
    say(run, 1)
    assert bench.sink.append([run]) == []
    assert bench.length(run) == 4
    assert int(bench.redis.hget(job_key(run.job.job_id), "epoch")) == run.epoch


def test_the_same_text_of_a_worker_that_was_fenced_is_built_on(bench):
    run = bench.run()
    say(run, 1)
    bench.sink.append([run])
    lose_claim(bench, run, (Token(1, "x"),))
    say(run, 2)
    assert bench.sink.append([run]) == []
    assert bench.length(run) == 3


@pytest.mark.parametrize("count", [1, 3], ids=["other", "longer"])
def test_another_text_in_the_log_is_never_spliced_with_ours(bench, count):
    run = bench.run()
    say(run, 1)
    bench.sink.append([run])
    lose_claim(bench, run, tuple(Token(90, "z") for _ in range(count)))
    say(run, 2)
    assert bench.sink.append([run]) == [(run, Verdict.ANEW)]
    assert bench.length(run) == 1 + count


def an_ended_run(bench):
    run = bench.run()
    say(run, 2)
    bench.sink.append([run])
    run.finish("length")
    assert bench.sink.append([run]) == [(run, Verdict.ENDED)]
    ended = EndedRuns(bench.sink, LetGo(bench.sink))
    ended.add(run, 0.0)
    return run, ended


def test_an_end_that_redis_lost_is_said_again(bench):
    run, ended = an_ended_run(bench)
    key = job_key(run.job.job_id)
    bench.redis.hset(key, "state", "open")
    bench.redis.rpop(bench.key(run))
    ended.turn(LOSABLE_S / 2)
    assert bench.redis.hget(key, "state") == b"open"
    ended.turn(LOSABLE_S)
    assert bench.redis.hget(key, "state") == b"ended"
    bench.redis.hset(key, "state", "open")
    ended.turn(2 * LOSABLE_S)  # once is enough
    assert bench.redis.hget(key, "state") == b"open"


def test_an_answer_that_redis_lost_is_written_again(bench):
    run, ended = an_ended_run(bench)
    bench.redis.flushall()
    ended.turn(LOSABLE_S)
    assert bench.redis.hget(job_key(run.job.job_id), "state") == b"ended"
    assert bench.length(run) == 2


def test_a_job_of_another_text_whose_end_redis_lost_is_nobodys(bench):
    run, ended = an_ended_run(bench)
    key = job_key(run.job.job_id)
    bench.redis.hset(key, "state", "open")
    bench.redis.rpop(bench.key(run))
    lose_claim(bench, run, (Token(90, "z"),))
    ended.turn(LOSABLE_S)
    assert bench.redis.hmget(key, "state", "claimed_by") == [b"open", NOBODY.encode()]


def test_a_lease_that_ran_out_while_redis_was_away_can_be_renewed_first(bench, lenient_s):
    run = bench.run()
    bench.redis.hset(job_key(run.job.job_id), "lease_until", 1)
    answers = iter([Overloaded("away", retry_after_ms=1)])

    def away_once():
        for error in answers:
            raise error
        return "back"

    assert bench.sink.patiently(away_once) == "back"
    assert bench.sink.append([run]) == []
    bench.log._run(core.renew_calls([run.job.job_id], 60_000))
    time.sleep(lenient_s)
    assert bench.sink.append([run]) == []
    bench.redis.hset(job_key(run.job.job_id), "lease_until", 1)
    assert bench.sink.append([run]) == [(run, Verdict.CANCEL)]


def test_a_lease_that_ran_out_while_redis_stood_still_can_be_renewed_first(fresh_redis, lenient_s):
    """It answers in the end, so that no call fails."""
    bench = Bench(fresh_redis.address)
    run = bench.run()
    bench.log._run(core.renew_calls([run.job.job_id], 1000))
    os.kill(fresh_redis.pid, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (fresh_redis.pid, signal.SIGCONT)).start()
    assert bench.sink.append([run]) == []
    time.sleep(lenient_s)
    assert bench.sink.append([run]) == [(run, Verdict.CANCEL)]


def test_waiting_for_redis_ends_when_told_to_stop(bench, fresh_redis):
    away = Bench(fresh_redis.address)
    run = away.run()
    say(run, 1)
    fresh_redis.stop()
    threading.Timer(0.3, away.stop_now.set).start()
    with pytest.raises(Stopped):
        away.sink.append([run])
    assert run.logged == 0
