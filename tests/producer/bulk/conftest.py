"""One whole system for all tests that do not end a part of it; and a producer done by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openlora.protocol.status import AdapterRecord
from tests.producer.bulk.running import BulkSystem, running_bulk
from tests.producer.bulk.stepwise import Producer


@pytest.fixture(scope="session")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BulkSystem]:
    """Worker, producer and gateway run; adapters "a" to "d" are registered."""
    with running_bulk(tmp_path_factory.mktemp("bulk")) as system:
        system.register("a", "b", "c", "d")
        system.start_worker()
        system.start_producer()
        yield system


@pytest.fixture
def producer(redis_url: str, tmp_path: Path) -> Iterator[Producer]:
    """Nothing moves but what the test does; adapters "a" and "b" are registered."""
    made = Producer(redis_url, tmp_path)
    for name in ("a", "b"):
        made.registry.put(AdapterRecord(name, 0, name * 64, 8, (), "", 1, "", 1))
    yield made
    made.client.close()
