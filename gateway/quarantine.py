"""Adapters that are not served, since different jobs with them ended engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis.asyncio

from openlora.errors import AdapterFailed
from openlora.joblog.clients import redis_errors
from openlora.protocol.jobs import AdapterRef
from openlora.protocol.names import adapter_deaths_key, quarantine_key


class Quarantine:
    """The gateway's side of ``openlora.joblog.crashes``. May raise ``Overloaded``."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open

    async def check(self, adapters: Iterable[AdapterRef]) -> None:
        """Refuse adapters that are quarantined.

        Raises:
            AdapterFailed: names the adapter and what it did.
        """
        hashes = [adapter.hash for adapter in adapters]
        if not hashes:
            return
        with redis_errors(self._redis):
            async with self._redis.pipeline(transaction=False) as pipeline:
                for content_hash in hashes:
                    pipeline.get(quarantine_key(content_hash))
                reasons = await pipeline.execute()
        for reason in reasons:
            if reason is not None:
                raise AdapterFailed(reason.decode())

    async def release(self, content_hash: str) -> None:
        """End an adapter's quarantine."""
        with redis_errors(self._redis):
            await self._redis.delete(quarantine_key(content_hash))
            await self._redis.delete(adapter_deaths_key(content_hash))
