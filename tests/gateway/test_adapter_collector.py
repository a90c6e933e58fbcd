"""What the collector leaves alone; what it deletes is tested with jobs and batches under way."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from gateway.adapter_collector import AdapterCollector
from openlora.adapters.store import AdapterStore
from openlora.joblog import AsyncJobLog, async_redis_client
from openlora.protocol.status import AdapterRecord
from openlora.registry import AsyncAdapterRegistry
from tests.gateway.peft_dirs import write_adapter

pytestmark = pytest.mark.services


def test_content_that_is_added_again_while_jobs_are_looked_at_stays(
    redis_url: str, tmp_path: Path
) -> None:
    store, source = AdapterStore(tmp_path / "store"), write_adapter(tmp_path / "one")

    async def main() -> None:
        client = async_redis_client(redis_url)
        registry = AsyncAdapterRegistry(client)
        content = store.put(source, holder=await registry.holder()).hash
        await registry.put(AdapterRecord("one", 0, content, 4, (), "tiny", 1, "/x", 0))
        await registry.remove("one")
        collector = AdapterCollector(registry, AsyncJobLog(client), client, store)
        in_use = collector._in_use

        async def stored_again() -> set[str]:
            began_ms = time.time_ns() // 1_000_000
            while time.time_ns() // 1_000_000 == began_ms:
                pass  # the registry counts in milliseconds
            await registry.expect(content)
            return await in_use()

        collector._in_use = stored_again  # type: ignore[method-assign]
        assert await collector.collect(0) == []
        assert store.path(content).is_dir()
        collector._in_use = in_use  # type: ignore[method-assign]
        assert await collector.collect(0) == [content]
        await client.aclose()

    asyncio.run(main())
