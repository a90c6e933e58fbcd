"""The websocket under bad input, floods, slow clients, wrong keys and without a broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from openlora.joblog import redis_client
from openlora.protocol.jobs import Job
from openlora.protocol.names import SHARD_COUNT, open_jobs_key
from tests.conftest import Broker
from tests.gateway.client import (
    generate,
    metric,
    receive,
    receive_all,
    send,
    small_buffers,
    text_of,
    wait_for,
    words,
)
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services


def open_jobs(redis_url: str) -> set[bytes]:
    """IDs of all jobs that Redis has and that have not ended."""
    with redis_client(redis_url) as client:
        keys = [open_jobs_key(shard) for shard in range(SHARD_COUNT)]
        return {job_id for key in keys for job_id in client.zrange(key, 0, -1)}


def test_bad_frames_get_errors_and_harm_nothing(
    gateway: RunningGateway, slow_worker: ScriptedWorker
) -> None:
    bad: list[tuple[str | bytes, str, str | None]] = [
        ("{", "invalid_request", None),
        (b"\0\1", "invalid_request", None),
        ("[" * 100_000, "invalid_request", None),
        ('{"type":"sing","request_id":"b"}', "invalid_request", "b"),
        ('{"type":"generate","request_id":"b"}', "invalid_request", "b"),
        ('{"type":"generate","request_id":"b","messages":[]}', "invalid_request", "b"),
        ('{"type":"generate","request_id":"b","prompt":"x","adapter":7}', "invalid_request", "b"),
        (
            '{"type":"generate","request_id":"b","prompt":"x","adapters":[{"id":"pirate",'
            '"weight":1e999}]}',
            "invalid_request",
            "b",
        ),
        (
            '{"type":"generate","request_id":"b","prompt":"x","adapter":"nobody"}',
            "unknown_adapter",
            "b",
        ),
        ('{"type":"generate","request_id":"good","prompt":"x"}', "invalid_request", "good"),
        ('{"type":"cancel","request_id":"never"}', "invalid_request", "never"),
        (
            json.dumps({"type": "resume", "request_id": "b", "job_id": "0" * 26, "after": -1}),
            "job_not_found",
            "b",
        ),
        ("x" * (2 << 20), "payload_too_large", None),
        ("x" * (10 << 20), "payload_too_large", None),
        (b"x" * (10 << 20), "payload_too_large", None),
    ]
    with connect(gateway.ws_url, max_size=None) as socket:
        generate(socket, "good", words(5000))
        frames = [receive(socket)]
        for text, code, request_id in bad:
            socket.send(text)
            while (frame := receive(socket))["type"] != "error":
                frames.append(frame)
            assert (frame["code"], frame["request_id"]) == (code, request_id), text[:100]
            assert frame["retriable"] is False
        frames += [receive(socket) for _ in range(5)]  # it goes on behind all of them
        send(socket, type="cancel", request_id="good")
        frames += receive_all(socket, "good")
        assert words(5000).startswith(text_of(frames))


def test_a_frame_over_16_mib_closes_the_connection_with_1009(gateway: RunningGateway) -> None:
    with connect(gateway.ws_url) as socket:
        socket.send("x" * ((16 << 20) + 1))
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=15)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009


def test_a_thousand_requests_on_one_connection(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        for i in range(1000):
            generate(socket, f"r{i}", "x y")
        ends: dict[str, dict[str, Any]] = {}
        while len(ends) < 1000:
            frame = receive(socket)
            if frame["type"] in ("done", "error"):
                ends[frame["request_id"]] = frame
        refused = [frame for frame in ends.values() if frame["type"] == "error"]
        assert {frame["code"] for frame in refused} <= {"overloaded"}
        assert all(frame["retry_after_ms"] > 0 for frame in refused)
        assert 1000 - len(refused) >= 256
        generate(socket, "after", "z")
        assert text_of(receive_all(socket, "after")) == "z"


def test_a_client_that_does_not_read_loses_nothing_and_slows_nobody(
    gateway: RunningGateway, redis_address: str
) -> None:
    count = 4000
    refilled_before = metric(gateway, "tokens_refilled_total")

    def script(job: Job) -> list[str]:
        return ["word " * 600] * (count if job.prompt == "much" else 50)

    with (
        ScriptedWorker(redis_address, script=script, tokens_per_chunk=20) as worker,
        small_buffers(gateway) as connection,
        connect(gateway.ws_url, sock=connection, max_queue=1) as slow,
        connect(gateway.ws_url) as quick,
    ):
        generate(slow, "s", "much")
        job_id = receive(slow)["job_id"]
        wait_for(lambda: job_id in worker.running)
        generate(quick, "q", "little")
        # all of it comes before the slow client reads its second frame
        assert len(text_of(receive_all(quick, "q"))) == 50 * 3000
        wait_for(lambda: job_id not in worker.running, 60)
        frames = receive_all(slow, "s")
        assert len(text_of(frames)) == count * 3000
    assert metric(gateway, "tokens_refilled_total") - refilled_before > 100


@pytest.mark.long
def test_without_a_broker_nothing_is_accepted(
    fresh_broker: Broker, redis_address: str, tmp_path: Path
) -> None:
    before = open_jobs(redis_address)
    with running_gateway(fresh_broker.bootstrap_servers, redis_address, tmp_path) as gateway:
        fresh_broker.server.stop()
        with connect(gateway.ws_url) as socket:
            generate(socket, "r", "x", idempotency_key="lost")
            error = receive(socket)
            assert (error["type"], error["code"]) == ("error", "overloaded")
            assert error["retry_after_ms"] > 0
        wait_for(lambda: open_jobs(redis_address) <= before)
        wait_for(lambda: "kafka" in httpx.get(f"{gateway.url}/readyz").json()["waiting_for"], 30)


@pytest.mark.long
def test_a_gateway_that_lost_its_broker_stops_at_once(
    fresh_broker: Broker, redis_address: str, tmp_path: Path
) -> None:
    with running_gateway(fresh_broker.bootstrap_servers, redis_address, tmp_path) as gateway:
        fresh_broker.server.kill()
        wait_for(lambda: "kafka" in httpx.get(f"{gateway.url}/readyz").json()["waiting_for"], 30)
        gateway.process.terminate()
        # a client that looks for its broker is at it for ten seconds
        assert gateway.process.wait(5) == 0


def test_keys_are_checked_at_the_handshake(other_gateway: RunningGateway) -> None:
    url = other_gateway.ws_url
    for headers in ({}, {"Authorization": "Bearer nope"}):
        with pytest.raises(InvalidStatus) as caught:
            connect(url, additional_headers=headers)
        assert caught.value.response.status_code == 401
        assert json.loads(caught.value.response.body)["error"]["code"] == "unauthorized"
    with connect(url, additional_headers={"Authorization": "Bearer one"}):
        pass
    with connect(url, subprotocols=["openlora.v1", "openlora.key.two"]) as socket:
        assert socket.subprotocol == "openlora.v1"
    log = other_gateway.log_text()
    assert "nope" not in log
    assert "without completing handshake" not in log


def test_a_page_of_another_site_is_refused(gateway: RunningGateway) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(gateway.ws_url, origin="http://evil.example")
    assert caught.value.response.status_code == 403
    with connect(gateway.ws_url, origin=gateway.url):
        pass


def test_another_tenants_job_is_not_found(
    other_gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(other_gateway.ws_url, additional_headers={"Authorization": "Bearer one"}) as one:
        generate(one, "r", "secret", idempotency_key="k")
        job_id = receive_all(one, "r")[0]["job_id"]
    with connect(other_gateway.ws_url, additional_headers={"Authorization": "Bearer two"}) as two:
        send(two, type="resume", request_id="s", job_id=job_id)
        assert receive(two)["code"] == "job_not_found"
        generate(two, "r", "mine", idempotency_key="k")
        assert text_of(receive_all(two, "r")) == "mine"


def test_a_tenant_with_too_many_jobs_is_told_when_to_come_back(
    embedded_broker: Broker, redis_address: str, tmp_path: Path, worker: ScriptedWorker
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers,
            redis_address,
            tmp_path,
            OPENLORA_API_KEYS="flood:one,calm:two",
            OPENLORA_MAX_TENANT_JOBS="3",
            OPENLORA_MAX_ADAPTER_JOBS="2",
        ) as gateway,
        connect(gateway.ws_url, additional_headers={"Authorization": "Bearer one"}) as flood,
        connect(gateway.ws_url, additional_headers={"Authorization": "Bearer two"}) as calm,
    ):
        worker.pause()  # none of them ends meanwhile
        asked = [{"adapter": "pirate"}] * 3 + [{}] * 2
        for number, fields in enumerate(asked):
            generate(flood, f"r{number}", words(10), **fields)
            frame = receive(flood)
            # the third with the adapter, and then the fourth of the tenant
            assert frame["type"] == ("error" if number in (2, 4) else "accepted")
            if frame["type"] == "error":
                assert frame["code"] == "overloaded"
                assert frame["retry_after_ms"] > 0
        worker.resume()
        generate(calm, "c", "a b")
        assert text_of(receive_all(calm, "c")) == "a b"
        assert receive_all(flood, "r0")[-1]["type"] == "done"
        # what has ended makes room, and nobody had to say so
        generate(flood, "again", "a b")
        assert text_of(receive_all(flood, "again")) == "a b"
