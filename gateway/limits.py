"""How many jobs of one tenant may be open at once, and how many of them with one adapter.

Counted in Redis: each has a sorted set of its open jobs. An adapter's are counted for each tenant
by itself: none can keep others from an adapter that all may use, or from one of its own that has
the same ID. Nobody has to tell it when a job ends: where a set is full, those of its jobs that have
ended are taken out, and only then it is full indeed. So a gateway that dies, or a job that nobody
watches, leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import redis.asyncio

from openlora.errors import Overloaded
from openlora.joblog.clients import redis_errors
from openlora.joblog.script_channel_async import AsyncScriptChannel
from openlora.joblog.scripts import Call, Script
from openlora.protocol import names
from openlora.protocol.jobs import Job

RETRY_AFTER_MS = 1000
NOT_STORED_AFTER_S = 10.0
"""A member whose job is not in Redis is on its way there, or was refused; after this it was."""
_TTL_S = 24 * 3600

# Sent again after a lost reply, it finds its job there.
_RESERVE = Script(
    """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 1 end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""
)

_ARRIVE = Script(
    """
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('INCRBY', KEYS[1], ARGV[1])
"""
)


class InFlight:
    """Places for open jobs. Every method may raise ``Overloaded`` when Redis does not answer."""

    def __init__(self, client: redis.asyncio.Redis, per_tenant: int, per_adapter: int) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open
        self._channel = AsyncScriptChannel(client)
        self._per_tenant = per_tenant
        self._per_adapter = per_adapter

    async def reserve(self, job: Job) -> None:
        """Count ``job`` for its tenant, and with each of its adapters.

        Raises:
            Overloaded: one of them has as many open jobs as it may; carries ``retry_after_ms``.
        """
        taken: list[str] = []
        for key, limit, whose in self._sets(job):
            if not await self._take(key, limit, job.job_id):
                await self._give_back(taken, job.job_id)
                raise Overloaded(
                    f"{whose} has {limit} jobs under way, the most that are taken; try again when "
                    "one has ended",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            taken.append(key)

    async def release(self, job: Job) -> None:
        """The job came to nothing: do not count it."""
        await self._give_back([key for key, _, _ in self._sets(job)], job.job_id)

    def _sets(self, job: Job) -> list[tuple[str, int, str]]:
        sets = [(names.tenant_jobs_key(job.tenant), self._per_tenant, f"tenant {job.tenant!r}")]
        sets += [
            (
                names.adapter_jobs_key(job.tenant, adapter.id),
                self._per_adapter,
                f"adapter {adapter.id!r}",
            )
            for adapter in job.adapters
        ]
        return sets

    async def _take(self, key: str, limit: int, job_id: str) -> bool:
        if await self._add(key, limit, job_id):
            return True
        await self._prune(key)
        return await self._add(key, limit, job_id)

    async def _add(self, key: str, limit: int, job_id: str) -> bool:
        call = Call(_RESERVE, [key], [job_id, limit, str(time.time()), _TTL_S])
        return bool(await self._run(call))

    async def arrive(self, count: int = 1) -> int:
        """Count a job as come, at whichever gateway (-1: it was refused in the end, 0: ask alone);
        how many came so far. Only differences mean something."""
        return int(await self._run(Call(_ARRIVE, [names.ARRIVALS_KEY], [count, _TTL_S])))

    async def _run(self, call: Call) -> Any:
        with redis_errors(self._redis):
            (reply,) = await self._channel.run([call])
            if isinstance(reply, redis.exceptions.NoScriptError):
                await self._redis.script_load(call.script.source)
                (reply,) = await self._channel.run([call])
            if isinstance(reply, Exception):
                raise reply
        return reply

    async def _give_back(self, keys: Sequence[str], job_id: str) -> None:
        with redis_errors(self._redis):
            for key in keys:
                await self._redis.zrem(key, job_id)

    async def _prune(self, key: str) -> None:
        """Take out jobs that are not open any more."""
        with redis_errors(self._redis):
            members = await self._redis.zrange(key, 0, -1, withscores=True)
            async with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, _ in members:
                    pipeline.hget(names.job_key(job_id.decode()), "state")
                states = await pipeline.execute()
            forgotten = time.time() - NOT_STORED_AFTER_S
            gone = [
                job_id
                for (job_id, since), state in zip(members, states, strict=True)
                if state not in (b"open", None) or (state is None and since < forgotten)
            ]
            if gone:
                await self._redis.zrem(key, *gone)
