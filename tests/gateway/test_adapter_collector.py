"""What the collector leaves alone; what it deletes is tested with jobs and batches under way."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.adapter_collector import GRACE_MS, AdapterCollector
from gateway.registration import STORING_MS, NewAdapter, Registrar
from openlora.adapters.store import AdapterStore
from openlora.joblog import AsyncJobLog, async_redis_client
from openlora.protocol.status import AdapterRecord
from openlora.registry import OPERATOR, AsyncAdapterRegistry
from tests.gateway.peft_dirs import write_adapter

pytestmark = pytest.mark.services


async def put_and_drop(registry: AsyncAdapterRegistry, store: AdapterStore, source: Path) -> str:
    """Content that an adapter had and none has any more; its hash."""
    content = store.put(source, holder=await registry.holder()).hash
    await registry.put(AdapterRecord("one", 0, content, 4, (), "tiny", 1, "/x", 0))
    await registry.remove("one")
    return content


def test_content_that_is_added_again_while_jobs_are_looked_at_stays(
    redis_url: str, tmp_path: Path
) -> None:
    store, source = AdapterStore(tmp_path / "store"), write_adapter(tmp_path / "one")

    async def main() -> None:
        client = async_redis_client(redis_url)
        registry = AsyncAdapterRegistry(client)
        content = await put_and_drop(registry, store, source)
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


def test_content_that_is_added_again_while_it_is_released_stays(
    redis_url: str, tmp_path: Path
) -> None:
    """Announced behind the collector's last look at it, as by another gateway."""
    store, source = AdapterStore(tmp_path / "store"), write_adapter(tmp_path / "one")

    async def main() -> None:
        client = async_redis_client(redis_url)
        registry = AsyncAdapterRegistry(client)
        content = await put_and_drop(registry, store, source)
        loop = asyncio.get_running_loop()

        class Slow(AdapterStore):
            def release(self, *args: Any) -> bool:
                announced = registry.expect(content, STORING_MS)
                asyncio.run_coroutine_threadsafe(announced, loop).result()
                return super().release(*args)

        slow = Slow(tmp_path / "store")
        collector = AdapterCollector(registry, AsyncJobLog(client), client, slow)
        assert await collector.collect(0) == []
        assert store.held(content) == (await registry.holder(),)
        assert await registry.dropped(time.time_ns() // 1_000_000 + 2 * STORING_MS) == [content]
        await client.aclose()

    asyncio.run(main())


def test_content_of_a_gateway_that_dies_before_it_names_it_is_collected(
    redis_url: str, tmp_path: Path
) -> None:
    store, source = AdapterStore(tmp_path / "store"), write_adapter(tmp_path / "one")

    class Dying:
        """A store whose process ends as soon as it has the content."""

        def put(self, *args: Any, **kwargs: Any) -> None:
            store.put(*args, **kwargs)
            raise KeyboardInterrupt

    async def main() -> None:
        client = async_redis_client(redis_url)
        registry, job_log = AsyncAdapterRegistry(client), AsyncJobLog(client)
        gateway: Any = SimpleNamespace(
            store=Dying(), job_log=job_log, directory=SimpleNamespace(registry=registry)
        )
        with pytest.raises(KeyboardInterrupt):
            await Registrar(gateway).register(NewAdapter("one", str(source)), OPERATOR)
        (content,) = [name for name in os.listdir(tmp_path / "store") if len(name) == 64]
        collector = AdapterCollector(registry, job_log, client, store)
        assert await collector.collect(GRACE_MS) == [], "it may be on its way still"
        assert await collector.collect(-2 * STORING_MS) == [content]
        await client.aclose()

    asyncio.run(main())
