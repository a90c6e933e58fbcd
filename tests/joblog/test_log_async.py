"""``AsyncJobLog``: what the gateway stores, reads, ends and sweeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from openlora.errors import InvalidRequest
from openlora.joblog import AsyncJobLog, JobLog, async_redis_client, core, redis_client
from openlora.protocol import names
from openlora.protocol.events import End
from tests.joblog.jobs import a_chunk, a_job
from tests.joblog.test_log import a_heartbeat

pytestmark = pytest.mark.services


@pytest.fixture
def worker(redis_url: str) -> JobLog:
    return JobLog(redis_client(redis_url))


def run(url: str, test: Callable[[AsyncJobLog], Awaitable[None]]) -> None:
    async def main() -> None:
        async with async_redis_client(url) as client:
            await test(AsyncJobLog(client))

    asyncio.run(main())


def test_read_gives_what_is_newer_and_always_the_end(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        job = a_job()
        await log.store(job, 60_000)
        epoch = worker.claim([job.job_id], "w")[0].epoch
        chunks = [
            *(a_chunk(job.job_id, epoch, 0, 2), a_chunk(job.job_id, epoch, 2, 3)),
            a_chunk(job.job_id, epoch, 5, 1, end=True),
        ]
        worker.append(chunks[:2])
        view = await log.read(job.job_id)
        assert (view.job, view.end, view.chunks) == (job, None, tuple(chunks[:2]))
        worker.append(chunks[2:])
        for after, first in ((-1, 0), (0, 0), (1, 1), (3, 1), (4, 2), (5, 2), (99, 2)):
            view = await log.read(job.job_id, after)
            assert view.chunks == tuple(chunks[first:]), after
            assert view.end == End("stop")
        assert await log.read(a_job().job_id) is None

    run(redis_url, test)


def test_a_restarted_log_is_read_whole(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        job = a_job()
        claim = worker.recreate(job, "w")
        chunks = (
            a_chunk(job.job_id, claim.epoch, 0, 2, restarted=True),
            a_chunk(job.job_id, claim.epoch, 2),
        )
        worker.append(chunks)
        assert (await log.read(job.job_id, after=17)).chunks == chunks

    run(redis_url, test)


def test_a_stored_job_stays_as_it_is(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        job = a_job()
        await log.store(job, 60_000)
        epoch = worker.claim([job.job_id], "w")[0].epoch
        await log.store(job, 60_000)
        assert (await log.read(job.job_id)).epoch == epoch

    run(redis_url, test)


def test_a_discarded_job_never_runs(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        job = a_job()
        await log.store(job, 60_000)
        epoch = worker.claim([job.job_id], "w")[0].epoch
        await log.discard(job.job_id)
        assert worker.append([a_chunk(job.job_id, epoch, 0)])[0].status == "gone"
        assert worker.claim([job.job_id], "w")[0].status == "ended"
        assert await log.read(job.job_id) is None
        assert not await log.cancel(job.job_id)

    run(redis_url, test)


def test_finish_leaves_a_job_to_a_client_that_came_back_meanwhile(redis_url: str) -> None:
    async def main() -> None:
        async with async_redis_client(redis_url) as client:
            log = AsyncJobLog(client)
            job = a_job()
            await log.store(job, 1)
            await asyncio.sleep(0.01)
            assert (await log.read(job.job_id)).cancelled  # as the sweeper saw it
            await log.renew_leases([job.job_id], 60_000)
            assert not await log.finish(job.job_id, End("cancelled"), if_cancelled=True)
            assert (await log.read(job.job_id)).end is None
            await log.cancel(job.job_id)
            assert await log.finish(job.job_id, End("cancelled"), if_cancelled=True)

    asyncio.run(main())


def test_finish_ends_a_job_and_fences_who_runs_it(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        job = a_job()
        await log.store(job, 60_000)
        epoch = worker.claim([job.job_id], "w")[0].epoch
        worker.append([a_chunk(job.job_id, epoch, 0, 2)])
        assert await log.finish(job.job_id, End("cancelled"))
        assert worker.append([a_chunk(job.job_id, epoch, 2)])[0].status == "fenced"
        assert (await log.read(job.job_id)).end == End("cancelled")
        assert not await log.finish(job.job_id, End("cancelled"))
        assert not await log.finish(a_job().job_id, End("cancelled"))

    run(redis_url, test)


def test_an_idempotency_key_belongs_to_its_first_request(redis_url: str) -> None:
    async def test(log: AsyncJobLog) -> None:
        assert await log.claim_idempotency("a", "b:k", "d1", "j1") == ("j1", True)
        assert await log.claim_idempotency("a", "b:k", "d1", "j1") == ("j1", True)  # a retry
        assert await log.claim_idempotency("a", "b:k", "d1", "j2") == ("j1", False)
        with pytest.raises(InvalidRequest, match="'b:k' was used with another request"):
            await log.claim_idempotency("a", "b:k", "d2", "j2")
        # Another tenant's, although the joined names are alike.
        assert await log.claim_idempotency("a:b", "k", "d2", "j2") == ("j2", True)
        await log.release_idempotency("a", "b:k", "j")
        await log.release_idempotency("a", "b:k", "j2")
        assert await log.claim_idempotency("a", "b:k", "d1", "j2") == ("j1", False)
        await log.release_idempotency("a", "b:k", "j1")
        assert await log.claim_idempotency("a", "b:k", "d2", "j2") == ("j2", True)

    run(redis_url, test)


def test_how_far_a_job_came_with_being_accepted(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        published, claimed, discarded = a_job(), a_job(), a_job()
        assert await log.acceptance(published.job_id) == "missing"
        for job in (published, claimed, discarded):
            await log.store(job, 60_000)
            assert await log.acceptance(job.job_id) == "stored"
        await log.mark_published(published.job_id, "t", 0, 0)
        worker.claim([claimed.job_id], "w")
        await log.discard(discarded.job_id)
        jobs = (published, claimed, discarded)
        found = [await log.acceptance(job.job_id) for job in jobs]
        assert found == ["acknowledged", "acknowledged", "discarded"]

    run(redis_url, test)


def test_heartbeats_of_the_dead_are_forgotten(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        assert await log.heartbeats() == []
        worker.write_heartbeat(a_heartbeat("w2"))
        worker.write_heartbeat(a_heartbeat("w1"))
        assert await log.heartbeats() == [a_heartbeat("w1"), a_heartbeat("w2")]
        worker._redis.delete(names.worker_key("w1"))  # as when its time to live runs out
        assert await log.heartbeats() == [a_heartbeat("w2")]
        assert worker._redis.smembers(names.WORKERS_KEY) == {b"w2"}

    run(redis_url, test)


def test_open_jobs_come_with_what_the_sweeper_needs(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        jobs = [a_job(0), a_job(255), a_job(255, deadline_ms=1), a_job(9), a_job(9)]
        for job in jobs:
            await log.store(job, 60_000)
        await log.mark_published(jobs[0].job_id, "a.topic:x", 3, 17)
        epoch = worker.claim([jobs[1].job_id], "w")[0].epoch
        await log.cancel(jobs[2].job_id)
        await log.finish(jobs[3].job_id, End("stop"))
        worker._redis.delete(names.job_key(jobs[4].job_id))
        found = {job.job_id: job async for page in log.open_jobs(0) for job in page}
        assert set(found) == {job.job_id for job in jobs[:3]}
        published, claimed, expired = (found[job.job_id] for job in jobs[:3])
        assert published.published == ("a.topic:x", 3, 17)
        assert (published.claimed_by, published.epoch) == (None, 0)
        assert (claimed.claimed_by, claimed.epoch, claimed.published) == ("w", epoch, None)
        assert (expired.cancelled, expired.expired) == (True, True)
        assert (published.cancelled, published.expired) == (False, False)
        assert worker._redis.zcard(names.open_jobs_key(9)) == 0  # the lost one is swept out
        assert [page async for page in log.open_jobs(60_000) if page] == []
        await log.mark_published(jobs[4].job_id, "t", 0, 0)
        assert not worker._redis.exists(names.job_key(jobs[4].job_id))

    run(redis_url, test)


def test_more_open_jobs_than_a_page(redis_url: str, worker: JobLog) -> None:
    async def test(log: AsyncJobLog) -> None:
        jobs = [a_job() for _ in range(1201)]
        worker._run([core.store_call(job, 60_000) for job in jobs])
        found = [job.job_id async for page in log.open_jobs(0) for job in page]
        assert sorted(found) == sorted(job.job_id for job in jobs)

    run(redis_url, test)


def test_one_gateway_sweeps_at_a_time(redis_url: str) -> None:
    async def test(log: AsyncJobLog) -> None:
        assert await log.take_sweeper("a", 60_000)
        assert not await log.take_sweeper("b", 60_000)
        assert await log.take_sweeper("a", 1)
        while not await log.take_sweeper("b", 60_000):
            pass
        assert not await log.take_sweeper("a", 1)

    run(redis_url, test)
