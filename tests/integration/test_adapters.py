"""The adapter registry as clients meet it: versions, tenants, and what removal leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from gateway.adapter_collector import AdapterCollector
from openlora import cli
from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed
from openlora.joblog import AsyncJobLog, async_redis_client, redis_client
from openlora.local import ServerProcess
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry, AsyncAdapterRegistry
from tests.conftest import Broker
from tests.gateway.client import wait_for
from tests.gateway.peft_dirs import write_adapter
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services

KEYS = {"root": "root", "acme": "one", "umbrella": "two"}


@pytest.fixture(scope="module")
def gateway(
    embedded_broker: Broker,
    redis_server: ServerProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningGateway]:
    with redis_client(redis_server.address) as client:
        client.flushall()
    directory = tmp_path_factory.mktemp("gateway")
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_server.address,
        directory,
        OPENLORA_API_KEYS="root,acme:one,umbrella:two",
        OPENLORA_ADAPTER_SOURCES=f"file://{directory}/offered/",
    ) as gateway:
        yield gateway


def client_of(gateway: RunningGateway, tenant: str) -> httpx.Client:
    return httpx.Client(base_url=gateway.url, headers=headers_of(tenant))


def headers_of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"}


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with client_of(gateway, "root") as client:
        yield client


@pytest.fixture
def worker(redis_server: ServerProcess) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_server.address) as worker:
        yield worker


def error_of(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    message: str = error["message"]
    return message


def first_frame(gateway: RunningGateway, tenant: str, **fields: Any) -> dict[str, Any]:
    """How a request begins: ``accepted``, or why it does not."""
    with connect(gateway.ws_url, additional_headers=headers_of(tenant)) as socket:
        socket.send(json.dumps({"type": "generate", "request_id": "r", "prompt": "x", **fields}))
        frame: dict[str, Any] = json.loads(socket.recv(timeout=10))
        return frame


def test_versions_are_pinned_and_rolled_back_to(
    gateway: RunningGateway, http: httpx.Client, worker: ScriptedWorker, tmp_path: Path
) -> None:
    for fill in (1, 2):
        source = write_adapter(tmp_path / str(fill), fill=fill)
        body = {"id": "two", "source": str(source), "licence": "Apache-2.0"}
        assert http.post("/v1/adapters", json=body).status_code == 201
    first, second = http.get("/v1/adapters/two/versions").json()
    assert (first["version"], second["version"], first["licence"]) == (1, 2, "Apache-2.0")
    assert (first["owner"], first["visibility"]) == ("default", "public")
    assert http.get("/v1/adapters/two@1").json() == first

    def version_used(adapter: str) -> int:
        (used,) = first_frame(gateway, "root", adapter=adapter)["adapters"]
        assert used["id"] == "two"
        version: int = used["version"]
        return version

    assert [version_used(name) for name in ("two", "two@1", "two@2")] == [2, 1, 2]
    assert http.post("/v1/adapters/two/rollback", json={}).json()["version"] == 1
    assert version_used("two") == 1
    error_of(http.post("/v1/adapters/two/rollback", json={}), 404, "unknown_adapter")
    error_of(http.post("/v1/adapters/two/rollback", json={"to": 1}), 400, "invalid_request")
    error_of(http.delete("/v1/adapters/two@1"), 400, "invalid_request")
    assert http.post("/v1/adapters/two/rollback", json={"version": 2}).json()["version"] == 2
    assert http.delete("/v1/adapters/two@1").status_code == 204
    error_of(http.get("/v1/adapters/two@1"), 404, "unknown_adapter")
    assert http.delete("/v1/adapters/two").status_code == 204


def test_the_command_shows_versions_and_goes_back(
    gateway: RunningGateway,
    worker: ScriptedWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENLORA_API_KEY", KEYS["root"])

    def adapters(*argv: str) -> str:
        status = cli.main(["adapters", *argv, "--url", gateway.url])
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    for fill in (3, 4):
        source = write_adapter(tmp_path / str(fill), fill=fill)
        said = adapters("add", "told", str(source), "--licence", "MIT")
        assert said == f"told version {fill - 2}: rank 4\n"
    lines = adapters("versions", "told").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["told", "1"], ["told", "2"]]
    assert adapters("rollback", "told") == "told version 1 is in use\n"
    assert adapters("rollback", "told", "2") == "told version 2 is in use\n"
    assert json.loads(adapters("show", "told@1"))["licence"] == "MIT"
    assert adapters("list", "--search", "tol", "--limit", "5").count("told") == 1
    assert "is the version in use" in adapters("remove", "told@2")
    assert adapters("remove", "told") == "told removed\n"


def test_a_removed_adapter_s_content_goes_when_no_job_needs_it(
    gateway: RunningGateway,
    http: httpx.Client,
    worker: ScriptedWorker,
    redis_server: ServerProcess,
    tmp_path: Path,
) -> None:
    """The collector's own steps, without its minute of grace."""
    source = write_adapter(tmp_path / "one", fill=3)
    record = http.post("/v1/adapters", json={"id": "gone", "source": str(source)}).json()
    store = AdapterStore(gateway.log_path.parent / "store")

    async def collect() -> list[str]:
        client = async_redis_client(redis_server.address)
        try:
            registry, job_log = AsyncAdapterRegistry(client), AsyncJobLog(client)
            return await AdapterCollector(registry, job_log, client, store).collect(0)
        finally:
            await client.aclose()

    with connect(gateway.ws_url, additional_headers=headers_of("root")) as socket:
        worker.pause()
        request = {"type": "generate", "request_id": "r", "prompt": "x y", "adapter": "gone"}
        socket.send(json.dumps(request))
        assert json.loads(socket.recv(timeout=10))["type"] == "accepted"
        assert record["hash"] not in asyncio.run(collect())  # what other tests left may go
        assert http.delete("/v1/adapters/gone").status_code == 204
        assert record["hash"] not in asyncio.run(collect())
        assert store.path(record["hash"]).is_dir()
        worker.resume()
        while json.loads(socket.recv(timeout=10))["type"] != "done":
            pass
    assert record["hash"] in asyncio.run(collect())
    with pytest.raises(AdapterFailed, match="not in the store"):
        store.path(record["hash"])
    assert record["hash"] not in asyncio.run(collect())


def test_a_private_adapter_is_its_tenant_s_alone(
    gateway: RunningGateway, worker: ScriptedWorker, redis_server: ServerProcess
) -> None:
    content, name = "5ec7e7" * 10 + "beef", "acme-secret"
    with redis_client(redis_server.address) as client:
        AdapterRegistry(client).put(
            AdapterRecord(
                *(name, 0, content, 8, ("q_proj",), "base", 1, "/secret/path", 0),
                owner="acme",
                visibility="private",
            )
        )
    worker.resident_adapters = (content,)
    with client_of(gateway, "acme") as acme:
        (record,) = acme.get("/v1/adapters").json()
        assert (record["id"], record["source"]) == (name, "/secret/path")
        assert acme.get("/v1/adapters/acme-secret@1").json() == record
        wait_for(lambda: acme.get("/v1/workers").json()[0]["resident_adapters"] == [name])
        assert acme.get(f"/v1/adapters/{name}").json()["resident_on"] == ["scripted-0"]
        assert [model["id"] for model in acme.get("/v1/models").json()["data"]] == ["tiny", name]
        accepted = first_frame(gateway, "acme", adapter=name)
        assert accepted["adapters"] == [{"id": name, "version": 1, "weight": 1.0}]
    for other in ("umbrella", "root"):
        with client_of(gateway, other) as http:
            for path in (
                *("/v1/adapters", "/v1/adapters?search=secret", "/v1/models", "/v1/workers"),
                *("/metrics", "/v1/topics"),
            ):
                answer = http.get(path)
                assert answer.status_code == 200
                assert not any(word in answer.text for word in (name, content, "acme")), path
            for path in (name, f"{name}@1", f"{name}/versions", f"acme%2F{name}"):
                assert http.get(f"/v1/adapters/{path}").status_code in (400, 404), path
            error_of(http.delete(f"/v1/adapters/{name}"), 404, "unknown_adapter")
            error_of(http.post(f"/v1/adapters/{name}/rollback", json={}), 404, "unknown_adapter")
        for asked in (
            {"adapter": name},
            {"adapter": f"{name}@1"},
            {"adapters": [{"id": name, "weight": 0}]},
        ):
            assert first_frame(gateway, other, **asked)["code"] == "unknown_adapter"
        for asked in ({"adapter": f"acme/{name}"}, {"adapter": content + "@1" * 9}):
            assert first_frame(gateway, other, **asked)["code"] == "invalid_request"
        assert first_frame(gateway, other, adapter=content)["code"] == "unknown_adapter"
    assert not any(word in gateway.log_text() for word in (name, content))


def test_a_tenant_changes_no_other_s_public_adapter_and_reads_no_directory(
    gateway: RunningGateway, http: httpx.Client, worker: ScriptedWorker, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "shared", fill=5)
    record = http.post("/v1/adapters", json={"id": "shared", "source": str(source)}).json()
    with client_of(gateway, "acme") as acme:
        shown = acme.get("/v1/adapters/shared").json()
        assert shown == record | {"source": ""}
        error_of(acme.delete("/v1/adapters/shared"), 403, "forbidden")
        error_of(acme.post("/v1/adapters/shared/rollback", json={}), 403, "forbidden")
        stored = gateway.log_path.parent / "store" / record["hash"]
        for path in (str(source), str(stored)):
            body = {"id": "mine", "source": path}
            error_of(acme.post("/v1/adapters", json=body), 403, "forbidden")
    assert first_frame(gateway, "acme", adapter="shared")["type"] == "accepted"
    assert http.delete("/v1/adapters/shared").status_code == 204


def test_a_tenant_adds_from_where_it_may_and_for_itself(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    root = gateway.log_path.parent
    write_adapter(root / "offered/poet", fill=6)
    write_adapter(root / "kept/poet", fill=7)
    store = {path.name for path in (root / "store").iterdir()}
    with client_of(gateway, "acme") as acme:
        for url in (
            f"file://{root}/kept/poet",
            f"file://{root}/offered/../kept/poet",
            f"http://127.0.0.1:{gateway.port}/offered/poet",
            f"zip://x::file://{root}/offered/poet",
        ):
            said = error_of(
                acme.post("/v1/adapters", json={"id": "p", "source": url}), 403, "forbidden"
            )
            assert "OPENLORA_ADAPTER_SOURCES" in said
        url = f"file://{root}/offered/poet"
        record = acme.post("/v1/adapters", json={"id": "p", "source": url}).json()
        assert (record["visibility"], record["owner"], record["source"]) == ("private", "acme", url)
        assert first_frame(gateway, "acme", adapter="p")["type"] == "accepted"
        assert first_frame(gateway, "umbrella", adapter="p")["code"] == "unknown_adapter"
        body = {"id": "q", "source": f"file://{root}/offered/nothing"}
        said = error_of(acme.post("/v1/adapters", json=body), 422, "adapter_failed")
        assert "adapter_config.json is missing there" in said
        assert acme.delete("/v1/adapters/p").status_code == 204
    assert {path.name for path in (root / "store").iterdir()} - store == {record["hash"]}
