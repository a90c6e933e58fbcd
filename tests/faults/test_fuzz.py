"""Ten thousand wrong messages at the three doors: each gets a coded answer, nothing falls over."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kafka import KafkaProducer
from websockets.sync.client import connect

from openlora.bench.chaos_streams import Ask, Clients
from openlora.bench.chaos_system import ChaosPlan, ChaosSystem
from openlora.errors import _BY_CODE as BY_CODE
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

CODES = set(BY_CODE)
fuzz = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["pirate", "interactive", "batch", "cat", "user", "", "0" * 26, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = (
    *("request_id", "messages", "prompt", "adapter", "adapters", "merge", "params", "priority"),
    *("deadline_s", "idempotency_key", "job_id", "after", "extra"),
)
messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": values, "content": values, "name": values}),
    max_size=3,
)
params = st.dictionaries(
    st.sampled_from(
        ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs", "x"]
    ),
    values,
    max_size=4,
)
frames = st.fixed_dictionaries(
    {"type": st.sampled_from(["generate", "cancel", "resume"]) | values},
    optional=dict.fromkeys(FIELDS, values) | {"messages": messages, "params": params},
)


class World:
    """A system, and a socket that is opened anew where the gateway closed it."""

    def __init__(self, system: ChaosSystem) -> None:
        self.system = system
        self.url = system.urls()[0]
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.producer = KafkaProducer(bootstrap_servers=system.broker.address, acks=1)
        self.pids = self._pids()
        self._numbers = iter(range(1 << 30))
        self._socket: Any = None

    def _pids(self) -> list[int | None]:
        worker, gateway = self.system.workers[0], self.system.gateways[0]
        return [worker.pid, worker.engine_pid(), gateway.pid]

    def is_whole(self) -> bool:
        """The very processes of the start live."""
        return self._pids() == self.pids and all(
            p.running for p in (*self.system.workers, *self.system.gateways)
        )

    def say(self, text: str | bytes) -> list[dict[str, Any]]:
        """Send one frame, and what was answered before a question that is surely refused is."""
        if self._socket is None:
            self._socket = connect(self.url.replace("http", "ws") + "/v1/ws", max_size=None)
        mark = f"mark {next(self._numbers)}"
        self._socket.send(text)
        self._socket.send(json.dumps({"type": "cancel", "request_id": mark}))
        answers = []
        while True:
            frame = json.loads(self._socket.recv(timeout=30))
            if frame.get("request_id") == mark:
                return answers
            answers.append(frame)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    plan = ChaosPlan(workers=1, gateways=1, engine="scripted:0")
    system = ChaosSystem(tmp_path_factory.mktemp("fuzz"), plan)
    system.start()
    yield World(system)
    system.stop()


def check_errors(answers: list[dict[str, Any]]) -> None:
    for frame in answers:
        assert frame["type"] in ("accepted", "token", "done", "error", "restarted"), frame
        if frame["type"] == "error":
            assert frame["code"] in CODES, frame
            assert frame["code"] != "internal", frame
            assert frame["message"], frame


@settings(fuzz, max_examples=5000)
@given(frames)
@example({"type": "generate", "request_id": "r", "prompt": "x", "params": {"stop": [""]}})
def test_websocket_frames(world, frame):
    check_errors(world.say(json.dumps(frame)))


@settings(fuzz, max_examples=1500)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_websocket_noise(world, noise):
    text = noise if isinstance(noise, bytes) else noise.encode("utf-8", "ignore").decode()
    answers = world.say(text)
    check_errors(answers)
    assert any(frame["type"] == "error" for frame in answers)


paths = st.sampled_from(
    [
        "/v1/adapters",
        "/v1/topics/scale",
        "/v1/dead/0/retry",
        "/v1/models",
        "/v1/adapters/x",
        "/v1/ws",
    ]
) | st.text("/abv1.%", max_size=12).map(lambda path: "/" + path)


@settings(fuzz, max_examples=2000)
@given(
    st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH"]),
    paths,
    st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()),
)
def test_http_requests(world, method, path, body):
    if (method, path) == ("POST", "/v1/topics/scale") and b"partitions" in body:
        return  # it may well be valid
    try:
        response = world.http.request(method, path, content=body)
    except httpx.InvalidURL:
        return
    assert response.status_code < 500 or response.json()["error"]["code"] == "overloaded", (
        response.status_code,
        response.text,
    )
    if response.status_code >= 400 and response.headers["content-type"] == "application/json":
        error = response.json()["error"]
        assert error["code"] in CODES
        assert error["message"]


jobs = st.fixed_dictionaries(
    {},
    optional={
        "job_id": st.just("07" + "ab" * 12) | values,
        "tenant": st.just("t") | values,
        "created_ms": st.just(1) | values,
        "params": st.just({"max_tokens": 2, "seed": 1}) | values,
        "prompt": st.just("hello") | values,
        "messages": values,
        "adapters": values,
        "merge": values,
        "priority": values,
        "deadline_ms": values,
        "leased": values,
    },
)


@settings(fuzz, max_examples=2000)
@given(
    st.binary(max_size=100) | jobs.map(lambda job: json.dumps(job).encode()),
    st.none() | st.binary(max_size=20),
    st.sampled_from([JOBS_TOPIC, BATCH_TOPIC]),
)
def test_kafka_messages(world, value, key, topic):
    world.producer.send(topic, value, key=key)


def test_all_of_it_lives_and_serves(world):
    world.producer.flush(30)
    clients = Clients(world.system.urls, 1)
    fields = {"prompt": "hello", "params": {"max_tokens": 20, "ignore_eos": True}}
    streams = [clients.begin(Ask(f"after {n}", fields), None) for n in range(16)]
    clients.wait(streams, 60)
    clients.close()
    assert [stream.mishaps for stream in streams if stream.mishaps] == []
    assert {len(stream.token_ids) for stream in streams} == {20}
    assert world.is_whole(), world.system.last_lines()
    logs = world.system.gateways[0].log_text() + world.system.workers[0].log_text()
    assert "Traceback" not in logs
