"""Pins of the registry reach a running worker's engine soon, and leave it."""

from __future__ import annotations

import threading

import pytest

from openlora.adapters.store import AdapterStore
from openlora.joblog import redis_client
from openlora.joblog.crashes import CrashLog
from openlora.protocol.names import quarantine_key
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.gateway.peft_dirs import write_adapter
from tests.workers.running import wait_until
from workers.pins import AGAIN_S, PinWatch

pytestmark = pytest.mark.services


def test_a_pinned_adapter_is_loaded_ahead(shared_system, tmp_path):
    system = shared_system
    (worker,) = system.workers
    store = AdapterStore(system.directory / "store")
    info = store.put(write_adapter(tmp_path / "a"))
    registry = AdapterRegistry(system.redis)
    registry.put(AdapterRecord("hot", 0, info.hash, 4, ("q_proj",), "tiny", 1, "/x", 0))
    assert info.hash not in system.heartbeat(worker).resident_adapters
    registry.pin("hot", pinned=True)
    # Much sooner than all pins are told once more.
    wait_until(lambda: info.hash in system.heartbeat(worker).resident_adapters, AGAIN_S / 2)
    (tier,) = system.heartbeat(worker).tiers
    assert (tier.tier, info.hash in tier.contents) == ("device", True)
    registry.remove("hot")


def test_what_the_store_lacks_is_said_and_ends_nothing(shared_system):
    system = shared_system
    (worker,) = system.workers
    registry = AdapterRegistry(system.redis)
    registry.put(AdapterRecord("gone", 0, "b" * 64, 4, ("q_proj",), "tiny", 1, "/x", 0))
    registry.pin("gone", pinned=True)
    wait_until(lambda: "event=pin_failed" in worker.log_text())
    registry.remove("gone")
    assert worker.process.poll() is None


def test_pins_that_go_while_redis_is_away_are_let_go_of(shared_system, tmp_path):
    system = shared_system
    store = AdapterStore(system.directory / "store")
    info = store.put(write_adapter(tmp_path / "a"))
    registry = AdapterRegistry(system.redis)
    registry.put(AdapterRecord("brief", 0, info.hash, 4, ("q_proj",), "tiny", 1, "/x", 0))
    registry.pin("brief", pinned=True)
    client = FailingRedis(system.redis)
    engine = ToldEngine()
    woken = threading.Event()
    pins = PinWatch(client, store, engine, woken.set)
    pins.start()
    try:
        wait_until(woken.is_set)
        pins.apply()
        assert engine.pinned == [(info.hash,)]
        client.is_away = True
        wait_until(lambda: client.num_failed)
        registry.pin("brief", pinned=False)
        woken.clear()
        client.is_away = False
        wait_until(woken.is_set)
        pins.apply()
        assert engine.pinned == [(info.hash,), ()]
        pins.apply()
        assert len(engine.pinned) == 2
    finally:
        pins.stop()
        registry.remove("brief")


def test_a_pinned_adapter_that_is_quarantined_is_loaded_by_no_engine(redis_url, tmp_path):
    store = AdapterStore(tmp_path / "store")
    engine, woken = ToldEngine(), threading.Event()
    contents = [store.put(write_adapter(tmp_path / n, fill=i)).hash for i, n in enumerate("ab", 1)]
    with redis_client(redis_url) as client:
        registry = AdapterRegistry(client)
        for name, content in zip("ab", contents, strict=True):
            registry.put(AdapterRecord(name, 0, content, 4, ("q_proj",), "tiny", 1, "/x", 0))
            registry.pin(name, pinned=True)
        client.set(quarantine_key(contents[0]), "ends engines")
        pins = PinWatch(client, store, engine, woken.set)
        pins.start()
        wait_until(woken.is_set)
        pins.apply()
        pins.stop()
        pins._thread.join(5)  # its client closes here
    assert engine.pinned == [(contents[1],)]


def test_what_ended_engines_is_tried_alone_and_then_no_more(redis_url, tmp_path):
    """Three pinned adapters, the second of which ends each engine that loads it."""
    store = AdapterStore(tmp_path / "store")
    fills = enumerate("abc", 1)
    contents = sorted(store.put(write_adapter(tmp_path / n, fill=i)).hash for i, n in fills)
    killer = contents[1]
    with redis_client(redis_url) as client:
        registry, crashes = AdapterRegistry(client), CrashLog(client)
        for name, content in zip("abc", contents, strict=True):
            registry.put(AdapterRecord(name, 0, content, 4, ("q_proj",), "tiny", 1, "/x", 0))
            registry.pin(name, pinned=True)
        deaths = 0
        for _ in range(9):
            pins = PinWatch(client, store, ToldEngine(), lambda: None)
            resident: set[str] = set()
            for _ in range(9):  # as often as it reads the pins while this engine lives
                pins._wanted.append(pins._read())
                pins.apply(resident)
                if killer in pins.under_way():
                    deaths += 1
                    crashes.pins_died(pins.under_way(), "SIGSEGV")
                    break
                resident |= set(pins.under_way())
        assert deaths <= 3
        assert crashes.quarantined(contents).keys() == {killer}
        assert resident == {contents[0], contents[2]}
        assert crashes.suspected_pins(contents) == {killer}
        crashes.release(killer)
        assert crashes.suspected_pins(contents) == set()


class FailingRedis:
    """A client whose subscriptions fail on demand."""

    def __init__(self, client) -> None:
        self._client = client
        self.is_away = False
        self.num_failed = 0

    def __getattr__(self, name):
        if self.is_away:
            self.num_failed += 1
            raise ConnectionError("away")
        return getattr(self._client, name)


class ToldEngine:
    """Keeps what it is told to pin."""

    def __init__(self) -> None:
        self.pinned: list[tuple[str, ...]] = []

    def register(self, name: str, path: str) -> None: ...

    def pin(self, contents: tuple[str, ...]) -> None:
        self.pinned.append(contents)

    def flush(self) -> None: ...
