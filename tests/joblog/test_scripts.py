"""The Lua scripts on a real server against a model in Python: any order of claims, appends of any
epoch, repeats, gaps, ends, cancels, losses."""

from __future__ import annotations

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from openlora.joblog import ASK, AppendResult, Claim, JobLog, core, redis_client
from openlora.joblog.claim import RECREATED_LEASE_MS
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk
from tests.joblog.jobs import SHARD, a_chunk, a_job
from tests.joblog.model import ModelJob

pytestmark = pytest.mark.services


class LogMachine(RuleBasedStateMachine):
    """Two jobs of one shard, so that one call carries chunks of both."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.redis = redis_client(self.url)
        self.redis.flushdb()
        self.log = JobLog(self.redis)
        self.jobs = [a_job(leased=False) for _ in range(2)]
        self.known: dict[int, ModelJob] = {}
        self.sent: list[Chunk] = []
        self.known_entries: list[int] = []
        self.pubsub = self.redis.pubsub(ignore_subscribe_messages=True)
        self.pubsub.ssubscribe(names.events_channel(SHARD))
        self.pubsub.get_message(timeout=1)

    def teardown(self) -> None:
        self.pubsub.close()
        self.redis.close()

    def run(self, call: core.Call):
        return self.log._run([call])[0]

    which = st.integers(0, 1)
    seldom = st.sampled_from([False] * 5 + [True])

    @initialize()
    def store_both(self) -> None:
        for which in range(2):
            self.store(which)

    @rule(which=which)
    def store(self, which: int) -> None:
        job = self.jobs[which]
        assert self.run(core.store_call(job, 1000)) == (which not in self.known)
        self.known.setdefault(which, ModelJob(job))

    @rule(which=which)
    def claim(self, which: int) -> None:
        (claim,) = self.log.claim([self.jobs[which].job_id], "w")
        model = self.known.get(which)
        assert claim == (Claim("missing") if model is None else model.claim(claim.epoch))

    @rule(which=which)
    def recreate(self, which: int) -> None:
        claim = self.log.recreate(self.jobs[which], "w")
        if which in self.known:
            assert claim == self.known[which].claim(claim.epoch)
        else:
            self.known[which] = ModelJob(self.jobs[which], epoch=claim.epoch)
            assert claim == Claim("claimed", claim.epoch)

    @rule(which=which, epoch=st.sampled_from([-1, 0, 1, 2]))
    def restore(self, which: int, epoch: int) -> None:
        """``epoch``: from the job's."""
        model = self.known.get(which)
        epoch += 9 if model is None else model.epoch
        claim = self.log.restore(self.jobs[which], epoch, "w")
        if model is None:
            self.known[which] = ModelJob(self.jobs[which], epoch=epoch)
            assert claim == Claim("claimed", epoch)
        else:
            assert claim == model.restore(epoch)

    @rule(
        wanted=st.lists(
            st.tuples(
                which,
                st.sampled_from([0] * 6 + [-1, 1]),  # epoch, from the job's
                st.sampled_from([0, 0, 0, -1, -2, -3, 1]),  # first index, from the log's end
                st.integers(0, 3),
                seldom,
                seldom,
                st.sampled_from([0] * 4 + [-1, 1, None]),  # entries, from the log's; None asks
            ),
            min_size=1,
            max_size=4,
        )
    )
    def append(self, wanted) -> None:
        chunks, off = [], []
        for which, epoch, first, count, end, restarted, known in wanted:
            model = self.known.get(which) or ModelJob(self.jobs[which])
            first_index = max(0, model.length + first)
            chunks.append(
                a_chunk(
                    model.job.job_id,
                    model.epoch + epoch,
                    first_index,
                    count,
                    end,
                    restarted=restarted,
                )
            )
            off.append(known)
        self._append(chunks, off)

    @rule()
    @precondition(lambda self: self.sent)
    def repeat(self) -> None:
        """The reply was lost: the same call again."""
        self._append(self.sent, [None] * len(self.sent), self.known_entries)

    def _append(
        self, chunks: list[Chunk], off: list[int | None], repeated: list[int] | None = None
    ) -> None:
        """``off``: how wrong the caller is about the log's entries; None: it does not know."""
        entries: list[int] = []
        asked, published = {}, []
        for position, (chunk, wrong) in enumerate(zip(chunks, off, strict=True)):
            model = self.known.get([j.job_id for j in self.jobs].index(chunk.job_id))
            if model is None:
                entries.append(ASK if wrong is None else max(0, wrong))
                asked[position] = AppendResult("gone", 0, False, 0)
                continue
            held = len(model.chunks)
            follows = model.state == "open" and chunk.first_index == model.length
            known = ASK if wrong is None else max(0, held + wrong)
            if repeated is not None:
                known = repeated[position]
            # who knows a log's entries knows its length and its end
            entries.append(known if known != held or follows else ASK)
            result, is_new = model.append(chunk)
            asked[position] = result
            if is_new:
                published.append(chunk)
                is_plain = bool(chunk.tokens) and chunk.end is None and not chunk.restarted
                if is_plain and entries[-1] == held > 0 and not model.cancelled:
                    del asked[position]  # nothing to be said of it
        self.sent, self.known_entries = chunks, entries
        assert self.log.extend([(chunks, entries)]) == [asked]
        message = self.pubsub.get_message(timeout=1 if published else 0)
        got = () if message is None else codec.decode_chunks(message["data"])
        assert list(got) == published

    @rule(which=which)
    def cancel(self, which: int) -> None:
        model = self.known.get(which)
        is_open = model is not None and model.state == "open"
        assert self.run(core.cancel_call(self.jobs[which].job_id)) == is_open
        if is_open:
            model.cancelled = True

    @rule(which=which, really=seldom)
    def discard(self, which: int, really: bool) -> None:
        if not really:
            return
        self.run(core.discard_call(self.jobs[which].job_id))
        self.known[which] = ModelJob(self.jobs[which], state="discarded")

    @rule(which=which)
    def retire(self, which: int) -> None:
        model = self.known.get(which)
        is_ended = model is not None and model.state == "ended"
        assert self.run(core.retire_call(self.jobs[which].job_id)) == is_ended
        if is_ended:
            assert self.redis.ttl(names.job_key(self.jobs[which].job_id)) <= core.RETIRED_TTL_S

    @rule(which=which, really=seldom)
    def lose(self, which: int, really: bool) -> None:
        if not really:
            return
        job_id = self.jobs[which].job_id
        self.redis.delete(names.job_key(job_id), *self.redis.keys(f"{names.job_key(job_id)}:log:*"))
        self.redis.zrem(names.open_jobs_key(SHARD), job_id)
        self.redis.srem(names.cancels_key(SHARD), job_id)
        self.known.pop(which, None)

    @invariant()
    def redis_holds_what_the_model_holds(self) -> None:
        marked = {job_id.decode() for job_id in self.redis.smembers(names.cancels_key(SHARD))}
        for which, job in enumerate(self.jobs):
            view = core.decode_view(self.run(core.read_call(job.job_id)), -1)
            model = self.known.get(which)
            if model is None or model.state == "discarded":
                assert view is None
                continue
            end = model.chunks[-1].end if model.chunks else None
            assert view == core.JobView(job, model.epoch, tuple(model.chunks), end, model.cancelled)
            is_marked = model.cancelled and model.state == "open"
            assert (job.job_id in marked) == is_marked
            logs = self.redis.keys(f"{names.job_key(job.job_id)}:log:*")
            assert logs == [names.log_key(job.job_id, model.epoch).encode()] * bool(model.chunks)
            for key in [names.job_key(job.job_id), *logs]:
                assert (self.redis.ttl(key) == -1) == (model.state == "open")
        open_ids = self.redis.zrange(names.open_jobs_key(SHARD), 0, -1)
        assert {i.decode() for i in open_ids} == {
            model.job.job_id for model in self.known.values() if model.state == "open"
        }


def test_the_scripts_behave_like_the_model(redis_url: str) -> None:
    LogMachine.url = redis_url
    machine = settings(
        max_examples=100,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(LogMachine, settings=machine)


def test_a_lease_runs_out_by_the_clock_of_redis_and_can_be_renewed(redis_url: str) -> None:
    client = redis_client(redis_url)
    log = JobLog(client)
    leased, unleased = a_job(), a_job(leased=False)
    for job in (leased, unleased):
        log._run([core.store_call(job, 60_000)])

    def is_cancelled() -> list[bool]:
        return [claim.cancelled for claim in log.claim([leased.job_id, unleased.job_id], "w")]

    assert is_cancelled() == [False, False]
    log._run(core.renew_calls([leased.job_id, unleased.job_id], -1))
    assert is_cancelled() == [True, False]
    epoch = log.claim([leased.job_id], "w")[0].epoch
    assert log.append([a_chunk(leased.job_id, epoch, 0)])[0].cancelled
    log._run(core.renew_calls([leased.job_id], 60_000))
    assert not log.append([a_chunk(leased.job_id, epoch, 1)])[0].cancelled


def test_a_lost_job_that_is_opened_anew_has_a_lease_again(redis_url: str) -> None:
    client = redis_client(redis_url)
    job = a_job(deadline_ms=5)
    JobLog(client).recreate(job, "w")
    facts = client.hgetall(names.job_key(job.job_id))
    seconds, _ = client.time()
    lease_s = int(facts[b"lease_until"]) / 1000 - seconds
    assert 25 < lease_s <= RECREATED_LEASE_MS / 1000 + 1
    assert (facts[b"deadline"], facts[b"claimed_by"]) == (b"5", b"w")


def test_a_server_without_sharded_pubsub_gets_plain_messages(redis_url: str) -> None:
    """SPUBLISH is taken away by an ACL rule, which a script sees like a missing command."""
    admin = redis.Redis.from_url(redis_url)
    admin.execute_command("ACL", "SETUSER", "old", "on", ">pw", "~*", "&*", "+@all", "-spublish")
    try:
        options = admin.connection_pool.connection_kwargs
        url = f"redis://old:pw@{options['host']}:{options['port']}/0"
        log = JobLog(redis_client(url))
        job = a_job()
        log._run([core.store_call(job, 1000)])
        (claim,) = log.claim([job.job_id], "w")
        pubsub = admin.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe(names.events_channel(SHARD))
        pubsub.get_message(timeout=1)
        chunk = a_chunk(job.job_id, claim.epoch, 0)
        assert log.append([chunk])[0].status == "taken"
        message = pubsub.get_message(timeout=1)
        assert codec.decode_chunks(message["data"]) == (chunk,)
        pubsub.close()
    finally:
        admin.execute_command("ACL", "DELUSER", "old")
