"""Deletes adapter content that nothing names any more: no version, no job or batch under way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from openlora.adapters.stores import Store
from openlora.errors import AdapterFailed, InvalidRequest, Overloaded
from openlora.joblog import AsyncJobLog
from openlora.protocol.jobs import AdapterRef
from openlora.protocol.names import job_key
from openlora.registry import AsyncAdapterRegistry
from producer.bulk.keys import OPEN_KEY, contents_key

PERIOD_S = 30.0
GRACE_MS = 60_000
"""Longer than a gateway takes from resolving a request's adapters to storing its job."""

log = logging.getLogger(__name__)


class _JobAdapters(msgspec.Struct):
    """The part of a ``Job`` that matters here."""

    adapters: tuple[AdapterRef, ...] = ()


class AdapterCollector:
    """Collects for one registry. Several gateways may do so at once: a release is idempotent."""

    def __init__(
        self,
        registry: AsyncAdapterRegistry,
        job_log: AsyncJobLog,
        client: redis.asyncio.Redis,
        store: Store,
    ) -> None:
        self._registry = registry
        self._job_log = job_log
        # redis-py types each command as "the answer or an awaitable of it"
        self._redis: Any = client
        self._store = store

    async def run(self) -> None:
        """Collects every ``PERIOD_S`` until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.collect(GRACE_MS)
                await asyncio.to_thread(self._store.sweep)
            except (RedisError, OSError, Overloaded, InvalidRequest) as error:
                log.warning("adapter content not collected, tried again later: %s", error)

    async def collect(self, grace_ms: int) -> list[str]:
        """Releases content that was dropped ``grace_ms`` ago or earlier; the hashes deleted."""
        now_ms = time.time_ns() // 1_000_000
        before_ms = now_ms - grace_ms
        dropped = await self._registry.dropped(before_ms)
        if not dropped:
            return []
        in_use = await self._in_use()
        holder = await self._registry.holder()
        deleted = []
        for content in dropped:
            if content in in_use:
                continue
            if await self._registry.is_named(content):
                await self._registry.forget(content)
                continue
            is_wanted = self._announced(content, before_ms)
            try:
                if await asyncio.to_thread(self._store.release, content, holder, is_wanted):
                    deleted.append(content)
                    log.info("adapter content %s deleted: nothing names it", content)
                elif await asyncio.to_thread(is_wanted):
                    continue
            except AdapterFailed as error:
                log.warning("dropped adapter content is not in the store: %s", error)
            await self._registry.forget(content)
        return deleted

    def _announced(self, content: str, before_ms: int) -> Callable[[], bool]:
        """For the thread that releases it: whether it is being stored again, so that a version is
        coming."""
        loop = asyncio.get_running_loop()

        def is_wanted() -> bool:
            dropped = self._registry.dropped(before_ms)
            return content not in asyncio.run_coroutine_threadsafe(dropped, loop).result()

        return is_wanted

    async def _in_use(self) -> set[str]:
        """Hashes that open jobs and batches name."""
        found = await self._of_batches()
        async for page in self._job_log.open_jobs(0):
            if not page:
                continue
            async with self._redis.pipeline(transaction=False) as pipe:
                for job in page:
                    pipe.hget(job_key(job.job_id), "job")
                for value in await pipe.execute():
                    if value is not None:
                        job_adapters = msgspec.json.decode(value, type=_JobAdapters)
                        found |= {adapter.hash for adapter in job_adapters.adapters}
        return found

    async def _of_batches(self) -> set[str]:
        batches = await self._redis.smembers(OPEN_KEY)
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in batches:
                pipe.smembers(contents_key(batch_id.decode()))
            return {content.decode() for contents in await pipe.execute() for content in contents}
