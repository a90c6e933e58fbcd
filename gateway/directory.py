"""The gateway's copy of the adapter registry, kept fresh by the registry's channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from openlora.errors import InvalidRequest, Overloaded
from openlora.protocol.jobs import AdapterRef
from openlora.protocol.names import ADAPTERS_CHANNEL
from openlora.protocol.requests import AdapterChoice
from openlora.protocol.status import AdapterRecord
from openlora.registry import AsyncAdapterRegistry, parse_reference
from openlora.registry.records import is_remote, key_of, private_key, unknown, visible_records

log = logging.getLogger(__name__)

CHECK_S = 0.5
RETRY_AFTER_MS = 1000


class AdapterDirectory:
    """Adapter records in memory: what each tenant may see, without a question to Redis.

    A change is known here as soon as its message arrives, and after ``CHECK_S`` at the latest
    (pub/sub keeps nothing for whoever was away). A message carries the registry's revision: where
    one is missing, everything is read anew. An ID not known here is asked of Redis, so a client
    that just registered an adapter elsewhere can use it at once.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.registry = AsyncAdapterRegistry(client)
        self._redis = client
        self._records: dict[str, AdapterRecord] = {}
        self._revision = -1
        self._visible: dict[str, list[AdapterRecord]] = {}
        # Set by the gateway, which registers what requests name by URL.
        self.remote: Callable[[str, str], Awaitable[AdapterRecord]] = self.get
        self._pins: tuple[int, dict[str, AdapterRecord]] = (-1, {})

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
                message: Any = await pubsub.get_message(timeout=CHECK_S)
                if message is None or message["type"] != "message":
                    await self.refresh()
                else:
                    await self._apply(message["data"])

    async def _apply(self, message: bytes) -> None:
        revision, _, key = message.decode().partition(" ")
        if not revision.isdigit() or int(revision) > self._revision + 1:
            await self.refresh()
        elif int(revision) == self._revision + 1:
            record = await self.registry.by_key(key)
            if int(revision) != self._revision + 1:
                return  # meanwhile a request had everything read, as of this change or a later one
            self._revision += 1
            if record is None:
                self._records.pop(key, None)
            else:
                self._records[key] = record
            self._visible.clear()

    async def refresh(self) -> None:
        """Reads all records, unless the registry's revision is that of the copy."""
        if await self.registry.revision() != self._revision:
            self._revision, self._records = await self.registry.snapshot()
            self._visible.clear()

    @property
    def known(self) -> Collection[AdapterRecord]:
        """The versions in use of all adapters, as this copy has them."""
        return self._records.values()

    async def list(self, tenant: str) -> list[AdapterRecord]:
        """The versions in use of what ``tenant`` may see, by ID; as fresh as Redis.

        Raises:
            Overloaded: Redis does not answer.
        """
        with _reachable():
            await self.refresh()
        if tenant not in self._visible:
            self._visible[tenant] = visible_records(self._records.values(), tenant)
        return self._visible[tenant]

    async def get(self, reference: str, tenant: str) -> AdapterRecord:
        """The record that ``id`` or ``id@version`` means to ``tenant``.

        Raises:
            InvalidRequest: ``reference`` is malformed.
            UnknownAdapter: there is none, or none that the tenant may see.
            Overloaded: Redis does not answer.
        """
        wanted = parse_reference(reference)
        record = self._records.get(private_key(tenant, wanted.id), self._records.get(wanted.id))
        if record is None or wanted.version not in (None, record.version):
            with _reachable():
                record = await self.registry.get(reference, tenant)
            if record is None:
                raise unknown(wanted)
        return record

    async def resolve(
        self, choices: Iterable[AdapterChoice], tenant: str
    ) -> tuple[AdapterRef, ...]:
        """``choices`` as versions and content; the same errors as ``get``, and what ``remote``
        raises."""
        refs = []
        for choice in choices:
            if is_remote(choice.id):
                record = await self.remote(choice.id, tenant)
            else:
                record = await self.get(choice.id, tenant)
            refs.append(AdapterRef(record.id, record.version, record.hash, choice.weight))
        return tuple(refs)

    async def versions(self, adapter_id: str, tenant: str) -> Sequence[AdapterRecord]:
        """All kept versions, the oldest first; the same errors as ``get``."""
        await self.get(adapter_id, tenant)
        with _reachable():
            return await self.registry.versions(adapter_id, tenant)

    async def put(self, record: AdapterRecord) -> AdapterRecord:
        """Registers ``record`` and returns it with its version.

        Raises:
            Forbidden: the ID is another tenant's.
            Overloaded: Redis does not answer.
        """
        with _reachable():
            stored = await self.registry.put(record)
            await self.refresh()
        return stored

    async def pinned(self) -> dict[str, AdapterRecord]:
        """The versions in use of all that is pinned, by key; as fresh as Redis.

        Raises:
            Overloaded: Redis does not answer.
        """
        with _reachable():
            revision = await self.registry.revision()
            if self._pins[0] != revision:
                self._pins = revision, await self.registry.pins()
        return self._pins[1]

    async def pin(self, record: AdapterRecord, *, pinned: bool) -> None:
        """Has workers keep the adapter in their pages, or no more.

        Raises:
            UnknownAdapter: it is not registered any more.
            Overloaded: Redis does not answer.
        """
        with _reachable():
            await self.registry.pin(key_of(record), pinned=pinned)

    async def remove(self, reference: str, tenant: str) -> None:
        """Forgets an ID or one version of it; jobs that were accepted with it still run.

        Raises:
            InvalidRequest: the version is the one in use.
            UnknownAdapter: it is not registered.
            Forbidden: it is another tenant's.
            Overloaded: Redis does not answer.
        """
        with _reachable():
            removed = await self.registry.remove(reference, tenant)
            await self.refresh()
        if not removed:
            raise unknown(parse_reference(reference))

    async def rollback(self, adapter_id: str, tenant: str, version: int | None) -> AdapterRecord:
        """Requests get ``version`` from now on, or the one before that in use.

        Raises:
            UnknownAdapter: there is no such ID or version.
            Forbidden: it is another tenant's.
            Overloaded: Redis does not answer.
        """
        with _reachable():
            record = await self.registry.rollback(adapter_id, tenant, version)
            await self.refresh()
        return record


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise Overloaded(
            f"the adapter registry does not answer ({error}); try again",
            retry_after_ms=RETRY_AFTER_MS,
        ) from error
