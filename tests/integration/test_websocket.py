"""The websocket of a real gateway process: requests, streams, adapters."""

from __future__ import annotations

from typing import Any

import pytest
from websockets.sync.client import connect

from tests.gateway.client import (
    generate,
    receive,
    receive_all,
    text_of,
    words,
)
from tests.gateway.running import RunningGateway, ScriptedWorker

pytestmark = pytest.mark.services


def test_a_request_is_accepted_streamed_and_done(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url, subprotocols=["openlora.v1"]) as socket:
        assert socket.subprotocol == "openlora.v1"
        generate(socket, "r1", 'a "b" ü \U0001f600 \\ \n', params={"seed": 3, "max_tokens": 9})
        accepted, *rest = receive_all(socket, "r1")
        assert (accepted["type"], accepted["adapters"]) == ("accepted", [])
        assert text_of(rest) == 'a "b" ü \U0001f600 \\ \n'
        done = rest[-1]
        assert done["finish_reason"] == "stop"
        assert done["usage"] == {"prompt_tokens": 3, "completion_tokens": 6}
        assert {frame["job_id"] for frame in rest} == {accepted["job_id"]}
    (job,) = worker.jobs
    assert (job.params.seed, job.params.max_tokens, job.tenant) == (3, 9, "default")


def test_a_client_without_subprotocol_is_served(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        assert socket.subprotocol is None
        generate(socket, "r", "x")
        assert text_of(receive_all(socket, "r")) == "x"


def test_adapters_are_resolved_to_versions(gateway: RunningGateway, worker: ScriptedWorker) -> None:
    with connect(gateway.ws_url) as socket:
        mix = [{"id": "pirate", "weight": 0.6}, {"id": "poet", "weight": 0.4}]
        generate(socket, "r", "x", adapters=mix)
        accepted = receive_all(socket, "r")[0]
        assert accepted["adapters"] == [part | {"version": 1} for part in mix]
    assert [ref.hash for ref in worker.jobs[-1].adapters] == ["ab" * 32] * 2


def test_requests_of_one_connection_run_side_by_side(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        for i in range(40):
            generate(socket, f"r{i}", f"{i} " + words(i))
        texts: dict[str, list[dict[str, Any]]] = {f"r{i}": [] for i in range(40)}
        left = 40
        while left:
            frame = receive(socket)
            texts[frame["request_id"]].append(frame)
            left -= frame["type"] == "done"
        for i in range(40):
            assert text_of(texts[f"r{i}"]) == f"{i} " + words(i)
