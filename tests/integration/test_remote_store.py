"""A whole system whose adapters lie behind a URL: fetched, served, pinned, shown, taken by URL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from tests.conftest import Broker
from tests.gateway.peft_dirs import write_adapter
from tests.gateway.running import RunningGateway, running_gateway
from tests.integration.up_system import write_model
from tests.workers.running import wait_until

pytestmark = [pytest.mark.services, pytest.mark.long, pytest.mark.timeout(120)]

READY_S = 60.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With folders far (the store), cache, offered (adapters), model."""
    root = tmp_path_factory.mktemp("place")
    for number, name in enumerate(("one", "two", "three")):
        offer(root, name, number)
    return root


def offer(root: Path, name: str, fill: int) -> Path:
    """An adapter of the first layer's q_proj."""
    directory = write_adapter(root / "offered" / name, fill=fill)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["layers_to_transform"] = [0]
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def gateway(
    embedded_broker: Broker, redis_server: ServerProcess, place: Path
) -> Iterator[RunningGateway]:
    with redis_client(redis_server.address) as client:
        client.flushall()
    settings = {
        "OPENLORA_STORE": f"file://{place}/far",
        "OPENLORA_ADAPTER_CACHE": str(place / "cache"),
        "OPENLORA_API_KEYS": "root,acme:one",
        "OPENLORA_REMOTE_ADAPTERS": f"file://{place}/offered/",
    }
    model = write_model(place / "model")
    argv = [sys.executable, "-m", "workers", "--worker-id", "w", "--model", str(model)]
    argv += ["--device", "cpu", "--kafka", embedded_broker.bootstrap_servers]
    with (
        running_gateway(
            embedded_broker.bootstrap_servers, redis_server.address, place, **settings
        ) as gateway,
        (place / "worker.log").open("wb") as log,
        subprocess.Popen(
            [*argv, "--redis", redis_server.address], stderr=log, env={**os.environ, **settings}
        ) as worker,
    ):
        try:
            ready = f"{gateway.url}/readyz"
            wait_until(lambda: httpx.get(ready).status_code == 200, READY_S)
            yield gateway
        finally:
            worker.terminate()


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer root"}
    with httpx.Client(base_url=gateway.url, headers=headers) as client:
        yield client


def answer(gateway: RunningGateway, adapter: str, key: str = "root") -> list[dict[str, Any]]:
    """All frames of one request."""
    request = {"type": "generate", "request_id": "r", "prompt": "hello", "adapter": adapter}
    headers = {"Authorization": f"Bearer {key}"}
    with connect(gateway.ws_url, additional_headers=headers) as socket:
        socket.send(json.dumps(request | {"params": {"max_tokens": 3, "temperature": 0}}))
        frames: list[dict[str, Any]] = []
        while not frames or frames[-1]["type"] not in ("done", "error"):
            frames.append(json.loads(socket.recv(timeout=30)))
    return frames


def command(gateway: RunningGateway, *argv: str) -> str:
    """What the command line prints."""
    return subprocess.run(
        [sys.executable, "-m", "openlora", *argv, "--url", gateway.url],
        env={**os.environ, "OPENLORA_API_KEY": "root"},
        capture_output=True,
        text=True,
    ).stdout


def lives_in(http: httpx.Client, adapter: str) -> dict[str, list[str]]:
    tiers: dict[str, list[str]] = http.get(f"/v1/adapters/{adapter}").json()["tiers"]
    return tiers


def test_an_adapter_is_fetched_when_it_is_wanted_and_shown_where_it_is(
    gateway: RunningGateway, http: httpx.Client, place: Path
) -> None:
    added = http.post("/v1/adapters", json={"id": "one", "source": str(place / "offered/one")})
    assert added.status_code == 201, added.text
    content = added.json()["hash"]
    assert (place / "far" / content / "adapter_config.json").is_file()
    assert lives_in(http, "one") == {}
    assert answer(gateway, "one")[-1]["type"] == "done"
    assert len(list((place / "cache").glob(f"*/{content}"))) == 1
    everywhere = {"device": ["w"], "host": ["w"], "disk": ["w"]}
    wait_until(lambda: lives_in(http, "one") == everywhere)
    (worker,) = http.get("/v1/workers").json()
    tiers = {tier["tier"]: tier for tier in worker["tiers"]}
    assert all(tiers[name]["adapters"] == ["one"] for name in everywhere)
    assert tiers["disk"]["loads"] == 1
    assert "device: w" in command(gateway, "adapters", "list")
    assert "1 device, 1 host, 1 disk" in command(gateway, "workers")


def test_a_pinned_adapter_is_there_before_anybody_asks(
    gateway: RunningGateway, http: httpx.Client, place: Path
) -> None:
    http.post("/v1/adapters", json={"id": "two", "source": str(place / "offered/two")})
    refused = httpx.post(
        f"{gateway.url}/v1/adapters/two/pin", headers={"Authorization": "Bearer one"}
    )
    assert refused.status_code == 403
    assert command(gateway, "adapters", "pin", "two") == "two version 1 is pinned\n"
    wait_until(lambda: lives_in(http, "two").get("device") == ["w"])
    assert http.delete("/v1/adapters/two/pin").json()["pinned"] is False
    assert http.get("/v1/adapters/two").json()["pinned"] is False


def test_a_request_may_name_a_url_and_its_adapter_stays_the_tenants(
    gateway: RunningGateway, http: httpx.Client, place: Path
) -> None:
    url = f"file://{place}/offered/three"
    frames = answer(gateway, url, key="one")
    assert frames[-1]["type"] == "done", frames
    (used,) = frames[0]["adapters"]
    assert "offered-three-" in used["id"]
    assert used["id"] not in [record["id"] for record in http.get("/v1/adapters").json()]
    for wrong, code in ((f"file://{place}/secret", "forbidden"), (url + "/no", "adapter_failed")):
        assert answer(gateway, wrong, key="one")[-1]["code"] == code
    metrics = http.get("/metrics").text
    assert 'openlora_adapter_tier_loads_total{tier="disk",worker="w"}' in metrics
    assert used["id"] not in metrics


def test_a_store_that_lost_an_adapter_is_named(
    gateway: RunningGateway, http: httpx.Client, place: Path
) -> None:
    source = offer(place, "four", 9)
    content = http.post("/v1/adapters", json={"id": "four", "source": str(source)}).json()["hash"]
    (place / "far" / content).rename(place / "far" / "gone")
    error = answer(gateway, "four")[-1]
    assert (error["type"], error["code"]) == ("error", "adapter_failed")
    assert "is not in the store file://" in error["message"]
    (place / "far" / "gone").rename(place / "far" / content)
    assert answer(gateway, "four")[-1]["type"] == "done"
