"""The gateway's copy of the registry misses no change, however reads and messages fall."""

from __future__ import annotations

from gateway.directory import AdapterDirectory
from openlora.joblog import async_redis_client
from openlora.protocol.status import AdapterRecord
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
