"""Dead letters over HTTP and from the command line: seen by whom they concern, and tried again."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import httpx
import msgspec
import pytest
from kafka import KafkaProducer

from openlora import cli
from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.bulk import BulkGroup, BulkLine, BulkMessage, LineParams
from openlora.protocol.codec import encode
from openlora.protocol.crashes import Crash
from openlora.protocol.dead import DeadLetter
from openlora.protocol.jobs import AdapterRef, Job
from openlora.protocol.names import DEAD_TOPIC, quarantine_key, rate_key
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.conftest import Broker
from tests.gateway.client import wait_for
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway
from tests.joblog.jobs import a_job

pytestmark = pytest.mark.services

HASH = "ab" * 32
STORY = (Crash(1, "w", "SIGSEGV", 9), Crash(2, "w", "SIGSEGV", 1), Crash(3, "v", "SIGBUS", 1))


LINE = BulkMessage(
    "batch_1",
    "hash",
    1,
    BulkGroup("plain", "", (AdapterRef("killer", 1, HASH),)),
    (BulkLine(7, prompt="a line", params=LineParams(max_tokens=3)),),
)


def a_letter(value: bytes, **fields: object) -> bytes:
    facts = {"topic": "openlora.jobs", "partition": 3, "offset": 5, "code": "internal"}
    facts |= {"reason": "it ended the engine", "worker_id": "w", "written_ms": 1_700_000_000_000}
    text = base64.b64encode(value).decode()
    return encode(DeadLetter(value=text, value_bytes=len(value), **(facts | fields)))  # type: ignore[arg-type]


def openlora(gateway: RunningGateway, *words: str, key: str = "one") -> str:
    """What the command says, in this process: it starts a dozen times."""
    environ = {"OPENLORA_URL": gateway.url, "OPENLORA_API_KEY": key}
    said = io.StringIO()
    with patch.dict(os.environ, environ), redirect_stdout(said), redirect_stderr(said):
        cli.main(["dead", *words])
    return said.getvalue()


def adapters_of(gateway: RunningGateway, key: str) -> list[str]:
    bearer = {"Authorization": f"Bearer {key}"}
    return [r["id"] for r in httpx.get(f"{gateway.url}/v1/adapters", headers=bearer).json()]


def test_trying_again_counts_as_a_request_of_the_key(
    embedded_broker: Broker, redis_address: str, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"slow").hexdigest()
    entry = {"sha256": digest, "tenant": "slow", "adapters": ["poet"], "per_minute": 6}
    (tmp_path / "keys.json").write_text(json.dumps([entry]))
    producer = KafkaProducer(bootstrap_servers=embedded_broker.bootstrap_servers, acks="all")
    job = a_job(tenant="slow")
    killer = a_job(tenant="slow", adapters=(AdapterRef("killer", 1, HASH),))
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_address,
        tmp_path,
        OPENLORA_API_KEYS_FILE=str(tmp_path / "keys.json"),
        OPENLORA_MAX_TENANT_JOBS="1",
    ) as gateway:
        numbers = [
            producer.send(DEAD_TOPIC, a_letter(encode(one), job_id=one.job_id)).get(10).offset
            for one in (job, killer)
        ]
        producer.close()

        def retry(number: int) -> httpx.Response:
            url = f"{gateway.url}/v1/dead/{number}/retry"
            return httpx.post(url, headers={"Authorization": "Bearer slow"}, timeout=30)

        assert retry(numbers[1]).json()["error"]["code"] == "forbidden"
        assert retry(numbers[0]).status_code == 201
        assert retry(numbers[0]).json()["error"]["code"] == "rate_limited"
        with redis_client(redis_address) as client:
            client.delete(rate_key(digest[:12]))
        assert "the most that are taken" in retry(numbers[0]).json()["error"]["message"]


def test_letters_are_listed_shown_and_tried_again(
    fresh_broker: Broker, fresh_redis: ServerProcess, tmp_path: Path
) -> None:
    servers = fresh_broker.bootstrap_servers
    job = a_job(tenant="acme", adapters=(AdapterRef("killer", 1, HASH),), deadline_ms=5)
    with (
        running_gateway(
            servers, fresh_redis.address, tmp_path, OPENLORA_API_KEYS="one,acme:two,umbrella:three"
        ) as gateway,
        redis_client(fresh_redis.address) as client,
    ):
        assert "nothing is dead" in openlora(gateway, "list")
        producer = KafkaProducer(bootstrap_servers=servers, acks="all")
        for value in (
            a_letter(b"\0 not a job", code="invalid_request", reason="not a valid job"),
            b"not even a letter",
            a_letter(encode(job), job_id=job.job_id, story=STORY),
            a_letter(encode(LINE), topic="openlora.batch", story=STORY),
        ):
            producer.send(DEAD_TOPIC, value).get(10)
        producer.close()

        operator = json.loads(openlora(gateway, "list", "--json"))
        assert [letter["number"] for letter in operator] == [0, 2, 3]
        assert [len(json.loads(openlora(gateway, "list", "--json", key=k))) for k in
                ("two", "three")] == [1, 0]  # fmt: skip
        table = openlora(gateway, "list", key="two")
        assert job.job_id in table
        assert "it ended the engine" in table
        shown = openlora(gateway, "show", "2", key="two")
        assert "SIGSEGV at w, with 8 others" in shown
        assert "SIGBUS at v, alone" in shown
        assert '"prompt": "hi"' in shown
        assert "there is no dead letter 2" in openlora(gateway, "show", "2", key="three")
        assert "letter 0 holds no job" in openlora(gateway, "retry", "0")
        assert httpx.get(f"{gateway.url}/v1/dead").status_code == 401

        client.set(quarantine_key(HASH), "it ends engines")
        registry = AdapterRegistry(client)
        record = AdapterRecord("killer", 0, HASH, 8, ("q_proj",), "tiny", 1, "/x", 0)
        registry.put(record)
        # it is everybody's: one tenant does not let it loose on the others
        assert "it ends engines" in openlora(gateway, "retry", "2", key="two")
        assert client.exists(quarantine_key(HASH))
        registry.remove("killer", "default")
        registry.put(msgspec.structs.replace(record, owner="acme", visibility="private"))
        wait_for(lambda: adapters_of(gateway, "two") == ["killer"])
        said = openlora(gateway, "retry", "2", key="two")
        with ScriptedWorker(fresh_redis.address) as worker:
            wait_for(lambda: worker.jobs)
            (again,) = worker.jobs
        assert again.job_id in said
        assert isinstance(again, Job)
        assert (again.prompt, again.tenant, again.leased) == ("hi", "acme", False)
        assert again.job_id != job.job_id
        assert again.deadline_ms is None
        assert not client.exists(quarantine_key(HASH))

        client.set(quarantine_key(HASH), "its lines end engines")
        with ScriptedWorker(fresh_redis.address) as worker:
            said = openlora(gateway, "retry", "3")
            wait_for(lambda: worker.jobs)
            (line,) = worker.jobs
        assert line.job_id in said
        assert (line.prompt, line.params.max_tokens, line.priority) == ("a line", 3, "batch")
        assert not client.exists(quarantine_key(HASH))
