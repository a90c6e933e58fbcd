"""One system with one worker for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import start_broker, start_redis
from tests.workers.running import System, running_system


@pytest.fixture(scope="session")
def shared_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A running worker with scripted tokens, 100 steps a second. Tests share it: end nothing."""
    directory: Path = tmp_path_factory.mktemp("system")
    broker = start_broker("tansu", tmp_path_factory.mktemp("broker"))
    redis_server = start_redis(tmp_path_factory.mktemp("redis"))
    with running_system(broker.address, redis_server.address, directory) as system:
        system.start_worker()
        yield system
    redis_server.stop()
    broker.stop()


@pytest.fixture
def system(fresh_broker, fresh_redis, tmp_path: Path) -> Iterator[System]:
    """A system of this test's own, without a worker yet."""
    with running_system(fresh_broker.bootstrap_servers, fresh_redis.address, tmp_path) as system:
        yield system
