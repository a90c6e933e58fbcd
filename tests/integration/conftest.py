"""Running gateways and scripted workers, one Redis and one broker behind them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.conftest import Broker
from tests.gateway.client import GRACE_S
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway


@pytest.fixture(scope="module")
def redis_address(redis_server: ServerProcess) -> str:
    with redis_client(redis_server.address) as client:
        client.flushall()
        registry = AdapterRegistry(client)
        for name in ("pirate", "poet"):
            registry.put(AdapterRecord(name, 0, "ab" * 32, 8, ("q_proj",), "tiny", 1, "/x", 0))
    return redis_server.address


@pytest.fixture(scope="module")
def gateway(
    embedded_broker: Broker, redis_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_address,
        tmp_path_factory.mktemp("gateway"),
        OPENLORA_DISCONNECT_GRACE_S=str(GRACE_S),
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def other_gateway(
    embedded_broker: Broker, redis_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_address,
        tmp_path_factory.mktemp("gateway"),
        OPENLORA_API_KEYS="acme:one,umbrella:two",
    ) as gateway:
        yield gateway


@pytest.fixture
def worker(redis_address: str) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_address) as worker:
        yield worker


@pytest.fixture
def slow_worker(redis_address: str) -> Iterator[ScriptedWorker]:
    """50 tokens a second for each job."""
    with ScriptedWorker(redis_address, token_s=0.02) as worker:
        yield worker
