"""The gateway's HTTP: health, metrics, models, adapters, workers, errors in their one shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.names import JOB_TOPICS
from openlora.registry import AdapterRegistry
from tests.conftest import Broker
from tests.gateway.client import generate, receive
from tests.gateway.peft_dirs import write_adapter
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def gateway(
    embedded_broker: Broker,
    redis_server: ServerProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningGateway]:
    with redis_client(redis_server.address) as client:
        client.flushall()
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_server.address,
        tmp_path_factory.mktemp("gateway"),
    ) as gateway:
        yield gateway


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url) as client:
        yield client


@pytest.fixture
def worker(redis_server: ServerProcess) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_server.address) as worker:
        yield worker


def error_of(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    assert isinstance(error["retriable"], bool)
    message: str = error["message"]
    return message


def test_ready_is_what_brokers_and_a_worker_make_it(
    http: httpx.Client, redis_server: ServerProcess
) -> None:
    assert http.get("/healthz").status_code == 200
    response = http.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"waiting_for": ["worker"]}
    with ScriptedWorker(redis_server.address):
        assert http.get("/readyz").status_code == 200


def test_partitions_without_a_worker_are_shown_with_their_lag(
    gateway: RunningGateway, http: httpx.Client
) -> None:
    rows = http.get("/v1/topics").json()
    assert {row["topic"] for row in rows} == set(JOB_TOPICS)
    assert len(rows) == 2 * len({row["partition"] for row in rows})
    assert not any(row["owners"] for row in rows)
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", "x")
        assert receive(socket)["type"] == "accepted"
    after = http.get("/v1/topics").json()
    assert sum(row["lag"] for row in after) == sum(row["lag"] for row in rows) + 1
    table = subprocess.run(
        [sys.executable, "-m", "openlora", "topics", "--url", gateway.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert f"{len(rows)} partitions, 0 owned by 0 worker(s)" in table
    assert table.count(" no owner") == len(rows)


def test_workers_are_listed_from_their_heartbeats(
    http: httpx.Client, worker: ScriptedWorker
) -> None:
    (listed,) = http.get("/v1/workers").json()
    wanted = {
        "id",
        "pid",
        "host",
        "device",
        "partitions",
        "running",
        "waiting",
        "resident_adapters",
        "tokens_per_s",
    }
    assert wanted <= set(listed)
    assert (listed["id"], listed["pid"]) == ("scripted-0", os.getpid())


def test_an_adapter_is_added_used_replaced_and_removed(
    gateway: RunningGateway, http: httpx.Client, worker: ScriptedWorker, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "one")
    response = http.post("/v1/adapters", json={"id": "one", "source": str(source)})
    assert response.status_code == 201, response.text
    record = response.json()
    assert (record["version"], record["rank"], record["targets"]) == (1, 4, ["q_proj"])
    again = http.post("/v1/adapters", json={"id": "one", "source": str(source)})
    assert again.json()["version"] == 1
    other = write_adapter(tmp_path / "two", fill=1)
    newer = http.post("/v1/adapters", json={"id": "one", "source": str(other)}).json()
    assert newer["version"] == 2
    assert newer["hash"] != record["hash"]
    assert http.get("/v1/adapters").json() == [newer]
    assert http.get("/v1/adapters/one").json() == newer
    models = http.get("/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["tiny", "one"]
    with connect(gateway.ws_url) as socket:
        request = {"type": "generate", "request_id": "r", "prompt": "x", "adapter": "one"}
        socket.send(json.dumps(request))
        accepted = json.loads(socket.recv(timeout=10))
        assert accepted["adapters"] == [{"id": "one", "version": 2, "weight": 1.0}]
        assert http.delete("/v1/adapters/one").status_code == 204
        while json.loads(socket.recv(timeout=10))["type"] != "done":
            pass
        socket.send(json.dumps(request))
        assert json.loads(socket.recv(timeout=10))["code"] == "unknown_adapter"
    error_of(http.get("/v1/adapters/one"), 404, "unknown_adapter")
    error_of(http.delete("/v1/adapters/one"), 404, "unknown_adapter")


def test_an_adapter_changed_elsewhere_is_known_here(
    gateway: RunningGateway,
    http: httpx.Client,
    worker: ScriptedWorker,
    redis_server: ServerProcess,
    tmp_path: Path,
) -> None:
    source = write_adapter(tmp_path / "one")
    http.post("/v1/adapters", json={"id": "moving", "source": str(source)})
    with redis_client(redis_server.address) as client:
        registry = AdapterRegistry(client)
        registry.remove("moving")
    with connect(gateway.ws_url) as socket:
        deadline = time.monotonic() + 15
        code = ""
        while code != "unknown_adapter":
            assert time.monotonic() < deadline
            request = {"type": "generate", "request_id": "r", "prompt": "x", "adapter": "moving"}
            socket.send(json.dumps(request))
            while (frame := json.loads(socket.recv(timeout=10)))["type"] not in ("done", "error"):
                pass
            code = frame.get("code", "")


def test_unusable_adapters_are_refused_with_the_reason(
    http: httpx.Client, worker: ScriptedWorker, tmp_path: Path
) -> None:
    def add(source: Path) -> str:
        body = {"id": "bad", "source": str(source)}
        return error_of(http.post("/v1/adapters", json=body), 422, "adapter_failed")

    assert "lora_B" in add(write_adapter(tmp_path / "missing", without="lora_B"))
    assert "[4, 96]" in add(write_adapter(tmp_path / "other-base", hidden=96))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "adapter_config.json" in add(empty)
    pickled = write_adapter(tmp_path / "pickle")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickle" in add(pickled)
    assert http.get("/v1/adapters").json() == [] or all(
        record["id"] != "bad" for record in http.get("/v1/adapters").json()
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "body is not valid"),
        (b"[]", "Expected `object`"),
        (b'{"id":"a"}', "source"),
        (b'{"id":"a","source":"/x","more":1}', "more"),
        (b'{"id":"../a","source":"/tmp"}', "adapter ID '../a'"),
        (b'{"id":"a","source":"relative"}', "relative"),
        (b'{"id":"a","source":"/does/not/exist"}', "no directory"),
        (b'{"id":"a","source":"/x\\u0000y"}', "no path"),
    ],
)
def test_a_body_that_names_no_adapter_is_refused(
    http: httpx.Client, body: bytes, words: str
) -> None:
    assert words in error_of(http.post("/v1/adapters", content=body), 400, "invalid_request")


def test_a_url_that_nothing_here_can_open_is_named(http: httpx.Client) -> None:
    answer = http.post("/v1/adapters", json={"id": "a", "source": "nosuch://org/adapter"})
    assert "nosuch" in error_of(answer, 422, "adapter_failed")


def test_errors_have_one_shape(http: httpx.Client) -> None:
    error_of(http.get("/nowhere"), 404, "invalid_request")
    answer = http.put("/v1/adapters")
    error_of(answer, 405, "invalid_request")
    assert answer.headers["Allow"] == "GET, HEAD, POST"  # a route for each
    error_of(http.get("/v1/adapters/..%2f..%2fetc"), 404, "invalid_request")
    error_of(http.post("/v1/adapters", content=b"x" * (2 << 20)), 413, "payload_too_large")
    origin = {"Origin": "http://evil.example"}
    error_of(http.post("/v1/adapters", headers=origin, json={}), 403, "forbidden")


def test_metrics_count_frames_and_jobs(
    gateway: RunningGateway, http: httpx.Client, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        socket.send(json.dumps({"type": "generate", "request_id": "r", "prompt": "a b"}))
        while json.loads(socket.recv(timeout=10))["type"] != "done":
            pass
    text = http.get("/metrics").text
    for line in (
        'openlora_gateway_jobs_total{outcome="accepted"}',
        'openlora_gateway_jobs_total{outcome="stop"}',
        "openlora_gateway_frames_sent_total",
        "openlora_gateway_frames_received_total",
        "openlora_gateway_streams 0.0",
        "openlora_gateway_ttft_seconds_bucket",
        "openlora_gateway_queue_depth 0.0",
    ):
        assert line in text


def test_the_page_is_locked_down(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in page.text
    assert "https://" not in page.text
    for name in ("app.js", "style.css", "icon.svg"):
        assert http.get(f"/static/{name}").status_code == 200
    assert http.get("/static/../auth.py").status_code == 404


def test_keys_guard_the_api_but_not_health_and_page(
    embedded_broker: Broker, redis_server: ServerProcess, tmp_path: Path
) -> None:
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_server.address,
        tmp_path,
        OPENLORA_API_KEYS="acme:s3cret",
    ) as gateway:
        for path in ("/", "/healthz", "/metrics"):
            assert httpx.get(gateway.url + path).status_code == 200
        for path in ("/v1/models", "/v1/workers", "/v1/adapters", "/v1/adapters/x"):
            refused = httpx.get(gateway.url + path)
            error_of(refused, 401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200
        assert "s3cret" not in gateway.log_text()


def test_a_port_in_use_is_one_clear_line(gateway: RunningGateway) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gateway", "--port", str(gateway.port)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"port {gateway.port}" in line
    assert "--port" in line
