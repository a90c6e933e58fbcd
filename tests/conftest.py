"""Fixtures that every room's tests share: real servers, free ports, unique names.

Session servers are shared: use ``unique_topic`` on the broker, and ``redis_url``, which empties
Redis before the test. The product's own topic names are fixed: a test that uses them takes
``fresh_broker`` (0.3 s). Tests with any of these carry ``@pytest.mark.services``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from openlora.errors import SetupError
from openlora.local import ServerProcess, free_port
from tests.services import skip_or_fail, start_broker, start_redis

# Before torch is imported, and for all processes that tests start: tiny models gain nothing from a
# second thread, and lose a time slice at every join while other processes use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A time limit per example fails at random on a machine that is busy with something else.
settings.register_profile("openlora", deadline=None)
settings.load_profile("openlora")


@dataclass(frozen=True)
class Broker:
    """A running Kafka-protocol broker: ``name`` is "tansu" or "kafka"."""

    name: str
    server: ServerProcess

    @property
    def bootstrap_servers(self) -> str:
        return self.server.address


@pytest.fixture(scope="session", params=["tansu", "kafka"])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    """Each broker in turn: the embedded one always, Apache Kafka where it and Java exist."""
    server = start_broker(request.param, tmp_path_factory.mktemp("broker"))
    yield Broker(request.param, server)
    server.stop()


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The embedded broker alone, shared by the session."""
    server = start_broker("tansu", tmp_path_factory.mktemp("broker"))
    yield Broker("tansu", server)
    server.stop()


@pytest.fixture
def fresh_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """An embedded broker of this test's own: empty, and free to be killed."""
    server = start_broker("tansu", tmp_path_factory.mktemp("broker"))
    yield Broker("tansu", server)
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The embedded Redis server, shared by the session; take ``redis_url`` for an empty one."""
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: ServerProcess) -> str:
    """URL of the shared Redis server, emptied (data and scripts) before this test."""
    import redis

    with redis.Redis.from_url(redis_server.address) as client:
        client.flushall()
        client.script_flush()
    return redis_server.address


@pytest.fixture
def fresh_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A Redis server of this test's own, free to be killed and restarted."""
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted SmolLM2-135M-Instruct, in a user's cache; without its package: skip, in CI
    fail."""
    from openlora.demo.model import ensure_demo_model, find_gguf

    try:
        find_gguf()
    except SetupError as error:
        skip_or_fail(error.message)
    return ensure_demo_model(tmp_path_factory.mktemp("home") / "openlora")


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Torch, and with it the native kernels, at two threads, which share the work of each step."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def port() -> int:
    """A free TCP port of 127.0.0.1."""
    return free_port()


@pytest.fixture
def unique_topic() -> str:
    """A topic name that no other test uses."""
    return f"test.{uuid.uuid4().hex}"
