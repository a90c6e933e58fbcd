"""The gateway's copy of the adapter registry, kept fresh by the registry's channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from gateway.drafts import AdapterChoice
from openlora.errors import InvalidRequest, Overloaded, UnknownAdapter
from openlora.protocol.jobs import AdapterRef
from openlora.protocol.names import ADAPTERS_CHANNEL
from openlora.protocol.status import AdapterRecord
from openlora.registry import AsyncAdapterRegistry

log = logging.getLogger(__name__)

RELOAD_S = 5.0
RETRY_AFTER_MS = 1000


class AdapterDirectory:
    """Adapter records by ID, in memory.

    A change is known here as soon as its message arrives, and after ``RELOAD_S`` at the latest
    (pub/sub keeps nothing for whoever was away). An ID not known here is asked of Redis, so a
    client that just registered an adapter elsewhere can use it at once.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._registry = AsyncAdapterRegistry(client)
        self._records: dict[str, AdapterRecord] = {}

    async def run(self) -> None:
        """Keeps the copy fresh until cancelled."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError, InvalidRequest) as error:
                log.warning("adapter registry not read, tried again soon: %s", error)
                await asyncio.sleep(1)

    async def _listen(self) -> None:
        pubsub = self._redis.pubsub()
        async with contextlib.aclosing(pubsub):
            await pubsub.subscribe(ADAPTERS_CHANNEL)
            while True:
                await self.reload()
                message: Any = await pubsub.get_message(timeout=RELOAD_S)
                while message is not None and message["type"] != "message":
                    message = await pubsub.get_message(timeout=RELOAD_S)

    async def reload(self) -> None:
        """Reads all records."""
        self._records = {record.id: record for record in await self._registry.list()}

    async def list(self) -> list[AdapterRecord]:
        """All records, from Redis.

        Raises:
            Overloaded: Redis does not answer.
        """
        try:
            await self.reload()
        except (RedisError, OSError) as error:
            raise _unreachable(error) from error
        return [*self._records.values()]

    async def get(self, adapter_id: str) -> AdapterRecord:
        """The newest record of ``adapter_id``.

        Raises:
            UnknownAdapter: there is none.
            Overloaded: Redis does not answer.
        """
        record = self._records.get(adapter_id)
        if record is None:
            try:
                record = await self._registry.get(adapter_id)
            except (RedisError, OSError) as error:
                raise _unreachable(error) from error
            if record is None:
                raise UnknownAdapter(
                    f"adapter {adapter_id!r} is not registered; GET /v1/adapters lists those that "
                    "are"
                )
            self._records[adapter_id] = record
        return record

    async def resolve(self, choices: Iterable[AdapterChoice]) -> tuple[AdapterRef, ...]:
        """``choices`` as versions and content; the same errors as ``get``."""
        refs = []
        for choice in choices:
            record = await self.get(choice.id)
            refs.append(AdapterRef(record.id, record.version, record.hash, choice.weight))
        return tuple(refs)

    async def put(self, record: AdapterRecord) -> AdapterRecord:
        """Registers ``record`` and returns it with its version.

        Raises:
            Overloaded: Redis does not answer.
        """
        try:
            stored = await self._registry.put(record)
        except (RedisError, OSError) as error:
            raise _unreachable(error) from error
        self._records[stored.id] = stored
        return stored

    async def remove(self, adapter_id: str) -> None:
        """Forgets ``adapter_id``; jobs that were accepted with it still run.

        Raises:
            UnknownAdapter: it is not registered.
            Overloaded: Redis does not answer.
        """
        await self.get(adapter_id)
        try:
            await self._registry.remove(adapter_id)
        except (RedisError, OSError) as error:
            raise _unreachable(error) from error
        self._records.pop(adapter_id, None)


def _unreachable(error: Exception) -> Overloaded:
    return Overloaded(
        f"the adapter registry does not answer ({error}); try again", retry_after_ms=RETRY_AFTER_MS
    )
