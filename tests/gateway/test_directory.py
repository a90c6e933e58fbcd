"""The gateway's copy of the registry misses no change, however reads and messages fall."""

from __future__ import annotations

import asyncio

import pytest

from gateway.directory import AdapterDirectory
from openlora.joblog import async_redis_client, redis_client
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.gateway.test_remote_adapters import in_loop


class Registry:
    """Records and their revision; a read of one waits for what the test does first."""

    def __init__(self) -> None:
        self.records: dict[str, AdapterRecord] = {}
        self.number = 0
        self.before_read = None

    def put(self, adapter_id: str, version: int) -> bytes:
        """The message of the change."""
        self.records[adapter_id] = AdapterRecord(
            adapter_id, version, "a" * 64, 4, (), "tiny", 1, "/x", 0
        )
        self.number += 1
        return f"{self.number} {adapter_id}".encode()

    async def revision(self) -> int:
        return self.number

    async def snapshot(self) -> tuple[int, dict[str, AdapterRecord]]:
        return self.number, dict(self.records)

    async def by_key(self, key: str) -> AdapterRecord | None:
        found = self.records.get(key)
        if self.before_read is not None:
            await self.before_read()
        return found


def directory_of(registry: Registry) -> AdapterDirectory:
    directory = AdapterDirectory(async_redis_client("redis://127.0.0.1:1"))
    directory.registry = registry
    return directory


def versions(directory: AdapterDirectory) -> dict[str, int]:
    return {record.id: record.version for record in directory.known}


@in_loop
async def test_a_message_takes_over_its_change_alone():
    registry = Registry()
    directory = directory_of(registry)
    await directory._apply(registry.put("poet", 1))
    assert versions(directory) == {"poet": 1}


@in_loop
async def test_a_request_that_reads_everything_beside_a_message_hides_no_later_change():
    registry = Registry()
    directory = directory_of(registry)
    await directory.refresh()
    message = registry.put("poet", 1)
    registry.before_read = directory.refresh
    await directory._apply(message)
    registry.before_read = None
    await directory._apply(registry.put("poet", 2))
    assert versions(directory) == {"poet": 2}


@in_loop
async def test_an_older_record_does_not_replace_what_was_read_meanwhile():
    registry = Registry()
    directory = directory_of(registry)
    await directory.refresh()
    message = registry.put("poet", 1)

    async def changed() -> None:
        registry.put("poet", 2)
        await directory.refresh()

    registry.before_read = changed
    await directory._apply(message)
    assert versions(directory) == {"poet": 2}


@pytest.mark.services
@pytest.mark.parametrize("is_heard", [True, False])
def test_every_gateway_knows_a_change_within_a_second(redis_url, is_heard, monkeypatch):
    """Also one whose message is lost: pub/sub keeps nothing for whoever is away."""
    if is_heard:
        monkeypatch.setattr("gateway.directory.CHECK_S", 60.0)  # by the message alone
    else:
        monkeypatch.setattr("gateway.directory.ADAPTERS_CHANNEL", "somebody else's")
        monkeypatch.setattr("gateway.directory.CHECK_S", 0.05)

    async def main() -> None:
        clients = [async_redis_client(redis_url) for _ in range(2)]
        gateways = [AdapterDirectory(client) for client in clients]
        listening = [asyncio.create_task(gateway.run()) for gateway in gateways]
        with redis_client(redis_url) as client:
            registry = AdapterRegistry(client)

            async def known(expected: dict[str, int]) -> None:
                async with asyncio.timeout(20):
                    while any(versions(gateway) != expected for gateway in gateways):
                        await asyncio.sleep(0.01)

            for fill in ("a", "b"):
                registry.put(AdapterRecord("poet", 0, fill * 64, 4, (), "tiny", 1, "/x", 0))
                await known({"poet": 1 if fill == "a" else 2})
            registry.rollback("poet")
            await known({"poet": 1})
            registry.remove("poet")
            await known({})
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        for one in clients:
            await one.aclose()

    asyncio.run(main())
