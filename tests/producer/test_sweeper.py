"""A job that the broker does not have gets there, and what nobody wants ends."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from openlora.errors import SetupError
from openlora.joblog import AsyncJobLog, JobLog, async_redis_client, redis_client
from openlora.local import ServerProcess
from openlora.protocol.events import Failure
from openlora.protocol.names import JOBS_TOPIC, job_key
from producer import lost_jobs
from producer import sweeper as sweeper_module
from producer.lost_jobs import Decision
from producer.publisher import Publisher
from producer.sweeper import Sweeper
from producer.topics import TopicKeeper
from tests.conftest import Broker
from tests.joblog.jobs import a_chunk, a_job
from tests.producer.test_lost_jobs import an_owner


class NoPublisher:
    """Where nothing is to be published."""


class TopicsOf:
    """A keeper as the sweeper sees it."""

    def __init__(self, keeper: TopicKeeper) -> None:
        self._keeper = keeper

    async def ensure(self) -> int:
        await asyncio.to_thread(self._keeper.ensure)
        return self._keeper.losses


@pytest.mark.services
def test_a_stored_job_that_was_never_published_is_published(
    fresh_broker: Broker, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_jobs, "MIN_AGE_MS", 0)

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
    monkeypatch.setattr(lost_jobs, "MIN_AGE_MS", 0)
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
def test_what_ran_out_while_redis_stood_still_is_not_cancelled_at_once(
    fresh_redis: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers in the end, so that no sweep fails."""
    monkeypatch.setattr(lost_jobs, "MIN_AGE_MS", 0)
    pid = fresh_redis.pid
    assert pid is not None

    class Stopping:
        async def ensure(self) -> int:
            if not stopped:
                stopped.append(True)
                os.kill(pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(1.5, os.kill, pid, signal.SIGCONT)
            return 0

    stopped: list[bool] = []

    async def main() -> None:
        async with async_redis_client(fresh_redis.address) as client:
            log = AsyncJobLog(client)
            job = a_job()
            await log.store(job, 1000)
            with redis_client(fresh_redis.address) as blocking:
                JobLog(blocking).claim([job.job_id], "alive, but its heartbeat ran out")
            sweeper = Sweeper(log, NoPublisher(), Stopping(), "g1")
            assert (await sweeper.sweep()).cancelled == [job.job_id]
            assert (await log.read(job.job_id)).end is None
            monkeypatch.setattr(sweeper_module, "CALM_S", 0.0)
            sweeper.stay_calm()
            await sweeper.sweep()
            assert (await log.read(job.job_id)).end.finish_reason == "cancelled"

    asyncio.run(main())


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
