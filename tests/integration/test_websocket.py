"""The websocket of a real gateway process, on real servers, with a scripted worker behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.conftest import Broker
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services


@pytest.fixture
def gateway(
    embedded_broker: Broker, redis_url: str, tmp_path: Path
) -> Iterator[RunningGateway]:
    with running_gateway(embedded_broker.bootstrap_servers, redis_url, tmp_path) as gateway:
        yield gateway


def receive(socket: ClientConnection, timeout: float = 10) -> dict[str, Any]:
    return json.loads(socket.recv(timeout=timeout))


def test_a_request_is_accepted_streamed_and_done(gateway: RunningGateway, redis_url: str) -> None:
    with ScriptedWorker(redis_url), connect(gateway.ws_url, subprotocols=["openlora.v1"]) as socket:
        socket.send(json.dumps({"type": "generate", "request_id": "r1", "prompt": "a b ü"}))
        accepted = receive(socket)
        assert accepted["type"] == "accepted"
        assert accepted["adapters"] == []
        frames = [receive(socket) for _ in range(4)]
        assert [f["type"] for f in frames] == ["token", "token", "token", "done"]
        assert "".join(f["text"] for f in frames) == "a b ü"
