"""One whole system for all tests that do not end a part of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.producer.bulk.running import BulkSystem, running_bulk


@pytest.fixture(scope="session")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BulkSystem]:
    """Worker, producer and gateway run; adapters "a" to "d" are registered."""
    with running_bulk(tmp_path_factory.mktemp("bulk")) as system:
        system.register("a", "b", "c", "d")
        system.start_worker()
        system.start_producer()
        yield system
