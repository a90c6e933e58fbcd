"""What the sweeper decides, and that a job the broker does not have gets there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.errors import SetupError
from openlora.joblog import AsyncJobLog, JobLog, OpenJob, async_redis_client, redis_client
from openlora.protocol.events import Failure
from openlora.protocol.names import JOBS_TOPIC, job_key
from openlora.protocol.status import Heartbeat, PartitionStatus
from producer import sweeper as sweeper_module
from producer.publisher import Publisher
from producer.sweeper import MIN_AGE_MS, Decision, Patience, Sweeper, decide, places
from producer.topics import TopicKeeper
from tests.conftest import Broker
from tests.joblog.jobs import a_chunk, a_job
from tests.joblog.test_log import a_heartbeat

_OLD = MIN_AGE_MS


class TopicsOf:
    """A keeper as the sweeper sees it."""

    def __init__(self, keeper: TopicKeeper) -> None:
        self._keeper = keeper

    async def ensure(self) -> int:
        await asyncio.to_thread(self._keeper.ensure)
        return self._keeper.losses


def an_open_job(**fields) -> OpenJob:
    facts = {"age_ms": _OLD, "epoch": 0, "cancelled": False, "expired": False}
    facts |= {"published": (JOBS_TOPIC, 3, 10), "claimed_by": None}
    return OpenJob(job_id="j", **(facts | fields))


def an_owner(worker_id: str = "w", written_ms: int = 1, **fields) -> Heartbeat:
    facts = {"committed": 5, "position": 10, "high_water": 11, "partition": 3}
    status = PartitionStatus(JOBS_TOPIC, **(facts | fields))
    return a_heartbeat(worker_id, written_ms=written_ms, partitions=(status,))


def looks_lost(job: OpenJob, heartbeats: Sequence[Heartbeat]) -> bool:
    first = decide([job], heartbeats, frozenset())
    assert first.republish == []  # never at first sight
    second = decide([job], heartbeats, frozenset(first.lost))
    assert second.republish == sorted(first.lost)
    assert (first.cancelled, first.expired) == ([], [])
    assert first.passed <= first.lost
    return bool(first.lost)


@pytest.mark.parametrize(
    ("job", "heartbeats", "is_lost"),
    [
        # Not acknowledged by the broker.
        (an_open_job(published=None), [], True),
        (an_open_job(published=None), [an_owner()], True),
        (an_open_job(published=None, age_ms=_OLD - 1), [], False),
        # Waiting: nobody owns the partition, or the owner has not come to it.
        (an_open_job(), [], False),
        (an_open_job(), [an_owner(partition=4)], False),
        (an_open_job(), [an_owner()], False),
        (an_open_job(), [an_owner(position=2)], False),
        # The partition ends before it: the topic was made anew.
        (an_open_job(), [an_owner(position=4, high_water=10)], True),
        (an_open_job(), [an_owner(position=0, high_water=0)], True),
        (an_open_job(), [an_owner(position=4, high_water=-1)], False),
        (an_open_job(), [an_owner(position=4, high_water=10, paused=True)], False),
        # The owner went past it without a claim.
        (an_open_job(), [an_owner(position=11)], True),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(position=11)], True),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(position=10)], False),
        # Its worker died: others live, and its partition has no owner yet, or has one.
        (an_open_job(claimed_by="dead", epoch=1), [], False),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(partition=4)], True),
        # Claimed by a living worker, whoever owns the partition now.
        (an_open_job(claimed_by="w", epoch=1), [an_owner(position=11)], False),
        (an_open_job(claimed_by="w", epoch=1, published=None), [an_owner()], False),
        (an_open_job(claimed_by="a", epoch=1), [an_owner("b"), a_heartbeat("a")], False),
        # The newer word counts.
        (an_open_job(), [an_owner("b", 2, position=11), an_owner("a", 1)], True),
        (an_open_job(), [an_owner("b", 2), an_owner("a", 1, position=11)], False),
    ],
)
def test_lost_or_not(job: OpenJob, heartbeats: Sequence[Heartbeat], is_lost: bool) -> None:
    assert looks_lost(job, heartbeats) == is_lost


def test_orphans_go_to_partitions_of_ready_workers_in_turn() -> None:
    job = an_open_job(claimed_by="dead", epoch=1)
    others = [an_owner(partition=4)]
    assert decide([job], others, frozenset()).orphans == {"j"}
    assert decide([an_open_job()], others, frozenset()).orphans == set()
    heartbeats = [
        a_heartbeat("a", partitions=tuple(PartitionStatus(JOBS_TOPIC, n, 0, 0, 0) for n in (1, 2))),
        a_heartbeat("b", partitions=(PartitionStatus(JOBS_TOPIC, 7, 0, 0, 0),)),
        a_heartbeat("c", ready=False, partitions=(PartitionStatus(JOBS_TOPIC, 8, 0, 0, 0),)),
    ]
    assert places(heartbeats, JOBS_TOPIC) == [1, 7, 2]
    assert places(heartbeats, "another") == []


def test_only_a_job_that_its_owner_went_past_waits_to_be_published_again() -> None:
    assert decide([an_open_job()], [an_owner(position=11)], frozenset()).passed == {"j"}
    new_topic = an_owner(position=0, high_water=0)
    assert decide([an_open_job()], [new_topic], frozenset()).passed == set()
    assert decide([an_open_job(published=None)], [an_owner()], frozenset()).passed == set()


def test_each_wait_before_another_copy_doubles() -> None:
    patience = Patience()
    allowed = [second for second in range(0, 301, 2) if patience.allows("j", second)]
    assert allowed == [0, 4, 12, 28, 60, 124, 188, 252]
    assert patience.allows("another", 300)
    patience.forget_old(1000)
    assert patience.allows("j", 1000)
    assert not patience.allows("j", 1003)


def test_what_nobody_runs_and_nobody_wants_is_ended() -> None:
    for published in (None, (JOBS_TOPIC, 3, 10)):
        for heartbeats in ([], [an_owner()]):
            cancelled = an_open_job(cancelled=True, published=published)
            assert decide([cancelled], heartbeats, frozenset("j")) == Decision(cancelled=["j"])
            expired = an_open_job(expired=True, published=published)
            assert decide([expired], heartbeats, frozenset("j")) == Decision(expired=["j"])
    # Its living worker ends it.
    claimed = an_open_job(cancelled=True, expired=True, claimed_by="w")
    assert decide([claimed], [an_owner()], frozenset()) == Decision()


statuses = st.builds(
    PartitionStatus,
    st.just(JOBS_TOPIC),
    st.integers(0, 2),
    *[st.integers(-1, 6)] * 3,
    st.booleans(),
)
heartbeats = st.builds(
    lambda name, written, parts: a_heartbeat(name, written_ms=written, partitions=tuple(parts)),
    st.sampled_from("ab"),
    st.integers(0, 3),
    st.lists(statuses, max_size=3),
)
open_jobs = st.builds(
    OpenJob,
    st.uuids().map(str),
    st.integers(0, 2 * _OLD),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.none() | st.tuples(st.just(JOBS_TOPIC), st.integers(0, 2), st.integers(0, 6)),
    st.sampled_from([None, "a", "c"]),
)


def test_what_was_in_lost_topics_is_published_at_once_but_for_what_runs():
    young, runs = an_open_job(age_ms=0), an_open_job(claimed_by="w")
    assert decide([young], [an_owner()], frozenset(), topics_lost=True).republish == ["j"]
    assert decide([runs], [an_owner()], frozenset(), topics_lost=True) == Decision()
    cancelled = decide([an_open_job(cancelled=True)], [], frozenset(), topics_lost=True)
    assert (cancelled.cancelled, cancelled.republish) == (["j"], [])


@given(st.lists(open_jobs, max_size=6), st.lists(heartbeats, max_size=3), st.booleans())
def test_each_job_gets_one_treatment_and_claimed_ones_none(jobs, beats, seen_before: bool) -> None:
    before = frozenset(job.job_id for job in jobs) if seen_before else frozenset()
    decision = decide(jobs, beats, before)
    treated = [*decision.cancelled, *decision.expired, *decision.lost]
    assert len(set(treated)) == len(treated)
    assert set(decision.republish) == (decision.lost if seen_before else set())
    living = {beat.id for beat in beats}
    left_alone = {j.job_id for j in jobs if j.claimed_by in living or j.age_ms < MIN_AGE_MS}
    assert not left_alone & set(treated)


@pytest.mark.services
def test_a_stored_job_that_was_never_published_is_published(
    fresh_broker: Broker, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper_module, "MIN_AGE_MS", 0)

    async def main() -> None:
        async with async_redis_client(redis_url) as client:
            log = AsyncJobLog(client)
            sweeper = Sweeper(log, publisher, TopicsOf(keeper), "g1")
            job = a_job()
            await log.store(job, 60_000)
            assert (await sweeper.sweep()).lost == {job.job_id}
            assert (await sweeper.sweep()).republish == [job.job_id]
            (found,) = [j async for page in log.open_jobs(0) for j in page]
            assert found.published[0] == JOBS_TOPIC
            assert await sweeper.sweep() == Decision()

            # The in-memory broker loses it; a worker that owns the partition shows its end.
            fresh_broker.server.kill()
            await asyncio.to_thread(fresh_broker.server.start)
            _, partition, _ = found.published
            owner = an_owner(partition=partition, position=0, high_water=0)
            JobLog(redis_client(redis_url)).write_heartbeat(owner)
            # All of it is gone for sure: none has to look so twice.
            assert (await sweeper.sweep()).republish == [job.job_id]

    with TopicKeeper(fresh_broker.bootstrap_servers, 3) as keeper:
        keeper.ensure()
        publisher = Publisher(fresh_broker.bootstrap_servers)
        try:
            asyncio.run(main())
        finally:
            publisher.close()


@pytest.mark.services
def test_jobs_that_nobody_wants_any_more_are_ended(
    fresh_broker: Broker, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper_module, "MIN_AGE_MS", 0)
    worker = JobLog(redis_client(redis_url))

    async def main() -> None:
        async with async_redis_client(redis_url) as client:
            log = AsyncJobLog(client)
            left, late = a_job(), a_job(deadline_ms=1)
            unreadable = a_job(deadline_ms=1)
            for job in (unreadable, left, late):
                await log.store(job, 60_000)
            await client.hset(job_key(unreadable.job_id), "job", b"of another version")
            epoch = worker.claim([left.job_id], "dead")[0].epoch
            worker.append([a_chunk(left.job_id, epoch, 0, 2)])
            await log.renew_leases([left.job_id], -1)
            sweeper = Sweeper(log, publisher, TopicsOf(keeper), "g1")
            sweeper.stay_calm()  # as behind an outage: leases and heartbeats ran out in it
            await sweeper.sweep()
            assert (await log.read(left.job_id)).end is None
            monkeypatch.setattr(sweeper_module, "CALM_S", 0.0)
            sweeper.stay_calm()
            await sweeper.sweep()
            end = (await log.read(left.job_id)).end
            assert (end.finish_reason, end.completion_tokens) == ("cancelled", 2)
            end = (await log.read(late.job_id)).end
            assert end.failure == Failure("deadline_exceeded", "the deadline passed")
            (still_open,) = [job async for page in log.open_jobs(0) for job in page]
            assert still_open.job_id == unreadable.job_id

    with TopicKeeper(fresh_broker.bootstrap_servers, 3) as keeper:
        publisher = Publisher(fresh_broker.bootstrap_servers)
        try:
            asyncio.run(main())
        finally:
            publisher.close()


@pytest.mark.services
def test_only_the_gateway_with_the_lock_sweeps_and_a_failure_does_not_end_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper_module, "PERIOD_S", 0.01)

    class NoTopics:
        def __init__(self) -> None:
            self.asked = asyncio.Event()

        async def ensure(self) -> int:
            self.asked.set()
            raise SetupError("no broker")

    async def main() -> None:
        async with async_redis_client(redis_url) as client:
            log = AsyncJobLog(client)
            topics = [NoTopics(), NoTopics()]
            tasks = []
            for name, its_topics in zip("ab", topics, strict=True):
                sweeper = Sweeper(log, None, its_topics, name)
                tasks.append(asyncio.create_task(sweeper.run()))
                for _ in range(3):  # it fails, and tries again
                    await asyncio.wait_for(topics[0].asked.wait(), 10)
                    topics[0].asked.clear()
            assert not topics[1].asked.is_set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
