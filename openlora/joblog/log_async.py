"""``AsyncJobLog``: the gateway's side of the job log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import redis
import redis.asyncio

from openlora.joblog import core
from openlora.joblog.append import append_calls, decode_append
from openlora.joblog.claim import claim_call, decode_claim
from openlora.joblog.clients import redis_errors
from openlora.joblog.core import Acceptance, JobView, OpenJob
from openlora.joblog.events import EventStream
from openlora.joblog.script_channel_async import AsyncScriptChannel
from openlora.joblog.scripts import Call
from openlora.protocol import names
from openlora.protocol.events import Chunk, End
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat

_PAGE = 500
_SHARDS_AT_ONCE = 32
"""A sweep asks all shards in one go for 5 ms of the event loop, in which no token is relayed."""


class AsyncJobLog:
    """Stores, cancels, reads and watches jobs over one client (``async_redis_client(url)``).

    Every method may raise ``Overloaded`` when Redis does not answer; calling it again is safe.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open
        self._channel = AsyncScriptChannel(client)

    async def store(self, job: Job, lease_ms: int) -> None:
        """Make the job durable before it is published; ``lease_ms`` counts if it is leased."""
        await self._run([core.store_call(job, lease_ms)])

    async def mark_published(self, job_id: str, topic: str, partition: int, offset: int) -> None:
        """The broker acknowledged the job there."""
        await self._run([core.published_call(job_id, topic, partition, offset)])

    async def discard(self, job_id: str) -> None:
        """The job was not accepted and its client knows: no worker will run it.

        A tombstone stays for an hour, in case the broker has the job after all.
        """
        await self._run([core.discard_call(job_id)])

    async def cancel(self, job_id: str) -> bool:
        """Mark an open job, for its worker to see; False where there is no such open job.

        Workers need no message: each append is answered with the mark, and for a job that
        produces nothing yet they ask twice a second.
        """
        return bool((await self._run([core.cancel_call(job_id)]))[0])

    async def renew_leases(self, job_ids: Iterable[str], lease_ms: int) -> None:
        """Somebody still watches these jobs; one call per delivery shard."""
        await self._run(core.renew_calls(job_ids, lease_ms))

    async def read(self, job_id: str, after: int = -1) -> JobView | None:
        """The job with the chunks that hold an index above ``after``; None if it is not known.

        The first chunk may begin at or before ``after``: it is given whole. So is a log that was
        restarted, whose first chunk says so: the reader's ``after`` may be of the run that was
        lost, which the chunk's epoch tells.
        """
        return core.decode_view((await self._run([core.read_call(job_id, after)]))[0], after)

    async def finish(self, job_id: str, end: End, *, if_cancelled: bool = False) -> bool:
        """End an open job from here: whoever runs it is fenced. False if it had ended already.

        Claim and append are two calls; a worker that claims in between wins. ``if_cancelled``: not
        if somebody watches it again, and nobody asked to cancel it.
        """
        claim = decode_claim((await self._run([claim_call(job_id, "gateway")]))[0])
        if claim.status != "claimed" or (if_cancelled and not claim.cancelled):
            return False
        length = sum(len(chunk.tokens) for chunk in claim.chunks)
        ((_, call),) = append_calls([Chunk(job_id, claim.epoch, length, end=end)])
        return decode_append((await self._run([call]))[0])[0].status == "taken"

    async def claim_idempotency(
        self, tenant: str, key: str, digest: str, job_id: str
    ) -> tuple[str, bool]:
        """The job that first used the key within 24 h, and whether that is ``job_id``.

        Raises:
            InvalidRequest: the key was first used with another ``digest``.
        """
        reply = (await self._run([core.once_call(tenant, key, digest, job_id)]))[0]
        return core.decode_once(reply, key, digest, job_id)

    async def release_idempotency(self, tenant: str, key: str, job_id: str) -> None:
        """Free the key if ``job_id`` holds it: that job was not accepted."""
        await self._run([core.release_call(tenant, key, job_id)])

    async def acceptance(self, job_id: str) -> Acceptance:
        """How far another caller came with making this job: see ``Acceptance``."""
        with redis_errors(self._redis):
            fields = await self._redis.hmget(names.job_key(job_id), core.ACCEPTANCE_FIELDS)
        return core.decode_acceptance(fields)

    def events(self, shards: Iterable[int]) -> EventStream:
        """What workers publish on these delivery shards, on a connection of its own."""
        return EventStream(self._redis, shards)

    async def heartbeats(self) -> list[Heartbeat]:
        """Of all workers that live, by ID. Names of those that do not are removed."""
        with redis_errors(self._redis):
            members = sorted(await self._redis.smembers(names.WORKERS_KEY))
            if not members:
                return []
            async with self._redis.pipeline(transaction=False) as pipeline:
                for member in members:
                    pipeline.get(names.worker_key(member.decode()))
                values = await pipeline.execute()
            gone = [member for member, value in zip(members, values, strict=True) if value is None]
            if gone:
                await self._redis.srem(names.WORKERS_KEY, *gone)
        return core.decode_heartbeats(values)

    async def open_jobs(self, min_age_ms: int) -> AsyncIterator[list[OpenJob]]:
        """All open jobs that were stored at least ``min_age_ms`` ago, in pages, shard by shard."""
        for first in range(0, names.SHARD_COUNT, _SHARDS_AT_ONCE):
            shards = range(first, min(first + _SHARDS_AT_ONCE, names.SHARD_COUNT))
            keys = [names.open_jobs_key(shard) for shard in shards]
            with redis_errors(self._redis):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.zcard(key)
                    counts = await pipeline.execute()
            for key, count in zip(keys, counts, strict=True):
                for start in range(0, count, _PAGE):
                    yield await self._open_page(key, start, min_age_ms)

    async def _open_page(self, key: str, start: int, min_age_ms: int) -> list[OpenJob]:
        with redis_errors(self._redis):
            seconds, micros = await self._redis.time()
            now_ms = seconds * 1000 + micros // 1000
            found = await self._redis.zrangebyscore(
                key, "-inf", now_ms - min_age_ms, start=start, num=_PAGE, withscores=True
            )
            if not found:
                return []
            async with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, _ in found:
                    pipeline.hmget(names.job_key(job_id.decode()), core.OPEN_JOB_FIELDS)
                rows = await pipeline.execute()
            jobs = []
            for (job_id, stored_ms), fields in zip(found, rows, strict=True):
                job = core.decode_open_job(job_id, stored_ms, fields, now_ms)
                if job is not None:
                    jobs.append(job)
                elif fields[-1] is None:  # Redis lost the job itself
                    await self._redis.zrem(key, job_id)
        return jobs

    async def take_sweeper(self, owner: str, ttl_ms: int) -> bool:
        """Whether ``owner`` sweeps for the next ``ttl_ms``: one gateway at a time does."""
        reply = (await self._run([core.lead_call(owner, ttl_ms)]))[0]
        return bool(reply)

    async def _run(self, calls: Sequence[Call]) -> list[Any]:
        with redis_errors(self._redis):
            replies = await self._send(calls)
            lost = core.without_script(replies)
            if lost:  # Redis is new or was restarted
                for script in {calls[i].script for i in lost}:
                    await self._redis.script_load(script.source)
                again = await self._send([calls[i] for i in lost])
                for i, reply in zip(lost, again, strict=True):
                    replies[i] = reply
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        return await self._channel.run(calls) if calls else []
