"""Both shells of the registry, against a real Redis server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from openlora.errors import Forbidden, InvalidRequest, UnknownAdapter
from openlora.joblog import async_redis_client, redis_client
from openlora.protocol.names import ADAPTERS_CHANNEL, ADAPTERS_KEY
from openlora.protocol.status import AdapterRecord
from openlora.registry import OPERATOR, AdapterRegistry, AsyncAdapterRegistry
from openlora.registry.records import KEPT_VERSIONS

pytestmark = pytest.mark.services


class Blocking:
    """The asyncio shell, called like the blocking one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **named: Any) -> Any:
            client = async_redis_client(self._url)
            try:
                return await getattr(AsyncAdapterRegistry(client), name)(*args, **named)
            finally:
                await client.aclose()

        return lambda *args, **named: asyncio.run(call(*args, **named))


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
        registry.put(record(content="e"))
        registry.rollback("a")
        registry.remove("a")
        registry.put(record("z"))
        heard = [pubsub.get_message(timeout=5)["data"] for _ in range(5)]
        assert heard == [b"1 a", b"2 a", b"3 a", b"4 a", b"5 z"]


def test_a_pin_follows_the_id_and_ends_with_it(registry: Any) -> None:
    registry.put(record(content="1"))
    private = msgspec.structs.replace(record("b"), owner="acme", visibility="private")
    registry.put(private)
    before = registry.revision()
    registry.pin("a", pinned=True)
    registry.pin("a", pinned=True)
    registry.pin("acme/b", pinned=True)
    assert registry.revision() == before + 2  # workers and gateways hear of each change once
    assert sorted(registry.pins()) == ["a", "acme/b"]
    assert registry.put(record(content="2")) == registry.pins()["a"]
    registry.pin("acme/b", pinned=False)
    registry.remove("a")
    assert registry.pins() == {}
    registry.put(record(content="3"))
    assert registry.pins() == {}
    with pytest.raises(UnknownAdapter, match="'z' is not registered"):
        registry.pin("z", pinned=True)


def test_a_version_stays_what_it_was(registry: Any) -> None:
    first, second = registry.put(record(content="1")), registry.put(record(content="2"))
    assert registry.get("a") == registry.get("a@2") == second
    assert registry.get("a@1") == first
    assert registry.get("a@3") is None
    assert registry.get("b@1") is None
    assert list(registry.versions("a")) == [first, second]


def test_rollback_goes_to_the_version_before_or_to_any(registry: Any) -> None:
    versions = [registry.put(record(content=c)) for c in "123"]
    assert registry.rollback("a") == versions[1] == registry.get("a")
    assert registry.rollback("a") == versions[0]
    with pytest.raises(UnknownAdapter, match="'a' is not registered"):
        registry.rollback("a")
    assert registry.rollback("a", OPERATOR, 3) == versions[2] == registry.get("a")
    with pytest.raises(UnknownAdapter, match="'a@4'"):
        registry.rollback("a", OPERATOR, 4)
    registry.rollback("a", OPERATOR, 1)
    assert registry.put(record(content="1")) == versions[0]
    assert registry.put(record(content="2")).version == 4


def test_one_version_can_go_but_not_the_one_in_use(registry: Any) -> None:
    registry.put(record(content="1"))
    second = registry.put(record(content="2"))
    with pytest.raises(InvalidRequest, match="the version in use"):
        registry.remove("a@2")
    assert registry.remove("a@1")
    assert not registry.remove("a@1")
    assert list(registry.versions("a")) == [second]
    assert registry.get("a") == second


def test_old_versions_are_dropped_and_the_one_in_use_is_not(registry: Any) -> None:
    for number in range(KEPT_VERSIONS + 3):
        registry.put(record(content=chr(65 + number)))
    kept = [found.version for found in registry.versions("a")]
    assert kept == [*range(4, KEPT_VERSIONS + 4)]
    assert registry.get("a").version == KEPT_VERSIONS + 3
    assert registry.get("a@3") is None


def test_content_is_dropped_with_the_last_version_that_names_it(redis_url: str) -> None:
    registry = AdapterRegistry(redis_client(redis_url))
    shared, own = "1" * 64, "2" * 64
    for adapter_id, content in (("a", "1"), ("a", "2"), ("b", "1")):
        registry.put(record(adapter_id, content))
    later_ms = time.time_ns() // 1_000_000 + 1000
    assert registry.dropped(later_ms) == []
    registry.remove("a")
    assert registry.dropped(later_ms) == [own]
    assert registry.dropped(0) == []
    assert registry.is_named(shared)
    assert not registry.is_named(own)
    registry.put(record("c", "2"))
    assert registry.dropped(later_ms) == []
    registry.remove("b")
    assert registry.dropped(later_ms) == [shared]
    registry.forget(shared)
    registry.expect("3" * 64)
    assert registry.dropped(later_ms) == ["3" * 64]
    expected_ms = time.time_ns() // 1_000_000 + 1
    while time.time_ns() // 1_000_000 <= expected_ms:
        pass  # the registry counts in milliseconds
    registry.expect("3" * 64)  # stored once more: its version gets as much time again
    assert registry.dropped(expected_ms) == []
    assert registry.holder() == registry.holder()


def private(tenant: str, content: str) -> AdapterRecord:
    return msgspec.structs.replace(record("a", content), owner=tenant, visibility="private")


def test_private_adapters_are_their_tenant_s_alone(registry: Any) -> None:
    mine, theirs = registry.put(private("me", "1")), registry.put(private("them", "2"))
    assert (mine.version, theirs.version) == (1, 1)
    assert registry.get("a", "me") == registry.get("a@1", "me") == mine
    assert registry.get("a", "them") == theirs
    for nobody in (OPERATOR, "other"):
        assert registry.get("a", nobody) is None
        assert registry.get("a@1", nobody) is None
        assert registry.list(nobody) == []
        assert list(registry.versions("a", nobody)) == []
        assert not registry.remove("a", nobody)
        with pytest.raises(UnknownAdapter):
            registry.rollback("a", nobody)
    assert registry.list("me") == [mine]
    assert registry.remove("a", "me")
    assert registry.get("a", "them") == theirs


def test_a_public_adapter_is_changed_by_its_owner_alone(registry: Any) -> None:
    shared = registry.put(msgspec.structs.replace(record("a", "1"), owner="them"))
    assert registry.get("a", "me") == shared
    changes: list[Callable[[], Any]] = [
        lambda: registry.put(record("a", "2")),
        lambda: registry.remove("a", "me"),
        lambda: registry.rollback("a", "me"),
    ]
    for change in changes:
        with pytest.raises(Forbidden, match="another tenant"):
            change()
    mine = registry.put(private("me", "3"))
    assert registry.get("a", "me") == mine
    assert registry.remove("a", "me")
    assert registry.get("a", "me") == shared


def test_records_of_an_earlier_version_of_the_program_are_understood(
    registry: Any, redis_url: str
) -> None:
    old = b'{"id":"a","version":3,"hash":"%s","rank":8,"targets":[],"base_model":"b",' % (b"1" * 64)
    old += b'"size_bytes":1,"source":"/x","created_ms":5}'
    with redis_client(redis_url) as client:
        client.hset(ADAPTERS_KEY, mapping={"a": old, "a#version": 3})
    assert registry.get("a@3").version == 3
    assert registry.put(record(content="2")).version == 4
    assert registry.get("a@3").hash == "1" * 64
    assert registry.rollback("a").version == 3


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
