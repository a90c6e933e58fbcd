"""Fixtures that every room's tests share: real servers, free ports, unique names.

Session servers are shared: use ``unique_topic`` on the broker, and ``redis_url``, which empties
Redis before the test. The product's own topic names are fixed: a test that uses them takes
``fresh_broker`` (0.3 s). Tests with any of these carry ``@pytest.mark.services``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings

from openlora.local import ServerProcess, free_port
from tests.services import start_broker, start_redis

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


@pytest.fixture
def port() -> int:
    """A free TCP port of 127.0.0.1."""
    return free_port()


@pytest.fixture
def unique_topic() -> str:
    """A topic name that no other test uses."""
    return f"test.{uuid.uuid4().hex}"
