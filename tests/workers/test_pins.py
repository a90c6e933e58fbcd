"""Pins of the registry reach a running worker's engine within a second, and leave it."""

from __future__ import annotations

import time

import pytest

from openlora.adapters.store import AdapterStore
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.gateway.peft_dirs import write_adapter
from tests.workers.running import wait_until

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
    started = time.monotonic()
    wait_until(lambda: info.hash in system.heartbeat(worker).resident_adapters, 5)
    # A heartbeat may be a second old.
    assert time.monotonic() - started < 2.5
    (tier,) = system.heartbeat(worker).tiers
    assert (tier.tier, info.hash in tier.contents) == ("device", True)
    registry.remove("hot")


def test_what_the_store_lacks_is_said_and_ends_nothing(shared_system):
    system = shared_system
    (worker,) = system.workers
    registry = AdapterRegistry(system.redis)
    registry.put(AdapterRecord("gone", 0, "b" * 64, 4, ("q_proj",), "tiny", 1, "/x", 0))
    registry.pin("gone", pinned=True)
    wait_until(lambda: "event=pin_failed" in worker.log_text(), 5)
    registry.remove("gone")
    assert worker.process.poll() is None
