"""Both shells of the registry, against a real Redis server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from openlora.errors import InvalidRequest
from openlora.joblog import async_redis_client, redis_client
from openlora.protocol.names import ADAPTERS_CHANNEL
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry, AsyncAdapterRegistry

pytestmark = pytest.mark.services


class Blocking:
    """The asyncio shell, called like the blocking one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            client = async_redis_client(self._url)
            try:
                return await getattr(AsyncAdapterRegistry(client), name)(*args)
            finally:
                await client.aclose()

        return lambda *args: asyncio.run(call(*args))


@pytest.fixture(params=["sync", "async"])
def registry(request: pytest.FixtureRequest, redis_url: str) -> Any:
    if request.param == "async":
        return Blocking(redis_url)
    return AdapterRegistry(redis_client(redis_url))


def record(adapter_id: str = "a", content: str = "f") -> AdapterRecord:
    return AdapterRecord(adapter_id, 0, content * 64, 8, (), "base", 10, "/x", 5)


def test_records_are_put_found_listed_and_removed(registry: Any) -> None:
    assert registry.get("a") is None
    assert registry.list() == []
    stored = registry.put(record("b"))
    assert stored.version == 1
    registry.put(record("a"))
    assert registry.get("b") == stored
    assert [found.id for found in registry.list()] == ["a", "b"]
    assert registry.remove("b")
    assert not registry.remove("b")
    assert [found.id for found in registry.list()] == ["a"]


def test_versions_follow_the_content_and_survive_removal(registry: Any) -> None:
    assert registry.put(record(content="1")).version == 1
    assert registry.put(record(content="1")).version == 1
    assert registry.put(record(content="2")).version == 2
    registry.remove("a")
    assert registry.put(record(content="2")).version == 3


def test_a_malformed_id_is_not_stored(registry: Any) -> None:
    with pytest.raises(InvalidRequest):
        registry.put(record("../a"))
    assert registry.list() == []


def test_changes_are_published_and_repeats_are_not(registry: Any, redis_url: str) -> None:
    with redis_client(redis_url) as client, client.pubsub() as pubsub:
        pubsub.subscribe(ADAPTERS_CHANNEL)
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        registry.put(record())
        registry.put(record())
        registry.remove("a")
        registry.put(record("z"))
        heard = [pubsub.get_message(timeout=5)["data"] for _ in range(3)]
        assert heard == [b"a", b"a", b"z"]


def test_versions_are_unique_under_contention(redis_url: str) -> None:
    versions: list[int] = []

    def put_many(worker: int) -> None:
        with redis_client(redis_url) as client:
            registry = AdapterRegistry(client)
            for i in range(20):
                stored = registry.put(
                    AdapterRecord("a", 0, f"{worker}-{i}", 8, (), "base", 10, "/x", 5)
                )
                versions.append(stored.version)

    threads = [threading.Thread(target=put_many, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == [*range(1, 61)]
    with redis_client(redis_url) as client:
        newest = AdapterRegistry(client).get("a")
    assert newest is not None
    assert newest.version == 60
