"""Running gateways and scripted workers, one Redis and one broker behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openlora.joblog import redis_client
from openlora.local import ServerProcess, free_port
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.conftest import Broker
from tests.gateway.client import GRACE_S
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway
from tests.integration.up_system import UpSystem, write_adapters, write_model


@pytest.fixture(scope="package")
def up_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With folders ``model`` and ``adapters``: pirate, poet, and one that is broken."""
    root = tmp_path_factory.mktemp("up")
    write_adapters(write_model(root / "model"), root / "adapters")
    return root


@pytest.fixture(scope="package")
def guarded_system(up_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpSystem]:
    """``openlora up`` for tests that it must outlive: an operator, two tenants, 2 s of grace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLORA_API_KEYS", "root,acme:one,umbrella:two")
        patch.setenv("OPENLORA_API_KEY", "root")
        patch.setenv("OPENLORA_DISCONNECT_GRACE_S", "2")
        running = UpSystem(
            tmp_path_factory.mktemp("system"),
            free_port(),
            *("--model", str(up_folder / "model"), "--adapters", str(up_folder / "adapters")),
        )
    running.wait_ready()
    yield running
    assert running.stop() == 0, running.output


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
