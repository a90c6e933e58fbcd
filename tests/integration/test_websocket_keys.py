"""What the holder of a key may do over one websocket, and from which pages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.conftest import Broker
from tests.gateway.client import generate, receive, receive_all, send, text_of
from tests.gateway.running import ScriptedWorker, running_gateway

pytestmark = pytest.mark.services

BEARER = {"Authorization": "Bearer limited"}


def test_adapters_rate_and_origins_are_kept_to(
    embedded_broker: Broker, redis_address: str, tmp_path: Path, worker: ScriptedWorker
) -> None:
    digest = hashlib.sha256(b"limited").hexdigest()
    # 12 a minute: two at once
    entry = {"sha256": digest, "tenant": "acme", "adapters": ["pir*"], "per_minute": 12}
    key_file = tmp_path / "keys.json"
    # 6 a minute: one at once
    slow = {"sha256": hashlib.sha256(b"slow").hexdigest(), "tenant": "slow", "per_minute": 6}
    key_file.write_text(json.dumps([entry, slow]))
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_address,
        tmp_path,
        OPENLORA_API_KEYS="umbrella:two",
        OPENLORA_API_KEYS_FILE=str(key_file),
        OPENLORA_ORIGINS="https://chat.example",
    ) as gateway:
        elsewhere = {**BEARER, "Origin": "https://evil.example"}
        with (
            pytest.raises(InvalidStatus) as rejected,
            connect(gateway.ws_url, additional_headers=elsewhere),
        ):
            pass
        assert rejected.value.response.status_code == 403
        named = {**BEARER, "Origin": "https://chat.example"}
        with connect(gateway.ws_url, additional_headers=named) as socket:
            generate(socket, "other", "x", adapter="poet")
            assert receive(socket)["code"] == "forbidden"
            mix = [{"id": "pirate", "weight": 1.0}, {"id": "poet", "weight": 1.0}]
            generate(socket, "mix", "x", adapters=mix)
            assert receive(socket)["code"] == "forbidden"
            generate(socket, "first", "one", adapter="pirate")
            frames = receive_all(socket, "first")
            assert text_of(frames) == "one"
            generate(socket, "second", "two")
            assert text_of(receive_all(socket, "second")) == "two"
            generate(socket, "third", "three")
            error = receive(socket)
            assert (error["code"], error["retriable"]) == ("rate_limited", True)
            assert 0 < error["retry_after_ms"] <= 5000
            # what it has already, it may still read
            send(socket, type="resume", request_id="again", job_id=frames[0]["job_id"], after=-1)
            assert text_of(receive_all(socket, "again")) == "one"
        refused = httpx.post(f"{gateway.url}/v1/batches", headers=BEARER, json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        by_slow = {"headers": {"Authorization": "Bearer slow"}, "json": {"input_file_id": "none"}}
        batches = [httpx.post(f"{gateway.url}/v1/batches", **by_slow) for _ in range(2)]
        assert [answer.status_code for answer in batches] == [404, 429]
        assert batches[1].json()["error"]["code"] == "rate_limited"
        theirs = {"Authorization": "Bearer two"}
        with connect(gateway.ws_url, additional_headers=theirs) as socket:
            send(socket, type="resume", request_id="r", job_id=frames[0]["job_id"], after=-1)
            assert receive(socket)["code"] == "job_not_found"
