"""Places for open jobs, counted in a real Redis."""

from __future__ import annotations

import asyncio

import pytest

from gateway import limits
from gateway.limits import InFlight
from openlora.errors import Overloaded
from openlora.joblog import AsyncJobLog, JobLog, async_redis_client, redis_client
from openlora.protocol.jobs import AdapterRef
from tests.joblog.jobs import a_chunk, a_job

pytestmark = pytest.mark.services

PIRATE = (AdapterRef("pirate", 1, "ab" * 32),)


def run(redis_url, test):
    async def main():
        async with async_redis_client(redis_url) as client:
            await test(AsyncJobLog(client), InFlight(client, per_tenant=3, per_adapter=2))

    asyncio.run(main())


async def accept(log, in_flight, **fields):
    job = a_job(**fields)
    await in_flight.reserve(job)
    await log.store(job, 60_000)
    return job


def test_a_flood_of_one_tenant_or_adapter_leaves_room_for_others(redis_url):
    async def test(log, in_flight):
        for _ in range(2):
            await accept(log, in_flight, tenant="acme", adapters=PIRATE)
        with pytest.raises(Overloaded, match="adapter 'pirate' has 2 jobs under way") as caught:
            await accept(log, in_flight, tenant="acme", adapters=PIRATE)
        assert caught.value.retry_after_ms > 0
        # the place with the tenant was given back
        await accept(log, in_flight, tenant="acme")
        with pytest.raises(Overloaded, match="tenant 'acme' has 3 jobs under way"):
            await accept(log, in_flight, tenant="acme")
        await accept(log, in_flight, tenant="umbrella")

    run(redis_url, test)


def test_no_tenant_keeps_others_from_an_adapter(redis_url):
    """From one that all may use, or from another of theirs that has the same ID."""

    async def test(log, in_flight):
        for _ in range(2):
            await accept(log, in_flight, tenant="acme", adapters=PIRATE)
        with pytest.raises(Overloaded):
            await accept(log, in_flight, tenant="acme", adapters=PIRATE)
        for _ in range(2):
            await accept(log, in_flight, tenant="umbrella", adapters=PIRATE)

    run(redis_url, test)


def test_a_place_asked_for_again_after_a_lost_reply_is_still_ones_own(redis_url):
    async def test(log, in_flight):
        jobs = [await accept(log, in_flight, tenant="acme") for _ in range(3)]
        await in_flight.reserve(jobs[-1])

    run(redis_url, test)


def test_all_gateways_count_what_comes_together(redis_url):
    async def test(log, in_flight):
        before = await in_flight.arrive(0)
        other = InFlight(in_flight._redis, per_tenant=3, per_adapter=2)
        assert await in_flight.arrive() == before + 1
        assert await other.arrive() == before + 2
        assert await other.arrive(-1) == before + 1
        assert await in_flight.arrive(0) == before + 1

    run(redis_url, test)


def test_jobs_that_ended_make_room_although_nobody_said_so(redis_url):
    async def test(log, in_flight):
        jobs = [await accept(log, in_flight, tenant="acme") for _ in range(3)]
        with redis_client(redis_url) as client:
            worker = JobLog(client)
            (claim,) = worker.claim([jobs[1].job_id], "w")
            worker.append([a_chunk(jobs[1].job_id, claim.epoch, 0, 1, end=True)])
        await log.discard(jobs[2].job_id)
        await accept(log, in_flight, tenant="acme")
        await accept(log, in_flight, tenant="acme")
        with pytest.raises(Overloaded):
            await accept(log, in_flight, tenant="acme")

    run(redis_url, test)


def test_a_job_on_its_way_counts_and_one_that_never_came_does_not(redis_url, monkeypatch):
    async def test(log, in_flight):
        for _ in range(3):
            await in_flight.reserve(a_job(tenant="acme"))
        with pytest.raises(Overloaded):
            await in_flight.reserve(a_job(tenant="acme"))
        monkeypatch.setattr(limits, "NOT_STORED_AFTER_S", 0.0)
        await in_flight.reserve(a_job(tenant="acme"))

    run(redis_url, test)


def test_a_refused_job_is_released(redis_url):
    async def test(log, in_flight):
        for _ in range(5):
            job = a_job(tenant="acme", adapters=PIRATE)
            await in_flight.reserve(job)
            await in_flight.release(job)

    run(redis_url, test)
