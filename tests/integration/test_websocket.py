"""The websocket of a real gateway process, on real servers, with a scripted worker behind it."""

from __future__ import annotations

import json
import signal
import socket as socketlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.jobs import Job
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.conftest import Broker
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services

GRACE_S = 1.5


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


def send(socket: ClientConnection, **frame: Any) -> None:
    socket.send(json.dumps(frame))


def generate(socket: ClientConnection, request_id: str, prompt: str, **fields: Any) -> None:
    send(socket, type="generate", request_id=request_id, prompt=prompt, **fields)


def receive(socket: ClientConnection, timeout: float = 15) -> dict[str, Any]:
    frame: dict[str, Any] = json.loads(socket.recv(timeout=timeout))
    return frame


def receive_all(socket: ClientConnection, request_id: str) -> list[dict[str, Any]]:
    """Frames of one request up to its last one; frames of others are dropped."""
    frames = []
    while True:
        frame = receive(socket)
        if frame["request_id"] != request_id:
            continue
        frames.append(frame)
        if frame["type"] in ("done", "error"):
            return frames


def receive_until_closed(socket: ClientConnection, frames: list[dict[str, Any]]) -> None:
    while True:
        frames.append(receive(socket))


def text_of(frames: list[dict[str, Any]]) -> str:
    """The joined text; indices must count up without a gap."""
    tokens = [frame for frame in frames if frame["type"] == "token"]
    first = tokens[0]["index"] if tokens else 0
    assert [token["index"] for token in tokens] == [*range(first, first + len(tokens))]
    return "".join(frame["text"] for frame in frames if frame["type"] in ("token", "done"))


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def metric(gateway: RunningGateway, name: str) -> float:
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    start = f"openlora_gateway_{name} "
    return next(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def hang_up(socket: ClientConnection) -> None:
    """Ends the connection as a lost network would: no close frame, no waiting for one."""
    socket.socket.shutdown(socketlib.SHUT_RDWR)


def small_buffers(gateway: RunningGateway) -> socketlib.socket:
    """A connection whose receiving side takes little: what the server sends soon has to wait."""
    connection = socketlib.socket()
    connection.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_RCVBUF, 8192)
    connection.connect(("127.0.0.1", gateway.port))
    return connection


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.02)


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
        generate(socket, "good", words(60))
        frames = [receive(socket)]
        for text, code, request_id in bad:
            socket.send(text)
            while (frame := receive(socket))["type"] != "error":
                frames.append(frame)
            assert (frame["code"], frame["request_id"]) == (code, request_id), text[:100]
            assert frame["retriable"] is False
        frames += receive_all(socket, "good")
        assert text_of(frames) == words(60)


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


def test_cancel_stops_the_work_at_the_worker(
    gateway: RunningGateway, slow_worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", words(5000))
        frames = [receive(socket) for _ in range(5)]
        send(socket, type="cancel", request_id="r")
        frames += receive_all(socket, "r")
        assert frames[-1]["finish_reason"] == "cancelled"
        assert len(frames) < 200
        text_of(frames)
    wait_for(lambda: not slow_worker.running)


def test_the_job_of_a_client_that_left_ends_after_the_grace(
    gateway: RunningGateway, slow_worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", words(5000))
        job_id = receive(socket)["job_id"]
        # renewed for as long as the client stays
        time.sleep(GRACE_S * 1.5)
        assert job_id in slow_worker.running
        hang_up(socket)
    left = time.monotonic()
    wait_for(lambda: job_id not in slow_worker.running)
    assert time.monotonic() - left > GRACE_S * 0.6


def test_a_batch_job_goes_on_without_its_client(
    gateway: RunningGateway, slow_worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", words(150), priority="batch")
        job_id = receive(socket)["job_id"]
        hang_up(socket)
    wait_for(lambda: job_id in slow_worker.running)
    wait_for(lambda: job_id not in slow_worker.running)
    with connect(gateway.ws_url) as socket:
        send(socket, type="resume", request_id="s", job_id=job_id)
        assert text_of(receive_all(socket, "s")) == words(150)


def test_a_stream_goes_on_at_another_gateway(
    gateway: RunningGateway,
    embedded_broker: Broker,
    redis_address: str,
    tmp_path: Path,
    slow_worker: ScriptedWorker,
) -> None:
    with running_gateway(embedded_broker.bootstrap_servers, redis_address, tmp_path) as second:
        with connect(gateway.ws_url) as socket:
            generate(socket, "r", words(100))
            frames = [receive(socket) for _ in range(20)]
            hang_up(socket)
        with connect(second.ws_url) as socket:
            last = frames[-1]
            send(socket, type="resume", request_id="s", job_id=last["job_id"], after=last["index"])
            accepted, *rest = receive_all(socket, "s")
            assert (accepted["type"], accepted["adapters"]) == ("accepted", [])
            assert rest[0]["index"] == last["index"] + 1
            assert text_of(frames + rest) == words(100)


def test_a_resume_beyond_the_log_is_refused(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", "a b c")
        job_id = receive_all(socket, "r")[0]["job_id"]
        send(socket, type="resume", request_id="s", job_id=job_id, after=3)
        error = receive(socket)
        assert (error["code"], error["request_id"]) == ("invalid_request", "s")
        assert "3 tokens" in error["message"]
        send(socket, type="resume", request_id="s", job_id=job_id, after=1)
        assert text_of(receive_all(socket, "s")) == " c"


def test_an_idempotency_key_runs_a_request_once(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r1", "a b", idempotency_key="k1")
        first = receive_all(socket, "r1")
        generate(socket, "r2", "a b", idempotency_key="k1")
        second = receive_all(socket, "r2")
        assert second[0]["job_id"] == first[0]["job_id"]
        assert text_of(second) == "a b"
        generate(socket, "r3", "another", idempotency_key="k1")
        assert receive_all(socket, "r3")[-1]["code"] == "invalid_request"
    assert len(worker.jobs) == 1


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
        started = time.monotonic()
        receive_all(quick, "q")
        assert time.monotonic() - started < 2
        wait_for(lambda: job_id not in worker.running, 60)
        frames = receive_all(slow, "s")
        assert len(text_of(frames)) == count * 3000
    assert metric(gateway, "tokens_refilled_total") - refilled_before > 100


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
    assert "nope" not in other_gateway.log_text()


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


def test_without_a_broker_nothing_is_accepted(
    fresh_broker: Broker, redis_address: str, tmp_path: Path, worker: ScriptedWorker
) -> None:
    worker.pause()
    with running_gateway(fresh_broker.bootstrap_servers, redis_address, tmp_path) as gateway:
        fresh_broker.server.stop()
        with connect(gateway.ws_url) as socket:
            generate(socket, "r", "x", idempotency_key="lost")
            error = receive(socket)
            assert (error["type"], error["code"]) == ("error", "overloaded")
            assert error["retry_after_ms"] > 0
        wait_for(lambda: "kafka" in httpx.get(f"{gateway.url}/readyz").json()["waiting_for"], 30)
    worker.resume()
    time.sleep(0.2)
    assert worker.jobs == []


def test_sigterm_lets_streams_end_then_closes_with_1012(
    embedded_broker: Broker, redis_address: str, tmp_path: Path, slow_worker: ScriptedWorker
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers,
            redis_address,
            tmp_path,
            OPENLORA_DRAIN_TIMEOUT_S="20",
        ) as gateway,
        connect(gateway.ws_url) as socket,
    ):
        generate(socket, "r", words(100))
        frames = [receive(socket)]
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{gateway.url}/readyz").status_code == 503)
        generate(socket, "late", "x")
        late: list[dict[str, Any]] = []
        while not frames or frames[-1]["type"] != "done":
            frame = receive(socket)
            (late if frame["request_id"] == "late" else frames).append(frame)
        assert text_of(frames) == words(100)
        assert [frame["code"] for frame in late] == ["overloaded"]
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        assert gateway.process.wait(10) == 0


def test_a_stream_cut_off_by_the_drain_can_be_resumed(
    gateway: RunningGateway,
    embedded_broker: Broker,
    redis_address: str,
    tmp_path: Path,
    slow_worker: ScriptedWorker,
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers,
            redis_address,
            tmp_path,
            OPENLORA_DRAIN_TIMEOUT_S="0.3",
        ) as leaving,
        connect(leaving.ws_url) as socket,
    ):
        generate(socket, "r", words(200))
        frames = [receive(socket)]
        leaving.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as caught:
            receive_until_closed(socket, frames)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
    with connect(gateway.ws_url) as socket:
        last = frames[-1]
        send(socket, type="resume", request_id="s", job_id=last["job_id"], after=last["index"])
        assert text_of(frames + receive_all(socket, "s")) == words(200)
